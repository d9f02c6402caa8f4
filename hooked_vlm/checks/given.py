"""Checks of what a model may be given: a processor's output, other masks, gradients asked for."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from hooked_vlm.anatomy.parts import first_of
from hooked_vlm.anatomy.source import signature_of
from hooked_vlm.checks.laws import Finding, finding, quiet, writing
from hooked_vlm.errors import HookedVLMError
from hooked_vlm.hooks.names import site_path
from hooked_vlm.hooks.patch_order import listed
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken, TextTokens


def check_own_output(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies that inputs that `prepare` did not make have the same grids, or none, and logits."""
    own = dict(inputs)
    with quiet():
        problems = [] if torch.equal(model(own), model(inputs)) else ["other logits"]
        prepared = [[(g.shape, g.positions) for g in row] for row in model.grids(inputs)]
        try:
            found = [[(g.shape, g.positions) for g in row] for row in model.grids(own)]
        except HookedVLMError as error:
            return finding("own output", problems, note=f"refused: {str(error)[:100]}")
    if not any(found):
        note = "none of the grids" if any(prepared) else "no grid either way"
        return finding("own output", problems, note=note)
    same = len(found) == len(prepared) and all(
        len(one) == len(other)
        and all(a[0] == b[0] and torch.equal(a[1], b[1]) for a, b in zip(one, other, strict=True))
        for one, other in zip(found, prepared, strict=True)
    )
    return finding("own output", problems if same else [*problems, "other grids than prepare's"])


def check_masks(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies that with a mask `[batch, 1, query, key]` hooks act as with one of the prompt."""
    mask = inputs.get("attention_mask")
    if not isinstance(mask, Tensor) or mask.ndim != 2 or "decoder_input_ids" in inputs:
        return Finding("4-D mask", "n/a", "no mask of the prompt")
    length = mask.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    square = {**inputs, "attention_mask": (causal & mask[:, None, None].bool())}
    edit = Ablate(model.cfg.n_layers // 2, at=LastToken())
    with quiet():
        try:
            base = model.hf_model(**square).logits
        except Exception as error:  # noqa: BLE001 - transformers' own forward takes none
            return Finding("4-D mask", "n/a", f"its forward raises {type(error).__name__}")
        names = [n for n in model.hook_names if not n.endswith(("hook_pattern", "attn_scores"))]
        logits, _ = model.run_with_cache(square, names)
        problems = [] if torch.equal(logits, base) else ["reading changes the logits"]
        try:
            found = model.run_with_hooks(square, [edit])
        except HookedVLMError as error:
            return finding("4-D mask", problems, note=f"refused: {str(error)[:100]}")
        last = [(f"blocks.{model.cfg.n_layers // 2}.hook_resid_pre", _without_last)]
        if not torch.equal(found, model.run_with_hooks(square, last)):
            problems.append("LastToken is another position")
    return finding("4-D mask", problems)


def _without_last(x: Tensor, hook: Any) -> Tensor:
    x = x.clone()
    x[:, -1] = 0
    return x


def check_videos(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies that inputs with a video and no image run, and take interventions on positions.

    The video has the patches of the image, as one frame; for models that pack patches.
    """
    config: Any = model.hf_model.config
    image, video = (first_of(config, f"{n}_token_id", f"{n}_token_index") for n in _KINDS)
    names = signature_of(type(model.hf_model).forward).parameters
    if not {"image_grid_thw", "pixel_values"} <= inputs.keys() or video is None:
        return Finding("videos", "n/a", "takes no packed video")
    if "pixel_values_videos" not in names:
        return Finding("videos", "n/a", "takes no packed video")
    filmed = {n.replace("image_grid", "video_grid"): v for n, v in inputs.items()}
    filmed["pixel_values_videos"] = filmed.pop("pixel_values")
    filmed["input_ids"] = torch.where(inputs["input_ids"] == image, video, inputs["input_ids"])
    types = inputs.get("mm_token_type_ids")
    if types is not None:
        filmed["mm_token_type_ids"] = torch.where(types == 1, 2, types)
    edit = Ablate(model.cfg.n_layers // 2, at=LastToken())
    last = [(f"blocks.{model.cfg.n_layers // 2}.hook_resid_pre", _without_last)]
    with quiet():
        try:
            base = model.hf_model(**filmed).logits
        except Exception as error:  # noqa: BLE001 - such as timestamps that the prompt needs
            return Finding("videos", "n/a", f"its forward raises {type(error).__name__}")
        problems = [] if torch.equal(model(filmed), base) else ["forward changes the logits"]
        found = model.run_with_hooks(filmed, [edit])
        if not torch.equal(found, model.run_with_hooks(filmed, last)):
            problems.append("LastToken is another position")
        text = model.run_with_hooks(filmed, [Ablate(0, at=TextTokens())])
        if not torch.allclose(text, model.run_with_hooks(filmed, [_blank(filmed, video)])):
            problems.append("TextTokens are other positions than the prompt's text")
    return finding("videos", problems)


_KINDS = ("image", "video")


def _blank(inputs: Mapping[str, Any], video: int) -> tuple[str, Any]:
    """Returns a hook that zeroes what is no video token."""
    shown = (inputs["input_ids"] == video)[..., None]
    return "blocks.0.hook_resid_pre", lambda x, hook: x * shown


def check_gradients(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies that a gradient asked for inside a hook function arrives, and moves no logit."""
    names = [n for n in model.hook_names if site_path(n).layer in (None, 0)]
    problems: list[str] = []
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain = model(inputs)
        for name in names:
            shown: list[Tensor] = []
            logits = model.run_with_hooks(inputs, [(name, partial(_retain, shown))])
            if not name.endswith(("hook_pattern", "_scores")) and not torch.equal(logits, plain):
                problems.append(f"{name}: asking for a gradient changes the logits")
            if not shown:
                continue  # no gradient flows here
            logits.float().logsumexp(-1).sum().backward()
            arrived = any(x.grad is not None for x in shown)
            if not arrived and _is_on_the_way(model, inputs, name):
                problems.append(f"{name}: a gradient was asked for and did not come")
            model.hf_model.zero_grad(set_to_none=True)
    return finding("gradients", problems)


def _retain(shown: list[Tensor], value: Any, hook: Any) -> None:
    for tensor in listed(value):
        if tensor.requires_grad:
            tensor.retain_grad()
            shown.append(tensor)


def _is_on_the_way(model: HookedVLM, inputs: Mapping[str, Any], name: str) -> bool:
    """Whether something that is added at a site gets a gradient from the logits."""
    added: list[Tensor] = []

    def add(x: Tensor) -> Tensor:
        added.append(torch.zeros_like(x, requires_grad=True))
        return x + added[-1]

    if model.sites[name].read_only:
        return False
    logits = model.run_with_hooks(inputs, [(name, writing(add))])
    logits.float().logsumexp(-1).sum().backward()
    return any(x.grad is not None for x in added)
