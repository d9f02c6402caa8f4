"""Whole passes whose blocks run on rows of a fold: clean runs and runs of sources.

Outside the blocks nothing changes: each is given all prompts and returns all prompts, so hooks
between blocks find what they always find.  Whether prompts share anything is seen in the pass
itself, from the stream before the first block.  Before the first pass of a kind is trusted, noise
before the first block must do to the logits what it does in a plain pass.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor

from hooked_vlm.anatomy.source import carrier, first_argument
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Model
from hooked_vlm.engine.arguments import Made, fitted_call
from hooked_vlm.engine.attempts import GrowthError, attempt
from hooked_vlm.engine.clean_run import (
    asked,
    blocks_of,
    is_hooked_by_others,
    signature_of,
    with_forwards,
)
from hooked_vlm.engine.fingerprints import answer, number_of, remember, ways_of_attending
from hooked_vlm.engine.folding import Fold, FoldedFit, same_for_shared
from hooked_vlm.engine.image_cache import Kept, encoding_once
from hooked_vlm.engine.noise import apart, bound_for
from hooked_vlm.engine.proofs import APART
from hooked_vlm.engine.stages import ids_of, last_kept, prompt_mask, stage_of
from hooked_vlm.errors import InterventionError
from hooked_vlm.inputs.rows import known_rows
from hooked_vlm.interventions.chain import flattened, is_located


Result = TypeVar("Result")

_SEPARATE: WeakSet[Any] = WeakSet()


@checked(InterventionError)
@contextmanager
def separate_prompts(model: Model) -> Iterator[None]:
    """Gives each prompt a row of its own, for the length of a `with` block.

    Without it, sweeps carry what prompts of a batch have in common at their beginning (an image
    that they ask about) once.  The numbers agree within rounding.

        with separate_prompts(model):
            scores = sweep.run(model, metric)
    """
    was = model in _SEPARATE
    _SEPARATE.add(model)
    try:
        yield
    finally:
        if not was:
            _SEPARATE.discard(model)


def is_separate(model: Any) -> bool:
    """Whether a `separate_prompts` block is open."""
    return model in _SEPARATE


class Folding:
    """One pass whose blocks run on rows of a fold, if its prompts share anything."""

    def __init__(
        self, model: Any, inputs: Mapping[str, Any], kept: int, *, noisy: bool = False
    ) -> None:
        """Folds the prompts of some inputs; `noisy` adds noise before the first block.

        Of the last `kept` positions somebody sees the logits, so none of them may be padding.
        """
        self.model, self.inputs, self.kept, self.noisy = model, inputs, kept, noisy
        self.blocks = blocks_of(model)
        self.tuples = model.block_outputs(lambda: model(asked(inputs)))
        self.fold: Fold | None = None
        self.kind: Hashable = None
        """What passes have in common that one control speaks for."""
        self.stream: Tensor | None = None
        """Before the first block, with the noise."""
        self._made = Made()
        self._noted: dict[int, Tensor] = {}
        self._handed: Tensor | None = None
        """What the block before returned."""
        self._rows: tuple[Tensor, int] | None = None
        """The same as rows, and the version of `_handed` in which it was the same."""
        self._same: list[Tensor] = []

    def wrap(self, i: int, own: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a block's forward that runs it on rows."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden = first_argument(self.blocks[i], args, kwargs)
            if i == 0:
                hidden = self._begin(hidden, args, kwargs)
            if self.fold is None:
                return own(*args, **kwargs)
            layout = self.fold.layout(0)
            rows = self._rows_of(hidden)
            if rows is None:
                if i:  # something was added: not the same to all prompts, perhaps (DeepStack)
                    self._same.append(self.fold.agree(hidden))
                rows = layout.folded(hidden)
            self._note(_beside(self.blocks[i], args, kwargs))
            batch, length = hidden.shape[:2]
            fit = FoldedFit(batch, length, 1, 0, self._made, layout=layout)
            fitted = fitted_call(self.blocks[i], fit, rows, args, kwargs, needs_mask=True)
            output = own(*fitted[0], **fitted[1])
            rows = output[0] if self.tuples[i] else output
            whole = self._handed = layout.unfolded(rows)
            self._rows = None if whole.is_inference() else (rows, whole._version)
            return (whole, *[None] * (self.tuples[i] - 1)) if self.tuples[i] else whole

        return forward

    def _rows_of(self, hidden: Tensor) -> Tensor | None:
        """Returns what the block before returned as rows, unless something was done to it since."""
        if hidden is not self._handed or self._rows is None or self._rows[1] != hidden._version:
            return None
        return self._rows[0]

    def _begin(self, hidden: Tensor, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Finds what prompts share, and returns the stream that the first block is given."""
        self.fold = self._rows = self._handed = None
        self._made = Made()
        for held in (self._noted, self._same):
            held.clear()
        ids = ids_of(self.inputs)
        # Several residual streams side by side are of no model that has been seen to fold.
        is_one_stream = ids is not None and hidden.ndim == 3 and hidden.shape[:2] == ids.shape
        if ids is None or not is_one_stream:
            return hidden
        self.fold = Fold.find(hidden, ids, prompt_mask(self.inputs), self.kept)
        if self.fold is None:
            return hidden
        # Rows that are not even take other ways through `FoldedFit` and `Layout.mask`.
        is_even = self.fold.layout(0).is_even
        attending = ways_of_attending(self.model)
        self.kind = ("folds", signature_of(args, kwargs), is_even, attending)
        if answer(self.model, self.kind) is False:
            self.fold = None
            return hidden
        # What the first block is given mostly says it for all: no pass is made for nothing.
        self._note(_beside(self.blocks[0], args, kwargs))
        if not self.agrees():
            self.fold = None
            return hidden
        if self.noisy:
            noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(0))
            scale = hidden.float().std(-1, keepdim=True).to(hidden)
            hidden = hidden + self.fold.alike(noise.to(hidden)) * scale
        self.stream = hidden
        return hidden

    def _note(self, given: Any) -> None:
        """Notes whether what a block is called with is one for shared tokens."""
        assert self.fold is not None
        for name, tensor in _tensors_in(given):
            if id(tensor) not in self._noted:  # tensors that are held keep their ids
                self._noted[id(tensor)] = tensor
                self._same += same_for_shared(self.fold, name, tensor)

    def unfolded_keys(self, x: Tensor) -> Tensor:
        """Returns keys or values of a block, by prompt."""
        return x if self.fold is None else self.fold.layout(0).unfolded_keys(x)

    def agrees(self) -> bool:
        """Whether all that blocks were called with was one for shared tokens."""
        return all(torch.stack(self._same).tolist()) if self._same else True


