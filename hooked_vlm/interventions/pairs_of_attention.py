"""Which queries and keys of one attention an intervention is on, in the forms attentions take.

Queries and keys are places.  In the language model they are positions of prompts, in the vision
encoder patches of images.  An attention shows its matrices `[head, query, key]` by prompt, by
image, or by window; in a layer with a sliding window, or with a key-value cache, its keys are
other positions than its queries.  `Pairs.selected` finds the entries in what is shown.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_vlm.anatomy.devices import sent
from hooked_vlm.errors import InterventionError, UnknownHookError, counted, did_you_mean
from hooked_vlm.hooks.attention import AttentionPart
from hooked_vlm.hooks.hook_point import HookPoint
from hooked_vlm.hooks.located import Located, locate, needs_images, needs_text
from hooked_vlm.hooks.names import resolve_name
from hooked_vlm.hooks.patch_order import VisionActivation, listed
from hooked_vlm.hooks.sites import Site
from hooked_vlm.inputs.rows import prompt_shape
from hooked_vlm.interventions.placing import Places
from hooked_vlm.model.base import HookedModel


def attention_site(model: HookedModel, name: Any, part: AttentionPart) -> Site:
    """Returns the scores or the pattern of an attention module, such as `"blocks.2.attn"`.

    Raises `UnknownHookError` for another name, and `InterventionError` where the model computes no
    scores and pattern that could be written.
    """
    if not isinstance(name, str):
        raise UnknownHookError(
            f"An attention was given as {repr(name)[:80]}; expected its name, such as "
            "'blocks.2.attn' or 'vision_encoder.blocks.0.attn'."
        )
    module = name.removesuffix(".hook_pattern").removesuffix(".hook_attn_scores")
    found = _resolved(model, f"{module}.hook_{part}")
    if found is None:
        raise _no_pattern(model, module)
    if found.read_only:
        raise InterventionError(f"{found.name} cannot be written: {found.read_only}.")
    return found


def _resolved(model: HookedModel, name: str) -> Site | None:
    try:
        return model.sites[resolve_name(name, model.sites)]
    except UnknownHookError:
        return None


def _no_pattern(model: HookedModel, module: str) -> Exception:
    known = [n.removesuffix(".hook_pattern") for n in model.sites if n.endswith(".hook_pattern")]
    if _resolved(model, f"{module}.hook_z") is not None:
        others = f" Attentions with a pattern: {', '.join(known[:4])} …" if known else ""
        return InterventionError(
            f"{module} has no scores and no pattern in this model: it does not use transformers' "
            f"attention interface. Ablate or patch its heads, {module}.hook_z.{others}"
        )
    block, _, leaf = module.rpartition(".")
    if leaf == "attn" and _resolved(model, f"{block}.hook_resid_pre") is not None:
        return InterventionError(
            f"{block} of this model has no attention over positions, so there is no pattern to "
            f"change. Attentions: {', '.join(known[:4]) or 'none'} …"
        )
    hint = did_you_mean(module, known) or f" There are {', '.join(known[:4]) or 'none'} …"
    return UnknownHookError(f"No attention named {module!r} in this model.{hint}")


def reads_encoder(model: HookedModel, site: Site) -> bool:
    """Whether the keys of an attention are an encoder's output, not the prompt."""
    module = site.name.rpartition(".")[0]
    kinds = (model.sites.get(f"{module}.hook_{part}") for part in ("k", "rot_k", "v"))
    return any(kind is not None and "source" in kind.axes for kind in kinds)


def queries_of(places: Places, site: Site, inputs: Mapping[str, Any], at: Any) -> Located | None:
    """Returns where queries are in some inputs; None for all of them."""
    return None if at is None else places.located(_by_row(site, at), inputs, at)


def keys_of(places: Places, site: Site, inputs: Mapping[str, Any], at: Any) -> Located | None:
    """Returns where keys are in some inputs; None for all of them.

    Raises `InterventionError` for a place among keys that are no positions of the prompt.
    """
    if at is None or not reads_encoder(places.model, site):
        return queries_of(places, site, inputs, at)
    config = getattr(places.model.hf_model, "config", None)
    if not getattr(config, "is_encoder_decoder", False):
        raise InterventionError(
            f"The keys of {site.name} are the vision encoder's output and no positions of the "
            f"prompt, so key={at} cannot be found there. Use key=None (all of the images), or a "
            "hook function, fwd_hooks=[(name, fn)]."
        )
    rows = places.rows(inputs, text=needs_text(at), images=needs_images(at))
    return locate(_by_row(site, at), at, rows)  # what its encoder read


def _by_row(site: Site, at: Any) -> Site:
    """Returns a site in whose second axis queries (or keys) are located."""
    if site.axes.startswith("window"):
        raise InterventionError(
            f"{site.name} has axes [{site.axes}]: its windows are no images, so {at} cannot be "
            "found there. Use query=None and key=None, or a hook function."
        )
    rows = "image patch d_vision" if site.by_image else "batch pos d_model"
    return replace(site, axes=rows)


