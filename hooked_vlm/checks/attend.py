"""Verifies that changes of attention do what a hand-written hook does."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.checks.laws import NONE, Finding, finding, quiet
from hooked_vlm.errors import GridError, HookedVLMError
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.names import VISION, site_path
from hooked_vlm.hooks.patch_order import VisionActivation
from hooked_vlm.interventions.attend import Attend
from hooked_vlm.interventions.pairs_of_attention import reads_encoder
from hooked_vlm.interventions.recording import record
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken, Positions


def check_attend(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies `Attend` in every layer whose pattern can be written.

    In self-attention the image is knocked out for the last token (in models without a grid: the
    token that it attends to most), in cross-attention all of it, and in the vision encoder the
    first column.
    """
    names = [
        name.removesuffix(".hook_pattern")
        for name, site in model.sites.items()
        if name.endswith(".hook_pattern") and not site.read_only
    ]
    if not names:
        return Finding("attend", NONE, "no pattern can be written")
    problems = []
    with quiet():
        for is_vision in (False, True):
            own = [n for n in names if site_path(n).is_vision == is_vision]
            if own:
                problems += _in_tower(model, inputs, own, is_vision=is_vision)
    return finding("attend", problems)


def _in_tower(
    model: HookedVLM, inputs: Mapping[str, Any], names: list[str], *, is_vision: bool
) -> Iterator[str]:
    patterns = [f"{name}.hook_pattern" for name in names]
    rows: dict[str, int] = {}
    seen: list[int] = []
    """The key that the last query attends to most, in the first layer."""

    def count(pattern: VisionActivation, hook: HookPoint) -> None:
        rows[hook.name] = sum(matrix.shape[-1] for matrix in pattern)
        if not is_vision and hook.name == patterns[0]:
            seen.append(int(pattern[0][:, -1].mean(0).argmax()))

    read = model.run_with_hooks(inputs, [(name, count) for name in patterns])
    # Blocks after a merge of patches have other rows than those of the grid.
    first = rows.get(patterns[0])
    whole = [n for n in names if not is_vision or rows.get(f"{n}.hook_pattern") == first]
    places = {n: {} for n in names} | _places(model, inputs, whole, None if is_vision else seen)
    where = VISION if is_vision else "the language model"

    def run(**kind: Any) -> Tensor:
        return model.run_with_hooks(inputs, [Attend(n, **places[n], **kind) for n in names])

    same = run(scale=1.0)
    if not torch.equal(same, read):
        yield f"{where}: a factor of 1 changes the logits"
    cut = run(scale=0.0)
    if torch.equal(cut, read):
        yield f"{where}: a knockout changes nothing"
    frozen = run(to=record(model, inputs, patterns))
    off = float((frozen - read).abs().max() / read.abs().max())
    if not off <= 1e-5:
        yield f"{where}: the run's own pattern changes the logits by {off:.1e}"
    if not is_vision:
        by_hand = [
            (name, _by_hand(model, inputs, places[n]))
            for n, name in zip(names, patterns, strict=True)
        ]
        if not torch.equal(model.run_with_hooks(inputs, by_hand), cut):
            yield f"{where}: a knockout differs from the pattern written by hand"
        masked = [n for n in names if "key" in places[n]]
        if masked:
            yield from _masking(model, inputs, masked, places)


def _places(
    model: HookedVLM, inputs: Mapping[str, Any], names: list[str], seen: list[int] | None
) -> dict[str, dict[str, Any]]:
    """Returns the queries and keys that are knocked out, by attention.

    `seen` are keys for models without a grid; None in the vision encoder.
    """
    try:
        grids = [grid for row in model.grids(inputs) for grid in row]
    except GridError:
        grids = []
    if seen is None and not grids:
        return {}
    key = grids[0].all() if grids else Positions(tuple(seen or ()))
    if seen is None:
        key = grids[0].strip("vertical", 0, 1)
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        site = model.sites[f"{name}.hook_pattern"]
        what: dict[str, Any] = {} if reads_encoder(model, site) else {"key": key}
        what |= {} if seen is None else {"query": LastToken()}
        try:
            Attend(name, scale=0.0, **what).check(model, inputs)
        except HookedVLMError:  # a decoder whose prompt is not the inputs' own, or other rows
            continue
        found[name] = what
    return found


def _by_hand(
    model: HookedVLM, inputs: Mapping[str, Any], places: Mapping[str, Any]
) -> Callable[..., Tensor]:
    """Returns a hook function that sets the last query's weights on the keys to zero."""
    if not places:
        return lambda pattern, hook: pattern * 0.0
    key: Any = places.get("key")
    keys: Any = slice(None)
    if isinstance(key, Positions):
        keys = list(key.indices)
    elif key is not None:
        keys = key.positions(next(grid for row in model.grids(inputs) for grid in row))

    def fn(pattern: Tensor, hook: HookPoint) -> Tensor:
        pattern = pattern.clone()
        pattern[:, :, -1, keys] = 0.0
        return pattern

    return fn


def _masking(
    model: HookedVLM,
    inputs: Mapping[str, Any],
    names: list[str],
    places: Mapping[str, Mapping[str, Any]],
) -> Iterator[str]:
    """Yields a problem where masked scores differ from weights that are shared out anew."""

    def shared(name: str) -> Callable[..., Tensor]:
        zero = _by_hand(model, inputs, places[name])

        def fn(pattern: Tensor, hook: HookPoint) -> Tensor:
            cut = zero(pattern, hook)
            before, after = pattern.sum(-1, keepdim=True), cut.sum(-1, keepdim=True)
            sinks = (1 - before).clamp(min=0)
            return cut / (after + sinks.where(sinks > 1e-5, 0)).clamp(min=1e-20)

        return fn

    hooks = [(f"{name}.hook_pattern", shared(name)) for name in names]
    by_hand = model.run_with_hooks(inputs, hooks)[:, -1]
    masked = [Attend(name, **places[name], mask=True) for name in names]
    found = model.run_with_hooks(inputs, masked)[:, -1]
    off = float((found - by_hand).abs().max() / by_hand.abs().max())
    if not off <= 1e-3:
        yield f"masking the image differs from weights shared out anew by {off:.1e}"
