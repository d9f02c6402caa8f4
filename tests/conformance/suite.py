"""Every architecture against every law, one architecture at a time.

For each model type a tiny random model is built with its own processor, wrapped, and held
to the laws of `hooked_vlm.checks.laws`, on inputs that `prepare` made: one prompt with one image,
two prompts of different lengths, two images in a prompt, an image in one prompt of two, and
no image at all.  What an architecture cannot have is said as such, with the reason.
"""

import copy
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image

from conformance import exceptions
from conformance.processors import tiny_processor
from conformance.tiny import tiny_config, tiny_model
from hooked_vlm.checks import given, laws
from hooked_vlm.checks.answers import check_chunks, check_steered
from hooked_vlm.checks.attend import check_attend
from hooked_vlm.checks.attribution import check_attribution
from hooked_vlm.checks.backward import check_backward
from hooked_vlm.checks.decomposition import check_decomposition
from hooked_vlm.checks.laws import NO, NONE, YES, Finding
from hooked_vlm.checks.lens import check_lens
from hooked_vlm.checks.on_request import check_on_request
from hooked_vlm.checks.places import check_append
from hooked_vlm.checks.sweep import check_sweep
from hooked_vlm.errors import GridError, HookedVLMError, HookError
from hooked_vlm.inputs.pixel_routing import measure_routes, pixel_name
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken


LAWS = (
    "wraps",
    "parity",
    "fires",
    *laws.SITE_GROUPS,
    "residual",
    "decomposition",
    "patterns",
    "grid",
    "pixels",
    "wide image",
    "generate",
    "steered answer",
    "chunks",
    "start layer",
    "lens",
    "attribution",
    "attend",
    "append",
    "on request",
    "sweep",
    "padding",
    "images",
    "mixed batch",
    "own output",
    "videos",
    "4-D mask",
    "gradients",
    "backward",
    "bf16",
)
"""The columns of the table, in order."""


@dataclass
class Row:
    """What was found on one architecture."""

    model_type: str
    findings: dict[str, Finding] = field(default_factory=dict)
    reason: str = ""
    """Why it is no vision-language model of the kind that can be wrapped, if it is none."""
    seconds: float = 0.0

    @property
    def served(self) -> bool:
        """Whether every law that applies holds, or is broken for a reason that is known."""
        broken = {law for law, finding in self.findings.items() if finding.verdict == NO}
        broken -= {law for name, law in exceptions.EXCEPT if name == self.model_type}
        return bool(not self.reason and not broken and self.findings)


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Returns a picture of noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def build(model_type: str, attn: str = "sdpa") -> HookedVLM:
    """Returns a wrapped tiny model of an architecture, with its processor."""
    config = tiny_config(model_type)
    processor = tiny_processor(model_type, config)
    return HookedVLM(tiny_model(model_type, config, attn), processor, name=f"tiny {model_type}")


def image_size(model: HookedVLM) -> tuple[int, int]:
    """Returns the width and height of pictures that the model's processor need not resize."""
    vision = model.cfg.vision
    assert vision is not None
    side = vision.image_size or 4 * (vision.patch_size or 14) * max(vision.merge, 2)
    return side, side


def check(model_type: str) -> Row:
    """Returns what holds for one architecture."""
    row, start = Row(model_type), time.perf_counter()
    row.reason = exceptions.NOT_SERVED.get(model_type, "")
    if not row.reason:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            _fill(row)
    row.seconds = time.perf_counter() - start
    return row


def _fill(row: Row) -> None:
    try:
        model = build(row.model_type)
        if model.anatomy.vision is None:
            row.reason = "has no image encoder of its own"
            return
        size = image_size(model)
        inputs = model.prepare([picture(*size)], "What is this?")
        _lengthen(inputs)
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding
        row.findings["wraps"] = Finding("wraps", NO, _short(error))
        return
    row.findings["wraps"] = Finding("wraps", YES, f"{len(model.sites)} sites")
    checks: dict[str, Callable[[], Finding]] = {
        "parity": partial(laws.check_parity, model, inputs),
        "fires": partial(laws.check_fires, model, inputs),
        **{g: partial(laws.check_sites, model, inputs, g) for g in laws.SITE_GROUPS},
        "residual": partial(laws.check_residual, model, inputs),
        "decomposition": partial(check_decomposition, model, inputs),
        "patterns": partial(laws.check_patterns, model, inputs),
        "grid": partial(laws.check_grid, model, inputs),
        "pixels": partial(check_pixels, model, size),
        "wide image": partial(check_wide, model, size),
        "generate": partial(laws.check_generate, model, inputs),
        "steered answer": partial(check_steered, model, inputs),
        "chunks": partial(check_chunks, model),
        "start layer": partial(laws.check_start_layer, model, inputs),
        "lens": partial(check_lens, model, inputs),
        "attribution": partial(check_attribution, model, inputs),
        "attend": partial(check_attend, model, inputs),
        "append": partial(check_append, model, inputs),
        "on request": partial(check_on_request, model, inputs),
        "sweep": partial(_sweep, model, inputs, size),
        "padding": partial(check_padding, model, size),
        "images": partial(check_images, model, size),
        "mixed batch": partial(check_mixed, model, size),
        "own output": partial(given.check_own_output, model, inputs),
        "videos": partial(given.check_videos, model, inputs),
        "4-D mask": partial(given.check_masks, model, inputs),
        "gradients": partial(given.check_gradients, model, inputs),
        "backward": partial(check_backward, model, inputs),
        "bf16": partial(check_bf16, model, inputs),
    }
    for name, run in checks.items():
        row.findings[name] = _run(name, run)


