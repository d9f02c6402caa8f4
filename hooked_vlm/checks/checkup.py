"""Runs all checks on one model: `hooked-vlm check MODEL`.

The checks are those of `laws`, on an image of noise and a short prompt prepared by the model's
own processor, and a sweep with every engine.  By default, sites are written in the first,
middle and last block of each tower, where errors in the detected anatomy appear.  With
`every_layer`, all blocks are written.
"""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image

from hooked_vlm.checks import given, laws
from hooked_vlm.checks.answers import check_chunks, check_steered
from hooked_vlm.checks.attend import check_attend
from hooked_vlm.checks.attribution import check_attribution
from hooked_vlm.checks.backward import check_backward
from hooked_vlm.checks.decomposition import check_decomposition
from hooked_vlm.checks.laws import NO, Finding
from hooked_vlm.checks.lens import check_lens
from hooked_vlm.checks.on_request import check_on_request
from hooked_vlm.checks.places import check_append
from hooked_vlm.checks.sweep import check_sweep
from hooked_vlm.hooks.names import site_path
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.model.vlm import HookedVLM


QUESTION = "What is this?"


def check_model(model: HookedVLM, every_layer: bool = False) -> Iterator[Finding]:
    """Yields the finding of each check as soon as it is done.

    Raises `UnsupportedModelError` for a model without a vision encoder or a processor.
    """
    vision = model.require_vision()
    side = vision.image_size or 4 * (vision.patch_size or 14) * max(vision.merge, 2)
    inputs, source = (_prepared(model, side, seed) for seed in (0, 1))
    with model.eager():  # runs without hooks are compared with runs under hooks
        yield from _findings(model, inputs, source, every_layer)


def _findings(
    model: HookedVLM, inputs: Inputs, source: Inputs, every_layer: bool
) -> Iterator[Finding]:
    yield _safely(laws.check_parity, "parity", model, inputs)
    yield _safely(laws.check_fires, "fires", model, inputs)
    for group in laws.SITE_GROUPS:
        names = laws.group_of(model, group)
        names = names if every_layer else [n for n in names if _is_representative(model, n)]
        yield laws.check_sites(model, inputs, group, names)
    for name, law in (
        ("residual", laws.check_residual),
        ("decomposition", check_decomposition),
        ("patterns", laws.check_patterns),
        ("grid", laws.check_grid),
        ("generate", laws.check_generate),
        ("steered answer", check_steered),
        ("start layer", laws.check_start_layer),
        ("lens", check_lens),
        ("attribution", check_attribution),
        ("attend", check_attend),
        ("append", check_append),
        ("on request", check_on_request),
        ("own output", given.check_own_output),
        ("videos", given.check_videos),
        ("4-D mask", given.check_masks),
        ("gradients", given.check_gradients),
        ("backward", check_backward),
    ):
        yield _safely(law, name, model, inputs)
    yield _safely(check_chunks, "chunks", model)
    yield _safely(check_sweep, "sweep", model, inputs, source, every_layer)


def _prepared(model: HookedVLM, side: int, seed: int) -> Inputs:
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return model.prepare([Image.fromarray(pixels)], QUESTION)


def _safely(law: Callable[..., Finding], name: str, model: HookedVLM, *given: Any) -> Finding:
    """Returns the finding of a check; an error is a finding too and does not end the run."""
    try:
        return law(model, *given)
    except Exception as error:  # noqa: BLE001 - any error of the model is the finding
        said = (str(error).splitlines() or [""])[0]
        return Finding(name, NO, f"{type(error).__name__}: {said[:200]}")


def _is_representative(model: HookedVLM, name: str) -> bool:
    path = site_path(name)
    if path.layer is None:
        return True
    sizes = model.cfg.vision if path.is_vision else model.cfg
    assert sizes is not None
    last = sizes.n_layers - 1
    return path.layer in {0, last // 2, last}
