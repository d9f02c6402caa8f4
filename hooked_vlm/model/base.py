"""The base class of wrapped models: sites by name, hooks and caches.

A `HookedModel` holds a transformers model, its sites and their hook points.  It attaches
functions to sites, caches activations, and warns about sites that never ran.  It is
abstract: the final classes, `vlm.HookedVLM` and `encoder.HookedVisionEncoder`, define
`forward`, `prepare` and `run_with_cache`.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from hooked_vlm.anatomy.caches import prompts_among
from hooked_vlm.anatomy.sizes import EncoderConfig, HookedVLMConfig
from hooked_vlm.anatomy.vision import Vision
from hooked_vlm.arguments.checked import checked, is_listed, shown
from hooked_vlm.arguments.displayed import html_block, html_folded
from hooked_vlm.errors import HookedVLMWarning, HookError, callers_level
from hooked_vlm.hooks.attach import attach
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.checkpointing import require_repeatable, warn_unrepeated
from hooked_vlm.hooks.compiled import eager
from hooked_vlm.hooks.dispatch import HookFunction, Reader
from hooked_vlm.hooks.gradients import warn_unreached
from hooked_vlm.hooks.hook_point import ByName, HookPoint, PassCounter, require_hook_function
from hooked_vlm.hooks.names import VISION, NamesFilter, SiteNames, count_layers, select_names
from hooked_vlm.hooks.of_interventions import hooks_of
from hooked_vlm.hooks.patch_order import VisionActivation as VisionActivation
from hooked_vlm.hooks.patch_order import each, joined
from hooked_vlm.hooks.prompts import require_generation, warn_ungenerated
from hooked_vlm.hooks.sites import Site, describe_sites
from hooked_vlm.hooks.turns import lock_of
from hooked_vlm.inputs.grid_finder import Grids
from hooked_vlm.inputs.tensors import require_tensors
from hooked_vlm.model.activation_sizes import Footprint
from hooked_vlm.model.gradients import backward_pairs, named_probes
from hooked_vlm.model.instead import ActsLikeAModule
from hooked_vlm.model.keywords import (
    require_given_once,
    require_inputs,
    require_names_read,
    require_read,
)
from hooked_vlm.model.memory import require_memory
from hooked_vlm.model.own_sites import TakesSites
from hooked_vlm.model.said import say_eager, warn_unran


ModelInputs = Mapping[str, Any]
"""The result of `prepare`, or any mapping of the tensors that the wrapped model's forward takes."""

FwdHook = Any
"""`(name, function)`, where name is a string, a pattern or a predicate; or an intervention."""

Wrapped = TypeVar("Wrapped", bound="HookedModel")