@dataclass(frozen=True, eq=False)
class Pairs:
    """Queries and keys of one attention on some inputs; None is all."""

    site: Site
    inputs: Mapping[str, Any]
    queries: Located | None
    keys: Located | None
    heads: tuple[int, ...] | None
    is_cross: bool

    @property
    def first(self) -> int:
        """The first position that changes."""
        return 0 if self.queries is None or self.site.by_image else self.queries.first

    @cached_property
    def is_doubtful(self) -> bool:
        """Whether no pair can be seen, unless image tokens of the prompt see later ones."""
        if self.queries is None or self.keys is None or self.is_cross:
            return False
        if self.site.by_image:
            return not {i for i, _ in self.queries} & {i for i, _ in self.keys}
        pairs = zip(self.queries, self.keys, strict=True)
        found = [(q, k) for (_, q), (_, k) in pairs if len(q) and len(k)]
        return bool(found) and all(int(q.max()) < int(k.min()) for q, k in found)

    @cached_property
    def _made(self) -> dict[Any, list[Tensor]]:
        return {}

    def selected(
        self, activation: VisionActivation, hook: HookPoint, start: int = 0
    ) -> list[Bool[Tensor, "..."]]:
        """Returns which entries of each tensor shown are selected, in a shape that broadcasts.

        `start` is the first position of queries, where not all of a prompt's are shown.

        Raises `InterventionError` for an activation that is not of these inputs.
        """
        shown = listed(activation)
        sizes = tuple(tuple(x.shape) for x in shown)
        # Rows of windows are the same for images of the same sizes.
        key = sizes, shown[0].device, start, hook.call > 0, hook.positions, hook.key_positions
        if key not in self._made:
            if self.queries is None and self.keys is None:
                made = [torch.ones(1, 1, dtype=torch.bool)] * len(shown)
            elif self.site.by_image:
                made = self._in_images(activation, hook)
            else:
                made = self._in_prompts(shown[0], hook, start)
            self._made[key] = [
                sent(self.of_heads(each, x.shape[-3]), x.device)
                for each, x in zip(made, shown, strict=True)
            ]
        return self._made[key]

    def of_heads(self, selected: Tensor, n_heads: int) -> Bool[Tensor, "*rows head query key"]:
        """Returns `[…, query, key]` with an axis of heads, of size one for all of them."""
        if self.heads is None:
            return selected.unsqueeze(-3)
        heads = torch.zeros(n_heads, 1, 1, dtype=torch.bool)
        heads[list(self.heads)] = True
        return heads & selected.unsqueeze(-3)

    def _in_prompts(self, shown: Tensor, hook: HookPoint, start: int) -> list[Tensor]:
        """Returns `[batch, query, key]`."""
        batch, length = prompt_shape(self.inputs) or (0, 0)
        n_queries, n_keys = shown.shape[-2:]
        fits = (self.is_cross and self.queries is None) or n_queries == length - start
        fits &= not self.is_cross or self.keys is None or n_keys == length
        if shown.ndim != 4 or len(shown) != batch or not fits:
            raise InterventionError(
                f"An intervention at {self.site.name} was made for {counted(batch, 'prompt')} of "
                f"{counted(length, 'position')} and ran on a matrix {tuple(shown.shape)} of axes "
                f"[{self.site.axes}]. Give hooks(…, inputs=…) the inputs that you run. Where a "
                "model's blocks run on other positions than the prompt's, use a hook function."
            )
        queries = _members(self.queries, batch, n_queries, start)
        # Positions of the prompt count from what a cache held before it; a layer with a sliding
        # window may have dropped the first.
        is_known = bool(hook.positions and hook.key_positions) and not self.is_cross
        before = hook.positions.stop - length
        dropped = hook.key_positions.start - before if is_known else 0
        keys = _members(self.keys, batch, n_keys, dropped)
        return [queries[:, :, None] & keys[:, None, :]]

    def _in_images(self, activation: VisionActivation, hook: HookPoint) -> list[Tensor]:
        """Returns `[query, key]` of each matrix, or of all `[image, query, key]`."""
        matrices = list(activation)
        rows = list(hook.rows) if isinstance(activation, list) else []
        if len(rows) != len(matrices):
            rows = [_rows_of_image(i, x.shape[-1]) for i, x in enumerate(matrices)]
        image, place = torch.cat(rows).unbind(-1)
        exists = torch.zeros(int(image.max()) + 1, int(place.max()) + 1, dtype=torch.bool)
        exists[image, place] = True
        queries, keys = (
            self._among(exists, located, hook) for located in (self.queries, self.keys)
        )
        made = []
        for row in rows:
            image, place = row.unbind(-1)
            pairs = queries[image, place][:, None] & keys[image, place]
            made.append(pairs & (image[:, None] == image))
        return made if isinstance(activation, list) else [torch.stack(made)]

    def _among(self, exists: Tensor, located: Located | None, hook: HookPoint) -> Tensor:
        """Returns which rows `[image, place]` of those that exist are located."""
        if located is None:
            return exists
        found = torch.zeros_like(exists)
        for image, rows in located:
            if hook.call > 0 or image >= len(exists):
                raise InterventionError(
                    f"{hook.name} runs once for each image of these inputs, so an intervention "
                    "there cannot tell them apart. Run one image at a time, or use a hook function."
                )
            if int(rows.max()) >= exists.shape[1] or not bool(exists[image, rows].all()):
                n_rows = counted(int(exists[image].sum()), "row")
                raise InterventionError(
                    f"{hook.name} has {n_rows} for an image whose grid has a patch in row "
                    f"{int(rows.max())}: the model merges them before. Use another block of the "
                    "vision encoder, or a hook function here."
                )
            found[image, rows] = True
        return found


def _rows_of_image(image: int, n: int) -> Int[Tensor, "row 2"]:
    return torch.stack([torch.full((n,), image), torch.arange(n)], dim=1)


def _members(located: Located | None, batch: int, n: int, shift: int) -> Bool[Tensor, "batch n"]:
    """Returns which of `n` positions from `shift` on are located, prompt by prompt."""
    if located is None:
        return torch.ones(batch, n, dtype=torch.bool)
    found = torch.zeros(batch, n, dtype=torch.bool)
    for b, positions in located:
        index = positions - shift
        found[b, index[(index >= 0) & (index < n)]] = True
    return found
