"""Checks of generation: what an intervention on the prompt does to the answer.

It is the same with a key-value cache, without one, with a cache that the generation's config
switches off, and with a prompt that is computed in chunks; and it begins with what one forward
pass gives.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from hooked_vlm.checks.laws import Finding, finding, quiet
from hooked_vlm.errors import GridError, HookedVLMError
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken


STEPS = 3
NEAR: dict[str, Any] = {"atol": 2e-3, "rtol": 2e-3}
"""A pass of one position and one of the whole prompt do the same sums in another order."""


def check_steered(model: HookedVLM, inputs: Mapping[str, Any]) -> Finding:
    """Verifies that edits of the prompt act alike in all ways of generating.

    The edits are an intervention on the last token, one on an image in the vision encoder where
    its grid is known, and a function at all positions of a slot of the language model.
    """
    problems, notes = [], set[str]()
    with quiet():
        plain = _answer(model, inputs)
        for name, edit in _edits(model, inputs):
            try:
                expected = _answer(model, inputs, [edit], prefill_only=True)
            except HookedVLMError as error:
                notes.add(f"{name} is refused: {str(error)[:100]}")
                continue
            if name.startswith("function") and _same(expected, plain):
                problems.append(f"{name}: the edit changes nothing")
            for way, options in _ways().items():
                try:
                    as_plain = _same(_answer(model, inputs, **options), plain)
                except Exception:  # noqa: BLE001 - transformers' own fails this way
                    notes.add(f"cannot generate {way}")
                    continue
                if not as_plain:
                    notes.add(f"gives another answer {way}, without hooks too")
                    continue
                if not _same(
                    _answer(model, inputs, [edit], prefill_only=True, **options), expected
                ):
                    problems.append(f"{name}: another answer {way}")
            # Some models' generate changes the prompt: then a forward pass is of another.
            if _begins(model, inputs, [], plain) and not _begins(model, inputs, [edit], expected):
                problems.append(f"{name}: the answer does not begin as a forward pass does")
    return finding("steered answer", problems, note="; ".join(sorted(notes)))


def _ways() -> dict[str, dict[str, Any]]:
    return {
        "without a cache": {"use_cache": False},
        "with a cache that a config switches off": {
            "generation_config": GenerationConfig(use_cache=False)
        },
    }


def _edits(model: HookedVLM, inputs: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    middle = model.cfg.n_layers // 2
    yield "LastToken", Ablate(middle, at=LastToken())
    yield "function", (f"blocks.{middle}.hook_resid_pre", lambda x, hook: x * 0.5)
    if model.cfg.vision is not None and any(model.grids(inputs)):
        grid = next(grid for row in model.grids(inputs) for grid in row)
        site = f"vision_encoder.blocks.{model.cfg.vision.n_layers // 2}.hook_resid_pre"
        if site in model.sites and len(model.grids(inputs)) == 1:
            yield "image", Ablate(site, at=grid.all())


def greedy(model: HookedVLM) -> dict[str, Any]:
    """Returns the options of a short generation without chance and image tokens, with logits."""
    options: dict[str, Any] = {"max_new_tokens": STEPS, "do_sample": False}
    options |= {"output_logits": True, "return_dict_in_generate": True}
    if model.anatomy.image_token_id is not None:  # a generated one would need an image
        options["suppress_tokens"] = [model.anatomy.image_token_id]
    return options


def _answer(model: HookedVLM, inputs: Mapping[str, Any], hooks: Any = (), **options: Any) -> Any:
    """Returns the logits of each new token, or its id where generation gives no logits."""
    found: Any = model.generate(inputs, fwd_hooks=hooks, **greedy(model), **options)
    logits = getattr(found, "logits", None)
    return found if logits is None else torch.stack(logits)


def _same(one: Any, other: Any) -> bool:
    if not isinstance(one, Tensor) or not one.is_floating_point():
        return torch.equal(getattr(one, "sequences", one), getattr(other, "sequences", other))
    # An answer ends where a sequence does, and logits may be infinite where they are suppressed.
    return one.shape == other.shape and torch.allclose(one, other, equal_nan=True, **NEAR)


def _begins(model: HookedVLM, inputs: Mapping[str, Any], hooks: list, answer: Any) -> bool:
    """Whether the logits of an answer begin with those of one forward pass."""
    if not isinstance(answer, Tensor) or not answer.is_floating_point():
        return False
    once = model.run_with_hooks(inputs, hooks)[:, -1]
    return once.shape == answer[0].shape and torch.allclose(once.float(), answer[0].float(), **NEAR)


def check_chunks(model: HookedVLM) -> Finding:
    """Verifies that hooks act on all chunks of a prompt (of text: images are one chunk)."""
    ids = torch.arange(7, 17, device=model.device)[None] % (model.cfg.d_vocab or 17)
    text = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    chunks: dict[str, Any] = {"prefill_chunk_size": 4}
    with quiet():
        try:
            plain = [_answer(model, text), _answer(model, text, **chunks)]
        except Exception as error:  # noqa: BLE001 - transformers' own fails without hooks too
            return Finding("chunks", "n/a", f"no prefill in chunks: {type(error).__name__}")
        if not _same(*plain):
            return Finding("chunks", "n/a", "transformers' own answer changes with chunks")
        middle = model.cfg.n_layers // 2
        hook = [(f"blocks.{middle}.hook_resid_pre", lambda x, hook: x * 0.5)]
        whole, parts = (
            _answer(model, text, hook, prefill_only=True, **way) for way in ({}, chunks)
        )
        problems = [] if _same(whole, parts) else ["an edit misses chunks of the prompt"]
        if _same(whole, plain[0]):
            problems.append("the edit changes nothing")
        try:
            _answer(model, text, [Ablate(middle, at=LastToken())], **chunks)
            problems.append("an intervention on a prompt in chunks was not refused")
        except HookedVLMError as error:
            if isinstance(error, GridError):
                problems.append(str(error)[:120])
    return finding("chunks", problems)
