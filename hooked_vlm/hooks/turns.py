"""Threads and tasks that use one model: runs wait for each other, open blocks are refused.

Hooks are attached to the modules of a model, which all threads share.  So a run of the library
holds its model's lock, and runs in other threads wait for it.  A `with model.hooks(…)` block is
its user's, who may wait for other threads inside it; a run of another thread or asyncio task
raises while the block is open, rather than run under hooks that are not its own.
"""

import asyncio
import threading
import weakref
from dataclasses import dataclass
from typing import Any

from torch import nn

from hooked_vlm.errors import HookError


_LOCKS: weakref.WeakKeyDictionary[nn.Module, Any] = weakref.WeakKeyDictionary()
"""A lock for each wrapped transformers model; several wrappers of one model share it.  It is not
an attribute, so that models and wrappers can be copied and pickled."""
_OF_LOCKS = threading.Lock()


def lock_of(hf_model: nn.Module) -> Any:
    """Returns the lock of a transformers model; a thread that holds it can take it again."""
    with _OF_LOCKS:
        return _LOCKS.setdefault(hf_model, threading.RLock())


def _current_task() -> Any:
    try:
        return asyncio.current_task()
    except RuntimeError:  # no event loop runs in this thread
        return None


@dataclass(frozen=True, eq=False)
class Owner:
    """The thread, and the asyncio task if any, in which a block of hooks was opened."""

    thread: int
    task: Any

    @staticmethod
    def current() -> "Owner":
        """Returns the thread and task that run now."""
        task = _current_task()
        return Owner(threading.get_ident(), None if task is None else weakref.ref(task))

    def require_current(self) -> None:
        """Raises `HookError` in another thread, and in another task while the own one goes on."""
        task = None if self.task is None else self.task()
        # A notebook runs each cell as a task, and a block may be opened in one and used in the
        # next: the task of a cell that is done claims nothing.
        other_task = task is not None and not task.done() and task is not _current_task()
        if self.thread != threading.get_ident() or other_task:
            raise HookError(
                "A `with model.hooks(…)` block of another thread or asyncio task is open on this "
                "model, so this run would be under its hooks. Close it first, open the block in "
                "the thread that runs the model, or give each thread a copy of the model."
            )
