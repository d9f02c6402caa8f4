"""Names: short forms, spellings of others, layers from the end, and what matches nothing."""

import pytest

from helpers.tiny_models import FAMILIES, tiny
from hooked_vlm.errors import UnknownHookError
from hooked_vlm.hooks.names import get_act_name, resolve_name, select_names, slot_name


IN_BLOCK = (
    *("hook_resid_pre", "attn.hook_q", "attn.hook_pattern", "attn.hook_z", "hook_attn_out"),
    *("hook_resid_mid", "mlp.hook_pre", "hook_mlp_out", "hook_resid_post"),
)
KNOWN = [
    "hook_embed",
    *(
        f"{tower}blocks.{layer}.{site}"
        for tower, n_layers in (("vision_encoder.", 2), ("", 3))
        for layer in range(n_layers)
        for site in IN_BLOCK
    ),
    "vision_projector.hook_out",
    "ln_final.hook_normalized",
    "hook_logits",
]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (("resid_post", 3), "blocks.3.hook_resid_post"),
        (("resid_post", -1), "blocks.-1.hook_resid_post"),
        (("hook_resid_post", 3), "blocks.3.hook_resid_post"),
        (("k6",), "blocks.6.attn.hook_k"),
        (("k6", None, "vision"), "vision_encoder.blocks.6.attn.hook_k"),
        (("scale4ln1", None, "ln2"), "blocks.4.ln1.hook_scale"),
        (("attn", 2), "blocks.2.attn.hook_pattern"),
        (("scale4ln1",), "blocks.4.ln1.hook_scale"),
        (("normalized", 1, "ln2"), "blocks.1.ln2.hook_normalized"),
        (("normalized",), "ln_final.hook_normalized"),
        (("post", 0), "blocks.0.mlp.hook_post"),
        (("mlp_post", 0), "blocks.0.mlp.hook_post"),
        (("attn_out", 1), "blocks.1.hook_attn_out"),
        (("pattern", 0, "vision_encoder"), "vision_encoder.blocks.0.attn.hook_pattern"),
        (("resid_pre", 0, "vision"), "vision_encoder.blocks.0.hook_resid_pre"),
        (("out", None, "vision_projector"), "vision_projector.hook_out"),
        (("embed",), "hook_embed"),
        (("blocks.1.hook_mlp_out",), "blocks.1.hook_mlp_out"),
    ],
)
def test_get_act_name(given, expected):
    assert get_act_name(*given) == expected


@pytest.mark.parametrize(
    ("spelling", "site"),
    [
        ("blocks.0.hook_in", "blocks.0.hook_resid_pre"),
        ("blocks.2.hook_out", "blocks.2.hook_resid_post"),
        ("blocks.1.ln2.hook_in", "blocks.1.hook_resid_mid"),
        ("blocks.1.attn.hook_out", "blocks.1.hook_attn_out"),
        ("blocks.1.mlp.hook_out", "blocks.1.hook_mlp_out"),
        ("blocks.1.attn.q.hook_out", "blocks.1.attn.hook_q"),
        ("blocks.1.attn.o.hook_in", "blocks.1.attn.hook_z"),
        ("vision_encoder.encoder_layers.1.hook_in", "vision_encoder.blocks.1.hook_resid_pre"),
        ("embed.hook_out", "hook_embed"),
        ("unembed.hook_out", "hook_logits"),
        ("ln_final.hook_out", "ln_final.hook_normalized"),
        ("blocks.-1.hook_resid_post", "blocks.2.hook_resid_post"),
        ("vision_encoder.blocks.-2.attn.hook_q", "vision_encoder.blocks.0.attn.hook_q"),
    ],
)
def test_other_spellings_of_the_same_place(spelling, site):
    assert resolve_name(spelling, KNOWN) == site


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("blocks.1.hook_resid_mide", r"Did you mean 'blocks\.1\.hook_resid_mid'"),
        ("blocks.3.hook_resid_pre", r"layer 3 is out of range, blocks has layers 0 to 2"),
        ("blocks.-4.hook_resid_pre", r"layer -4 is out of range"),
        ("vision_encoder.blocks.2.attn.hook_q", r"vision_encoder\.blocks has layers 0 to 1"),
        ("zzz", r"See model\.hook_dict"),
    ],
)
def test_unknown_names_say_what_is_near(name, text):
    with pytest.raises(UnknownHookError, match=text):
        resolve_name(name, KNOWN)


def test_vision_names_without_a_vision_encoder():
    known = [name for name in KNOWN if not name.startswith("vision")]
    for name in ("vision_encoder.blocks.0.hook_resid_pre", "vision_projector.hook_out"):
        with pytest.raises(UnknownHookError, match="no vision encoder"):
            resolve_name(name, known)


def test_filters_keep_the_models_order():
    pair = ["blocks.2.hook_resid_post", "blocks.0.hook_resid_pre"]
    assert select_names(pair, KNOWN) == pair[::-1]
    assert select_names(None, KNOWN) == KNOWN
    assert select_names("hook_embed", KNOWN) == ["hook_embed"]
    assert select_names(lambda name: name.endswith("logits"), KNOWN) == ["hook_logits"]


def test_patterns_select_one_tower():
    # `blocks.*` must not reach the vision encoder's blocks.
    found = select_names("blocks.*.hook_resid_post", KNOWN)
    assert found == [f"blocks.{layer}.hook_resid_post" for layer in range(3)]
    assert len(select_names("vision_encoder.blocks.*.hook_resid_post", KNOWN)) == 2
    assert len(select_names("*hook_resid_post", KNOWN)) == 5


@pytest.mark.parametrize(
    ("names_filter", "text"),
    [
        ("blocks.*.hook_resid_pots", "matches none .* Did you mean"),
        (["hook_embed", "blocks.*.nothing"], "matches none"),
        ([], "names no site"),
        (lambda name: False, "selects none"),
        (["hook_embed", "hook_embde"], "Did you mean 'hook_embed'"),
    ],
)
def test_filters_that_select_nothing(names_filter, text):
    with pytest.raises(UnknownHookError, match=text):
        select_names(names_filter, KNOWN)


def test_slots():
    assert slot_name(0, 3) == "blocks.0.hook_resid_pre"
    assert slot_name(3, 3) == "blocks.2.hook_resid_post"
    assert slot_name(-1, 3, "vision_encoder") == "vision_encoder.blocks.2.hook_resid_post"
    assert slot_name(-4, 3) == "blocks.0.hook_resid_pre"
    for slot in (4, -5):
        with pytest.raises(UnknownHookError, match="slots 0 to 3"):
            slot_name(slot, 3)


@pytest.mark.parametrize("family", FAMILIES)
def test_short_names_reach_the_sites_of_real_models(family):
    sites = tiny(family).sites
    for tower in (None, "vision_encoder"):
        for short in ("resid_pre", "q", "k", "v", "z", "pattern", "attn_scores", "attn_out", "pre"):
            assert get_act_name(short, 1, tower) in sites
