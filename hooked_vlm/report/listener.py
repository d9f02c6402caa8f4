"""The objects that show a job's progress."""

from typing import Protocol, runtime_checkable

from hooked_vlm.experiments.registry import Step


@runtime_checkable
class Listener(Protocol):
    """Receives the progress of a job."""

    def begin(self, step: Step, place: int, of: int) -> None: ...
    def step(self, done: int, total: int) -> None: ...
    def end(self, seconds: float, reused: bool) -> None: ...


class Silent:
    """Shows nothing."""

    def begin(self, step: Step, place: int, of: int) -> None: ...
    def step(self, done: int, total: int) -> None: ...
    def end(self, seconds: float, reused: bool) -> None: ...


SILENT = Silent()
