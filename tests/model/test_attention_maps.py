"""Attention of tokens of the prompt and of the answer over the image, against cached patterns."""

import warnings
from typing import Any

import numpy as np
import pytest
import torch

from conformance import suite
from helpers.tiny_models import FAMILIES, IMAGE, build, make_inputs, tiny
from hooked_vlm.errors import HookedVLMError, InterventionError, UnknownHookError
from hooked_vlm.interventions.attend import Attend
from hooked_vlm.model.attention_maps import attention_maps
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.regions.positions import LastToken, Positions


pytestmark = pytest.mark.filterwarnings("ignore:Attention scores or patterns")
HOW = {"do_sample": False, "suppress_tokens": [IMAGE]}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_generated_tokens_look_where_they_look_in_one_pass(family: str, use_cache: bool) -> None:
    """In Gemma's sliding layers the image is out of sight, and its keys out of the cache."""
    model, inputs = HookedVLM(build(family)), make_inputs(family, batch=2, text=8)
    grid = model.grids(inputs)[1][0]
    length = inputs["input_ids"].shape[1]
    maps = attention_maps(
        model, inputs, Positions((0, -1)), grid=grid, max_new_tokens=5, use_cache=use_cache, **HOW
    )
    assert maps.dims == ("layer", "query", "head", "row", "col")
    assert maps.shape == (3, 2 + 4, 4, *grid.shape)
    assert maps["query"].values.tolist() == [0, *range(length - 1, length + 4)]
    # The prompt and its answer in one pass.
    ids = model.generate(inputs, max_new_tokens=5, **HOW)
    grown = {**inputs, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in grown:
            grown[name] = (ids == IMAGE).to(grown[name].dtype)
    _, cache = model.run_with_cache(grown, "blocks.*.attn.hook_pattern")
    for layer in range(3):
        pattern = cache["pattern", layer][1]
        expected = pattern[:, maps["query"].values.tolist()][:, :, grid.positions.flatten()]
        expected = expected.transpose(0, 1).unflatten(-1, grid.shape)
        np.testing.assert_allclose(maps.sel(layer=layer), expected, atol=1e-5)
    assert maps.sel(layer=1).sum() > 0


@pytest.mark.filterwarnings("ignore")  # of pictures that a processor resizes
def test_images_in_tiles_and_in_prompts_of_several() -> None:
    model = suite.build("llava_next")
    width, height = suite.image_size(model)
    one, two = suite.picture(2 * width, height), suite.picture(width, height, seed=1)
    inputs = model.prepare([[one, two]], ["Which is larger?"])
    last = inputs["input_ids"].shape[1] - 1
    _, cache = model.run_with_cache(inputs, "blocks.0.attn.hook_pattern")
    row = cache["pattern", 0][0, :, last]
    for grid in inputs.grids[0]:
        for view in (grid, grid.overview):
            if view is None:
                continue
            maps = attention_maps(model, inputs, grid=view, layers=[0])
            expected = row[:, view.positions.flatten()].unflatten(-1, view.shape)
            np.testing.assert_allclose(maps[0, 0], expected, atol=1e-6)


def test_left_padding_and_places() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = suite.build("llava")
        size = suite.image_size(model)
        pictures = [suite.picture(*size, seed=i) for i in range(2)]
        both = model.prepare(pictures, ["Hi", "What is this, and what is it for?"])
        alone = model.prepare(pictures[0], "Hi")
    found = attention_maps(model, both, LastToken(), grid=both.grids[0][0])
    expected = attention_maps(model, alone, LastToken())
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert (found["query"] != expected["query"]).all()


def test_maps_are_read_after_interventions() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    key = model.grids(inputs)[0][0].all()
    cut = Attend("blocks.1.attn", query=LastToken(), key=key, scale=0.0)
    maps = attention_maps(model, inputs, fwd_hooks=[cut])
    assert (maps.sum(("head", "row", "col", "query")) == 0).values.tolist() == [False, True, False]


def test_what_cannot_be_shown() -> None:
    model, inputs = tiny("llava"), make_inputs("llava")
    text = {n: inputs[n][:, -4:] for n in ("input_ids", "attention_mask")}
    cases: list[tuple[Any, dict[str, Any], type[HookedVLMError], str]] = [
        (inputs, {"layers": [3]}, UnknownHookError, "layers"),
        (inputs, {"query": "red"}, InterventionError, "is no place"),
        (inputs, {"max_new_tokens": 3, "num_beams": 2, **HOW}, InterventionError, "num_beams=1"),
        (text, {}, InterventionError, "no image whose tokens form a grid"),
    ]
    for given, options, error, message in cases:
        with pytest.raises(error, match=message):
            attention_maps(model, given, **options)


def test_of_several_images_one_is_named() -> None:
    with pytest.raises(InterventionError, match="have 2 images, and a map is of one"):
        attention_maps(tiny("llava"), make_inputs("llava", batch=2))