def _lengthen(inputs: Any) -> None:
    """Gives a decoder that starts from one token two more: one alone attends to nothing else."""
    start = inputs.tensors.get("decoder_input_ids")
    if start is not None and start.shape[1] == 1:
        inputs.tensors["decoder_input_ids"] = torch.cat([start, start + 5, start + 6], dim=1)


def _sweep(model: HookedVLM, inputs: Any, size: tuple[int, int]) -> Finding:
    source = model.prepare([picture(*size, seed=1)], "What is this?")
    _lengthen(source)
    for prompts in (inputs, source):
        prompts.tensors.pop("labels", None)
    found = check_sweep(model, inputs, source)
    if found.verdict != YES:
        return found
    return _with_questions(model, size, found)


def _with_questions(model: HookedVLM, size: tuple[int, int], found: Finding) -> Finding:
    """Adds what sweeps do whose prompts ask two questions about one image."""
    asked = ["What?", "Where is"]
    try:
        pairs = [model.prepare([picture(*size, seed=seed)] * 2, asked) for seed in (0, 1)]
    except HookedVLMError as error:
        return replace(found, note=f"{found.note}; no two prompts: {_short(error)}")
    for prompts in pairs:
        prompts.tensors.pop("labels", None)
    try:
        more = check_sweep(model, *pairs, every=False, logits_to_keep=1)
    except HookError:  # not every model takes that keyword
        more = check_sweep(model, *pairs, every=False)
    if more.verdict == NO:
        return replace(more, note=f"two questions about an image: {more.note}")
    rows = "one row" if "2 prompts in 1 row" in more.note else "a row each"
    return replace(found, note=f"{found.note}; two questions about an image: {rows}")


def _run(name: str, run: Callable[[], Finding]) -> Finding:
    try:
        return run()
    except Exception as error:  # noqa: BLE001 - whatever goes wrong is the finding
        return Finding(name, NO, _short(error))


def _short(error: Exception) -> str:
    place = traceback.extract_tb(error.__traceback__)[-1]
    text = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {text[0][:200]} ({place.name}:{place.lineno})"


