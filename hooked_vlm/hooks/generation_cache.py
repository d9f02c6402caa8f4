"""The activations of a generation, with the positions and the step of each entry.

A generation runs the model once for each new token, with a key-value cache on that token alone,
without one on the whole prompt again.  What was computed before is the same both ways and is kept
once: a `StepRecorder` takes from each pass the positions that no pass before it had.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_vlm.anatomy.caches import cached_positions, caches_among, prompts_among
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import File
from hooked_vlm.errors import DataError, HookError
from hooked_vlm.hooks.cache import ActivationCache
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.patch_order import VisionActivation, each, joined
from hooked_vlm.hooks.sites import Site


Key = str | tuple


@dataclass(frozen=True)
class Pass:
    """What one forward pass of a generation has added to a site."""

    step: int
    """Its number; 0 is the prompt's (in several passes, where the prompt comes in chunks)."""
    positions: range
    """The positions of the prompt and its answer, padding counted, that it has added."""
    key_positions: range
    """The positions on the axis `key` (see `HookPoint.key_positions`)."""


class GenerationCache(ActivationCache):
    """A mapping from hook names to the activations of one generation, all steps together.

    `model.generate_with_cache(inputs)` returns the answer and such a cache.  A site by position
    has one tensor `[batch, pos, ...]` over prompt and answer; the last new token is never run, so
    it has no position.  Scores and patterns are lists by pass, `[batch, head, query, key]` with the
    queries that the pass added, since the number of keys grows.  Sites of the vision encoder and
    keys from an encoder are those of the prompt.  Rows are those of the answers.

    >>> from PIL import Image
    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl")
    >>> inputs = model.prepare(Image.new("RGB", (96, 64)), "What is this?")
    >>> options = {"min_new_tokens": 3, "max_new_tokens": 3}
    >>> out, cache = model.generate_with_cache(inputs, "blocks.2.hook_resid_post", **options)
    >>> inputs.input_ids.shape[1], cache["resid_post", 2].shape
    (42, torch.Size([1, 44, 128]))
    >>> cache.positions(("resid_post", 2))[-2:], cache.steps(("resid_post", 2))[-3:]
    (tensor([42, 43]), tensor([0, 1, 2]))
    """

    _no_run = (
        "it is the cache of a generation. Run the answer again, "
        "model.run_with_cache(model.append(inputs, ids)) with the new tokens' ids"
    )

    @checked(DataError)
    def __init__(
        self,
        activations: Mapping[str, VisionActivation],
        n_layers: Mapping[str, int] | None = None,
        passes: Mapping[str, Sequence[Pass]] | None = None,
    ) -> None:
        """`passes` are those of each site that has positions."""
        super().__init__(activations, n_layers)
        self._passes = {name: tuple(made) for name, made in (passes or {}).items()}

    @checked(DataError)
    def passes(self, key: Key) -> tuple[Pass, ...]:
        """Returns the passes that added to a site, in order; a list has an entry for each.

        Raises `DataError` for a site without positions, such as those of the vision encoder.
        """
        value = self[key]
        name = next(name for name, held in self.items() if held is value)
        if name not in self._passes:
            raise DataError(
                f"{name} has no positions of the prompt and its answer. Ask for a site of the "
                "language model."
            )
        return self._passes[name]

    @checked(DataError)
    def positions(self, key: Key) -> Int[Tensor, " pos"]:
        """Returns the position of each entry on a site's axis `pos` (or `query`, all passes)."""
        return _cat([torch.tensor(list(p.positions)) for p in self.passes(key)])

    @checked(DataError)
    def steps(self, key: Key) -> Int[Tensor, " pos"]:
        """Returns the step in which each entry on a site's axis `pos` was computed."""
        return _cat([torch.full((len(p.positions),), p.step) for p in self.passes(key)])

    @checked(DataError)
    def remove_batch_dim(self) -> "GenerationCache":
        """Returns the cache without the batch axis of LM sites; raises `DataError` unless it is 1.

        Vision sites keep their image axis.
        """
        made: Any = super().remove_batch_dim()
        by_pass = {name: [x[0] for x in self[name]] for name in self._listed()}
        return made._with({**made, **by_pass})

    @checked(DataError)
    def select(self, rows: slice | Sequence[int]) -> "GenerationCache":
        """Returns the cache for some rows of the answers, without vision sites."""
        made = dict(super().select(rows))
        index = rows if isinstance(rows, slice) else torch.as_tensor(rows).long()
        made |= {name: [x[index] for x in self[name]] for name in self._listed()}
        return self._with({name: made[name] for name in self if name in made})

    @checked(DataError)
    def save(self, path: File) -> NoReturn:
        """Raises `DataError`: a file of activations has no place for positions and steps."""
        raise DataError(
            f"A GenerationCache cannot be written to '{path}': its positions and steps would be "
            "lost. For the activations alone, ActivationCache(dict(cache)).save(path)."
        )

    def _listed(self) -> list[str]:
        return [name for name in self._passes if isinstance(self[name], list)]

    def _with(self, activations: Mapping[str, VisionActivation]) -> "GenerationCache":
        kept = {name: made for name, made in self._passes.items() if name in activations}
        made = GenerationCache(activations, self.n_layers, kept)
        made.has_batch_dim = self.has_batch_dim
        return made