def _tensors_in(given: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors that a block is called with, each with the name that it is called by."""
    if isinstance(given, Tensor):
        yield name, given
    elif isinstance(given, Mapping):
        for key, part in given.items():
            yield from _tensors_in(part, str(key))
    elif isinstance(given, tuple | list):
        for part in given:
            yield from _tensors_in(part, name)


def _beside(block: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Returns what a block is called with, its stream left out."""
    stream = carrier(block, args, kwargs)
    return args[1:], {name: value for name, value in kwargs.items() if name != stream}


def run_folded(
    model: Any,
    inputs: Mapping[str, Any],
    run: Callable[[Folding | None], Result],
    arguments: Mapping[str, Any],
    kept: int | None = None,
) -> Result:
    """Returns `run(folding)`, where the prompts share enough and the model allows it.

    Otherwise `run(None)`.  `run` lets `folding.wrap` stand in for the blocks of its pass, which
    has to be one of all blocks or of the first ones.  `kept` is how many positions of its logits
    are used; where it is not given, those that `arguments` ask for.
    """
    ids = ids_of(inputs)
    is_apart = is_separate(model) or is_hooked_by_others(model)
    if is_apart or model.device.type == "meta" or ids is None or len(ids) < 2:
        return run(None)
    if kept is None:
        kept = last_kept(arguments) or ids.shape[1]
    # An image that is there twice is encoded once: in a batch its bits may depend on its place.
    folding = Folding(model, inputs, kept)
    with encoding_once(model, Kept(), repeated_only=True):
        try:
            result = attempt(lambda: run(folding), "prompts that share an image had no common row")
            if folding.fold is None or (folding.agrees() and _is_proved(folding, arguments)):
                return result
        except GrowthError:
            if folding.fold is not None:
                remember(model, folding.kind, lambda: False)
    return run(None)  # as if there were no rows in common: what is wrong shows there, too


def _is_proved(folding: Folding, arguments: Mapping[str, Any]) -> bool:
    def find_out() -> bool:
        try:
            return attempt(lambda: _is_right(folding, arguments), "the control of rows failed")
        except GrowthError:
            return False

    return remember(folding.model, folding.kind, find_out)


def _is_right(folding: Folding, arguments: Mapping[str, Any]) -> bool:
    """Whether noise before the first block does in such a pass what it does in a plain one."""
    model, inputs = folding.model, folding.inputs
    noisy = Folding(model, inputs, folding.kept, noisy=True)

    def put(i: int, own: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if i > 0:
                return own(*args, **kwargs)
            stream = carrier(folding.blocks[0], args, kwargs)
            if stream is None:
                return own(noisy.stream, *args[1:], **kwargs)
            return own(*args, **{**kwargs, stream: noisy.stream})

        return forward

    def pass_under(wrap: Callable[[int, Callable[..., Any]], Callable[..., Any]]) -> Tensor:
        with with_forwards(folding.blocks, wrap):
            return model(asked(inputs), **arguments)[:, -folding.kept :]

    found = pass_under(noisy.wrap)
    if noisy.fold is None:
        return False
    plain, clean = pass_under(put), model(asked(inputs), **arguments)[:, -folding.kept :]
    # None of these positions is padding: prompts are not folded then (`Fold.find`).
    off, moved = apart(found, plain), apart(clean, plain)
    bound = bound_for(model, inputs, arguments, plain.dtype, off)
    return off <= bound and moved >= min(APART * bound, 0.2)


def folds_under(model: Any, base: Sequence[Any]) -> bool:
    """Whether what all cells begin with acts before the blocks alone, where prompts are whole."""
    if not all(is_located(part) for part in flattened(base)):
        return False
    stages = [stage_of(part.site, model.cfg.n_layers) for part in flattened(base)]
    return all(stage < 0 or (stage == 0 and between) for stage, between in stages)


def expected_fold(model: Any, inputs: Mapping[str, Any], kept: int = 1) -> Fold | None:
    """Returns which prompts will share rows, from inputs alone: nothing runs.

    An image counts as the same where its pixels are.  None also where these cannot be told apart
    (on the `meta` device, or where a processor does not lay them out by image).
    """
    ids, pixels = ids_of(inputs), inputs.get("pixel_values")
    if is_separate(model) or is_hooked_by_others(model):
        return None
    if not isinstance(pixels, Tensor) or ids is None:
        return None
    if pixels.is_meta or ids.is_meta:
        return None
    grids = known_rows(model, inputs)
    flat = [grid for row in grids for grid in row]
    sizes = [grid.patch_rows * grid.patch_cols for grid in flat]
    if len(pixels) == len(flat):
        sizes = [1] * len(flat)
    if not flat or sum(sizes) != len(pixels):
        return None
    parts = iter(pixels.split(sizes))
    content = torch.zeros(*ids.shape, 1, dtype=torch.float64)
    for b, row in enumerate(grids):
        for grid in row:
            content[b, grid.positions.flatten()] = number_of(next(parts))
    mask = prompt_mask(inputs)
    return Fold.find(content, ids.cpu(), mask if mask is None else mask.cpu(), kept)