def check_pixels(model: HookedVLM, size: tuple[int, int]) -> Finding:
    """Changing the pixels of one cell changes what its own visual token is made of, most of all."""
    image = picture(*size)
    inputs = model.prepare([image], "What is this?")
    if inputs.no_grid:
        return Finding("pixels", NONE, "no grid")
    grid = inputs.grid
    try:
        routes = measure_routes(model, inputs)
    except GridError as error:
        return Finding("pixels", NONE, str(error))
    name = pixel_name(inputs)
    problems = []
    for row, col in {(0, 0), (0, grid.cols - 1), (grid.rows - 1, 0), (grid.rows // 2, 0)}:
        try:
            x0, y0, x1, y1 = (round(v) for v in grid.cell_box((row, col)))
        except GridError:
            continue  # it shows only padding
        pixels = np.array(image)
        pixels[y0:y1, x0:x1] ^= 255
        changed = model.prepare([Image.fromarray(pixels)], "What is this?")[name]
        moved = (changed.double() - inputs[name].double()).abs()
        reached = routes.pixels.clamp(min=0)
        totals = torch.zeros(inputs["input_ids"].numel(), dtype=torch.float64)
        totals.index_add_(0, reached.flatten(), moved.flatten() * (routes.pixels >= 0).flatten())
        only = [int(grid.positions[row, col])]
        if grid.overview is not None:  # the thumbnail shows it too
            region = grid.overview.box(x0, y0, x1, y1)
            totals[region.positions(grid.overview)] = 0
        if [int(totals.argmax())] != only:
            problems.append(f"cell {(row, col)} moves position {int(totals.argmax())}, not {only}")
    return laws.finding("pixels", problems)


def check_wide(model: HookedVLM, size: tuple[int, int]) -> Finding:
    """A picture twice as wide as high, which many cut into tiles: its grid and its pixels."""
    wide = 2 * size[0], size[1]
    inputs = model.prepare([picture(*wide)], "What is this?")
    found = [laws.check_parity(model, inputs), laws.check_grid(model, inputs)]
    if found[1].verdict != NONE:
        found.append(check_pixels(model, wide))
    problems = [finding.note for finding in found if finding.verdict == NO]
    if not problems and found[1].verdict == NONE:
        return Finding("wide image", NONE, found[1].note)
    overview = any(grid.overview for row in inputs.grids for grid in row)
    note = found[1].note + (" and a thumbnail" if overview else "")
    return laws.finding("wide image", problems, note=note)


def check_padding(model: HookedVLM, size: tuple[int, int]) -> Finding:
    """Two prompts of different lengths in one batch give the logits that each gives alone."""
    images = [picture(*size, seed=1), picture(*size, seed=2)]
    texts = ["Hi", "What is this, and what is it for?"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        both = model.prepare(images, texts)
    if any("from the start of the padding" in str(warning.message) for warning in said):
        return Finding("padding", NONE, "positions count from the padding: prepare warns")
    logits = model(both)
    problems = []
    for i, (image, text) in enumerate(zip(images, texts, strict=True)):
        alone = model(model.prepare([image], text))[0, -1]
        gap = float((logits[i, -1] - alone).abs().max())
        if gap > 2e-3 * max(1.0, float(alone.abs().max())):
            problems.append(f"prompt {i} is off by {gap:.1e}")
    return laws.finding("padding", problems)


def check_images(model: HookedVLM, size: tuple[int, int]) -> Finding:
    """Two images in a prompt, an image in one prompt of two, one repeated, and none at all."""
    one, two = picture(*size, seed=1), picture(*size, seed=2)
    cases: dict[str, Callable[[], Any]] = {
        "text only": lambda: model.prepare(None, "What is this?"),
        "two images": lambda: model.prepare([[one, two]], ["Which is larger?"]),
        "an image repeated": lambda: model.prepare([one, one], ["Here", "And here"]),
        "an image in one of two": lambda: model.prepare([one, None], ["Here", "Nothing here"]),
    }
    problems, notes = [], []
    for name, make in cases.items():
        try:
            inputs = make()
            model.hf_model(**inputs)
        except Exception as error:  # noqa: BLE001 - many processors refuse some of these
            notes.append(f"no {name}: {type(error).__name__}")
            if isinstance(error, GridError):
                problems.append(f"{name}: {_short(error)}")
            continue
        problems += [f"{name}: {f.note}" for f in _few_laws(model, inputs) if f.verdict == NO]
    return laws.finding("images", problems, note="; ".join(notes))


def check_mixed(model: HookedVLM, size: tuple[int, int]) -> Finding:
    """An image in one prompt of two: each row gives the logits that its prompt gives alone."""
    image, texts = picture(*size, seed=1), ["What is this?", "Hi"]
    edit = Ablate(model.cfg.n_layers // 2, at=LastToken())
    problems, note = [], ""
    for images in ([image, None], [None, image]):
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                both = model.prepare(images, texts)
            alone = [model.prepare(each, text) for each, text in zip(images, texts, strict=True)]
        except Exception as error:  # noqa: BLE001 - many processors refuse it, or we for them
            return Finding("mixed batch", NONE, _short(error))
        try:
            plain = [model.hf_model(**inputs).logits[0, -1] for inputs in alone]
            model.hf_model(**both)
        except Exception as error:  # noqa: BLE001 - many models refuse it
            return Finding("mixed batch", NONE, _short(error))
        if any("from the start of the padding" in str(warning.message) for warning in said):
            return Finding("mixed batch", NONE, "positions count from the padding: prepare warns")
        compared = [("", model(both), plain)]
        try:
            edited = [model.run_with_hooks(inputs, [edit])[0, -1] for inputs in alone]
            compared.append((", edited,", model.run_with_hooks(both, [edit]), edited))
        except HookedVLMError as error:
            note = f"LastToken is refused: {str(error)[:100]}"
        for what, logits, expected in compared:
            for i, row in enumerate(expected):
                gap = float((logits[i, -1] - row).abs().max())
                if not gap <= 2e-3 * max(1.0, float(row.abs().max())):
                    kind = "no image" if images[i] is None else "an image"
                    problems.append(f"the prompt with {kind}{what} is off by {gap:.1e}")
    return laws.finding("mixed batch", problems, note=note)


def _few_laws(model: HookedVLM, inputs: Any) -> list[Finding]:
    found = [laws.check_parity(model, inputs)]
    if any(inputs.grids):
        found.append(laws.check_grid(model, inputs))
    return found


def check_bf16(model: HookedVLM, inputs: Any) -> Finding:
    """In bfloat16 the laws of reading and writing hold as well, and nothing changes its dtype."""
    half = HookedVLM(copy.deepcopy(model.hf_model).to(torch.bfloat16), model.processor)
    cast = {
        n: v.to(torch.bfloat16) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for n, v in inputs.items()
    }
    try:
        half.hf_model(**cast)
    except Exception as error:  # noqa: BLE001 - then there is nothing to compare with
        return Finding("bf16", NONE, f"transformers' own forward raises {type(error).__name__}")
    problems = [f.note for f in [laws.check_parity(half, cast)] if f.verdict == NO]
    for name in ("blocks.0.hook_resid_post", "vision_encoder.blocks.0.hook_resid_post"):
        if name in half.sites:
            problems += list(laws.check_site(half, cast, name))
    return laws.finding("bf16", problems)