class HookedModel(TakesSites, ActsLikeAModule, ABC):
    """A model whose activations can be read and replaced by name; abstract."""

    cfg: HookedVLMConfig | EncoderConfig
    processor: Any

    def __init__(
        self,
        chain: Sequence[nn.Module],
        sites: dict[str, Site],
        vision: Vision | None,
        lm_path: str = "",
    ) -> None:
        """Wraps a model with its sites, in the order of a forward pass, and its encoder.

        The model is the last of `chain`; before it are the modules that the user has put around
        it, from the outside.  `lm_path` leads to the language model in it.
        """
        self.hf_model = chain[-1]
        self._chain = tuple(chain)
        self._lm_path = lm_path
        self.sites: dict[str, Site] = ByName(sites)
        points = [HookPoint(site.name, site.axes, site.read_only) for site in sites.values()]
        self.hook_dict: dict[str, HookPoint] = ByName({point.name: point for point in points})
        stacks = ("blocks", f"{VISION}.blocks")
        self._n_layers = {stack: count_layers(stack, sites) for stack in stacks}
        self._vision = vision
        self._open: list[tuple[list[tuple[str, HookFunction]], PassCounter]] = []
        self._attached = ExitStack()
        self.said_eager = False
        self._said_unrepeated = False
        self._footprint: Footprint | None = None
        self._read_entries: set[str] = set()
        self._read_keywords: set[str] = set()

    def require_call(self, inputs: Any, given: Iterable[str]) -> None:
        """Raises `HookError` for inputs that are none, and for names that nobody would read."""
        require_inputs(inputs)
        if new := set(inputs) - self._read_entries:
            require_names_read(self.hf_model, self.processor, new)
            self._read_entries |= new
        require_given_once(inputs, given)
        if new := set(given) - self._read_keywords:
            require_read(self.hf_model, new)
            self._read_keywords |= new
        more = given if isinstance(given, Mapping) else {}
        require_tensors(self.hf_model, {**inputs, **more})

    @property
    def hook_names(self) -> list[str]:
        """The names of all sites, in the order of a forward pass."""
        return SiteNames.of(self.sites)

    @property
    def footprint(self) -> Footprint:
        """The width of each site, for estimates of memory (see `memory.estimate_cache`)."""
        if self._footprint is None:
            self._footprint = Footprint(self.hf_model, self.sites, self.cfg, self._vision)
        return self._footprint

    def turn(self) -> Any:
        """Returns a context manager inside which no other thread runs this model.

        Every run of the library is inside one, so threads take turns; use it around what must
        not be interrupted.  A thread that has its turn can take it again.
        """
        return lock_of(self.hf_model)

    @checked(HookError, but=("fwd_hooks", "bwd_hooks"))
    @contextmanager
    def hooks(
        self: Wrapped,
        fwd_hooks: Sequence[FwdHook] = (),
        inputs: ModelInputs | None = None,
        prefill_only: bool = False,
        *,
        bwd_hooks: Sequence[FwdHook] = (),
    ) -> Iterator[Wrapped]:
        """Attaches hook functions for the duration of a `with` block.

        In nested blocks, outer functions run first.  In a generation, functions act at every
        step, or with `prefill_only` on the prompt alone; interventions act on the prompt alone, or
        on generated tokens (`Generated()`).  They need the `inputs` they will act on, and raise on
        others.  Raises `UnknownHookError` for an unknown name before any function is attached.  All
        functions are removed at the end, also after an error.  While a block is open, other threads
        and asyncio tasks cannot run the model.  For `bwd_hooks`, see `run_with_hooks`.
        """
        if inputs is not None:
            self.require_call(inputs, ())
        counter = PassCounter(prefill_only, length=_prompt_length(inputs))
        pairs = self._pairs(fwd_hooks, inputs) + backward_pairs(self, bwd_hooks)
        with self._attached_to_sites(pairs, counter):
            yield self
        warn_ungenerated(pairs)
        if not self._said_unrepeated:
            said = warn_unrepeated(self._chain[0], counter, callers_level())
            self._said_unrepeated = said

    def eager(self) -> AbstractContextManager[None]:
        """Returns a context in which compiled parts of the model run eagerly.

        Runs under hooks do so by themselves; other runs are to be compared with them in it.
        """
        return eager(self._chain[0])

    @contextmanager
    def without_hooks(self) -> Iterator[None]:
        """Detaches the functions of all open `hooks` blocks for the duration of a `with` block.

        What is measured once and cached must not depend on functions that happen to be attached.
        Hooks that the user registered on the wrapped model's own modules stay: they are part of it.
        Raises `HookError` while a block of another thread or asyncio task is open.
        """
        with self.turn():
            for _, opened in self._open:  # whose thread may run the wrapped model meanwhile
                opened.owner.require_current()
            hidden = self._open[:]
            self._open.clear()
            try:
                self._reattach()
                yield
            finally:
                self._open[:0] = hidden
                self._reattach()

    def _repr_html_(self) -> str:
        return html_block(repr(self), html_folded("sites", self.describe()))

    def describe(self) -> str:
        """Returns the sites as a tree with their shapes, with all layers in one entry."""
        return describe_sites(self.cfg, self.sites)

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device to which inputs belong."""

    @abstractmethod
    def grids(self, inputs: ModelInputs) -> Grids:
        """Returns the grids of the images of each prompt."""

    @abstractmethod
    def run_with_cache(
        self, inputs: ModelInputs, names_filter: NamesFilter = None, **kwargs: Any
    ) -> tuple[Any, ActivationCache]:
        """Runs once and returns `(output, cache)`."""

    # --- for the final classes ------------------------------------------------------------

    @contextmanager
    def _attached_to_sites(
        self,
        pairs: list[tuple[str, HookFunction]],
        counter: PassCounter | None = None,
    ) -> Iterator[PassCounter]:
        """Attaches functions to sites with exact names; see `hooks`."""
        say_eager(self, pairs)
        opened = pairs, counter or PassCounter()
        with self.turn():
            for _, other in self._open:
                other.owner.require_current()
            self._open.append(opened)
        try:
            with self.turn():
                self._reattach()
            yield opened[1]
        finally:
            # Blocks may be closed in another order than they were opened in.
            with self.turn():
                self._open[:] = [other for other in self._open if other is not opened]
                self._reattach()

    def _run_hooked(
        self,
        run: Callable[[], Any],
        fwd_hooks: Sequence[FwdHook],
        inputs: ModelInputs,
        prefill_only: bool = False,
        is_generation: bool = False,
        bwd_hooks: Sequence[FwdHook] = (),
    ) -> Any:
        """Returns the result of `run` under hook functions; warns when a named site never ran."""
        pairs = self._pairs(fwd_hooks, inputs) + backward_pairs(self, bwd_hooks)
        if not is_generation:
            require_generation(pairs)
        if not pairs:  # nothing is attached, so a compiled model stays compiled
            with self.turn():
                return run()
        ran: set[str] = set()
        note = Reader(lambda _, hook: ran.add(hook.name))
        named = {name for name, _ in pairs}
        pairs += [(name, note) for name in named]
        counter = PassCounter(prefill_only, is_generation, length=_prompt_length(inputs))
        with self.turn(), self._attached_to_sites(pairs, counter):
            output = run()
        require_repeatable(self._chain[0], counter, output)
        warn_unran(named - ran)
        warn_unreached(output, named_probes(pairs))
        warn_ungenerated(pairs)
        return output

    def _run_cached(
        self,
        run: Callable[[], Any],
        inputs: ModelInputs,
        names_filter: NamesFilter,
        fwd_hooks: Sequence[FwdHook],
        device: str | torch.device | None,
        check_memory: bool,
        stop_at_layer: int | None = None,
        n_copies: int = 1,
    ) -> tuple[Any, ActivationCache]:
        """Returns the result of `run`, and the cache of the sites that a filter selects.

        With `stop_at_layer`, the pass may end before some of these sites; they are not cached.
        Memory is checked for `n_copies` of the cache.
        """
        # 1. Select the sites, and verify that their cache fits into memory.
        names = select_names(names_filter, self.hook_names)
        if check_memory:
            given = self.footprint, inputs, names, stop_at_layer, device
            warning = require_memory(*given, n_copies)
            if warning:
                warnings.warn(warning, HookedVLMWarning, stacklevel=callers_level())
        # 2. Run with a reader at each site.
        pairs = self._pairs(fwd_hooks, inputs)
        require_generation(pairs)
        found: dict[str, VisionActivation] = {}
        # A later hook may edit memory in place that an earlier site shares, hence the copy.
        copy = bool(pairs) or bool(self._open)
        taken: set[int] = set()

        def keep(tensor: Tensor) -> Tensor:
            # The stream after a block is the one before the next: each gets its own memory.
            shared = tensor.data_ptr() in taken and tensor.device.type != "meta"
            tensor = tensor.detach().clone() if copy or shared else tensor.detach()
            tensor = tensor if device is None else tensor.to(device)
            taken.add(tensor.data_ptr())
            return tensor

        def store(value: VisionActivation, hook: HookPoint) -> None:
            kept = each(keep, value)
            if hook.call > 0 and self.sites[hook.name].by_image and hook.name in found:
                kept = joined(found[hook.name], kept)  # the module runs once for each image
            found[hook.name] = kept

        reader = Reader(store)
        reading = [*pairs, *((name, reader) for name in names)]
        with self.turn(), self._attached_to_sites(reading) as counter:
            output = run()
        require_repeatable(self._chain[0], counter, output)
        # 3. Warn about named sites that never ran.  All other filters select sites loosely.
        if names_filter is not None and not callable(names_filter) and stop_at_layer is None:
            warn_unran(set(names) - set(found))
        kept = {name: found[name] for name in names if name in found}
        # What is returned is the user's to write to.
        own = {x.data_ptr() for x in tree_leaves(output) if isinstance(x, Tensor)}
        kept = {
            n: each(lambda x: x.clone() if x.data_ptr() in own else x, v) for n, v in kept.items()
        }
        return output, ActivationCache(kept, self._n_layers)

    @property
    def is_hooked(self) -> bool:
        """Whether a `with model.hooks(...)` block is open."""
        return bool(self._open)

    @property
    def hooked_sites(self) -> set[str]:
        """The names of the sites at which hooks are open."""
        return {name for pairs, _ in self._open for name, _ in pairs}

    def _reattach(self) -> None:
        """Attaches the functions of all open blocks again, so that outer functions run first."""
        self._attached.close()
        if self._open:
            given = self.hf_model, self.sites, self.hook_dict, self._open, self._vision
            self._attached.enter_context(attach(*given, self._entries()))

    def _entries(self) -> list[nn.Module]:
        """Returns the modules whose call may be the outermost one of a pass, from the outside."""
        entries, module = list(self._chain), self.hf_model
        for name in filter(None, self._lm_path.split(".")):
            module = module.get_submodule(name)
            entries.append(module)
        return entries

    def _pairs(
        self, fwd_hooks: Iterable[FwdHook], inputs: ModelInputs | None
    ) -> list[tuple[str, HookFunction]]:
        """Returns (site name, function) pairs for hooks given by name, filter or intervention."""
        pairs: list[tuple[str, HookFunction]] = []
        if hasattr(fwd_hooks, "hooks_for") or not is_listed(fwd_hooks):
            raise HookError(
                f"fwd_hooks={shown(fwd_hooks)} was given; expected a list of hooks, such as "
                "[(name, function)] or [Patch(…)]. Give [] for none."
            )
        for item in fwd_hooks:
            if hasattr(item, "hooks_for"):
                if inputs is None:
                    raise HookError(
                        f"{item} needs the inputs it acts on, and none were given. Use "
                        "hooks(…, inputs=inputs)."
                    )
                pairs += self._resolved(hooks_of(item, self, inputs))
            elif isinstance(item, tuple) and len(item) == 2 and callable(item[1]):
                pairs += self._resolved([item])
            else:
                raise HookError(
                    f"{shown(item)} is not a hook. Give (name, function), where name is a string, "
                    "a pattern or a function of names; or an intervention such as Patch(…)."
                )
        return pairs

    def _resolved(
        self, hooks: Iterable[tuple[Any, HookFunction]]
    ) -> list[tuple[str, HookFunction]]:
        """Returns (site name, function) pairs for functions with names, patterns or filters."""
        pairs: list[tuple[str, HookFunction]] = []
        for name, fn in hooks:
            if name is None:
                raise HookError(
                    "The name of a hook is None, which would mean all sites. Give a name, a "
                    "pattern such as '*', or a function of names."
                )
            require_hook_function(fn, HookError)
            known = isinstance(name, str) and name in self.sites
            names = [name] if known else select_names(name, self.hook_names)
            pairs += [(site, fn) for site in names]
        return pairs


def _prompt_length(inputs: ModelInputs | None) -> int | None:
    prompt = None if inputs is None else prompts_among((), inputs)
    return None if prompt is None else prompt.shape[1]