def _cat(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.long() for part in parts])


class StepRecorder:
    """Takes from each pass of a generation what no pass before it had."""

    def __init__(self, sites: Mapping[str, Site], device: Any) -> None:
        self.sites, self.device = sites, device
        self._parts: dict[str, list[Any]] = {}
        self._passes: dict[str, list[Pass]] = {}

    def store(self, value: VisionActivation, hook: HookPoint) -> None:
        """Keeps the new part of a site's activation; called as a hook function that reads."""
        axes = self.sites[hook.name].axes.split()
        axis = next((i for i, name in enumerate(axes) if name in ("pos", "query")), None)
        if axis is not None and self.sites[hook.name].by_prompt:
            self._store_positions(value, hook, axis)
        elif not hook.step:  # without a key-value cache, it is computed again at every step
            kept = each(self._copy, value)
            if hook.call > 0 and self.sites[hook.name].by_image and hook.name in self._parts:
                kept = joined(self._parts[hook.name][0], kept)  # runs once for each image
            self._parts[hook.name] = [kept]

    def _store_positions(self, value: VisionActivation, hook: HookPoint, axis: int) -> None:
        held, keys = hook.positions, hook.key_positions
        n_axes = len(self.sites[hook.name].axes.split())
        if isinstance(value, Tensor) and value.ndim != n_axes:
            raise HookError(
                f"{hook.name} has shape {tuple(value.shape)} in this model, and a cache of a "
                f"generation needs the axes [{self.sites[hook.name].axes}]: the model keeps "
                "several streams there. Leave it out of names_filter."
            )
        if not held or isinstance(value, list):
            raise HookError(
                f"{hook.name} runs on other positions than the prompt's, so those of a generation "
                "are not known. Leave it out of names_filter, or use a hook function, "
                "model.generate(inputs, fwd_hooks=[(name, fn)])."
            )
        made = self._passes.setdefault(hook.name, [])
        start = max(made[-1].positions.stop, held.start) if made else held.start
        if start >= held.stop:
            return
        new = value.narrow(axis, start - held.start, held.stop - start)
        self._parts.setdefault(hook.name, []).append(self._copy(new))
        made.append(Pass(hook.step, range(start, held.stop), keys))

    def _copy(self, x: Tensor) -> Tensor:
        # The memory may be the key-value cache's, or another site's.
        copy = x.detach().clone()
        return copy if self.device is None else copy.to(self.device)

    def cache(self, names: Sequence[str], n_layers: Mapping[str, int]) -> GenerationCache:
        """Returns all that was stored; raises `HookError` where rows were added or left out."""
        found: dict[str, VisionActivation] = {}
        for name in names:
            parts = self._parts.pop(name, None)
            if parts is None:
                continue
            if name not in self._passes:
                found[name] = parts[0]
                continue
            if len({len(part) for part in parts}) > 1:
                raise reordered()
            by_pass = "query" in self.sites[name].axes.split()
            found[name] = parts if by_pass else torch.cat(parts, dim=1)
        return GenerationCache(found, n_layers, self._passes)


def reordered() -> HookError:
    """Returns the error for a generation whose rows are not those of its answers."""
    return HookError(
        "This generation reorders its rows or drops some between steps (beams, candidates of an "
        "assistant), so activations of a row would be of several answers. Use greedy or sampled "
        "decoding, or run the answer again: model.run_with_cache on prompt and answer."
    )


class Fed:
    """The token ids that the passes of a generation were given, each position once."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, Tensor]] = []
        self._stop = 0

    def note(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Notes the arguments of a pass; embeddings have no ids."""
        given = prompts_among(args, kwargs)
        if given is None:
            return
        start = cached_positions(caches_among(args, kwargs))
        stop, first = start + given.shape[1], max(start, self._stop)
        if given.ndim == 2 and first < stop:
            self._parts.append((first, given[:, first - start :].clone()))
        self._stop = max(stop, self._stop)

    def require(self, answer: Tensor) -> None:
        """Raises `HookError` unless each row was given the ids of its answer."""
        # The last token of an answer is never given: the last position is the one before.
        shift = answer.shape[1] - 1 - self._stop
        for first, ids in self._parts:
            begin, end = first + shift, first + shift + ids.shape[1]
            skipped = max(-begin, 0)  # an answer to embeddings begins after the prompt
            given = ids[:, skipped:].cpu()
            if not torch.equal(answer[:, begin + skipped : max(end, 0)].cpu(), given):
                raise reordered()
