"""Tests whose small models or processors cannot be built with older versions of transformers.

The tests build them from transformers' own classes, as they are in the version of
constraints.txt.  An entry is a part of a test's id, the first version that can build it, and why
an older one cannot.  It is about what a test builds, never about what the library computes.
"""

from importlib.metadata import version

import pytest
from packaging.version import Version


NEEDS = (
    ("molmo2", "5.20", "there is no Molmo 2"),
    ("[vision-encoder-decoder", "5.20", "its config has no defaults"),
    ("nothing_comes_between[granite4_vision-False]", "5.20", "its text config misses a field"),
    ("kinds_of_tokens_are_asked_for_where_the_model_takes_them", "5.21", "M-RoPE needs the kinds"),
    ("exceptions_name_what_there_is", "5.23", "the exceptions are listed for 5.23"),
    ("test_a_dozen_families[vipllava]", "5.23", "its small config names layers that it has not"),
    ("test_processor.py::test_each_prompt_gets_its_own_image[got_ocr2]", "5.23", "its processor"),
    ("test_a_processor_that_wants_no_nesting_is_given_none", "5.23", "got_ocr2's processor"),
    ("own_image[kosmos-2", "5.23", "its processor asks its tokenizer for more"),
    ("are_refused[kosmos-2]", "5.23", "its processor asks its tokenizer for more"),
    ("found_by_trying[kosmos-2.5-]", "5.23", "its processor's tokens"),
    ("[mllama-reads the image by cross-attention]", "5.23", "no gradient reaches its pixels"),
    ("test_cross_attention_has_no_position", "5.23", "no gradient reaches mllama's pixels"),
    ("plain_mapping_gets_the_grids_of_prepare[got_ocr2", "5.23", "its processor"),
    ("test_e3_scaled_parts_are_what_is_added", "5.23", "granite4_vision's text config"),
    ("caps_factors_and_biases[granite4_vision]", "5.23", "its text config misses a field"),
    ("whatever_else_is_cached[granite4_vision]", "5.23", "its text config misses a field"),
    ("logits_is_in_the_lens[granite4_vision]", "5.23", "its text config misses a field"),
    ("logits_is_in_the_lens[inkling2]", "5.23", "there is no inkling2"),
    ("starts_from_several_residual_streams", "5.23", "glm5_next scatters with 32-bit indices"),
    ("appended_answers_holds[paligemma]", "5.23", "its steps differ from passes of the whole"),
    ("loaded_and_its_tower_wrapped", "5.18", "AutoImageProcessor needs torchvision"),
    ("without_its_pooler_is_a_warning", "5.18", "AutoImageProcessor needs torchvision"),
)


def skip_what_cannot_be_built(items: list[pytest.Item]) -> None:
    """Marks tests to be skipped under an older transformers than they are written for."""
    here = Version(version("transformers"))
    for item in items:
        for part, first, why in NEEDS:
            if part in item.nodeid and here < Version(first):
                reason = f"transformers {here}, before {first}: {why}"
                item.add_marker(pytest.mark.skip(reason=reason))
