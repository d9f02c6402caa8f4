"""Two questions, one row: the same answers as with a row for each prompt."""

import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlavaForConditionalGeneration

from conformance.suite import build as conforming
from conformance.suite import image_size, picture
from helpers.growing_sweeps import BOUND, make_region
from helpers.questions import ask
from helpers.tiny_models import FAMILIES, IMAGE, build, tiny
from hooked_vlm import HookedVLM, LastToken, Patch, Sweep, shared_runs
from hooked_vlm.engine import folded_run
from hooked_vlm.engine.folded_run import expected_fold, separate_prompts
from hooked_vlm.engine.folding import Layout
from hooked_vlm.engine.proofs import forget
from hooked_vlm.errors import HookedVLMWarning
from hooked_vlm.interventions.ablate import Ablate
from hooked_vlm.interventions.steer import Steer


LENGTHS = [[5, 7], [5, 7], [6]]
COMMON = "5 prompts in 3 rows"


def sweep_of(family: str, inputs: Any, source: Any, kinds: list[str] | None = None) -> Sweep:
    region = make_region(family)
    kinds = kinds or ["region", "last", "zero", "steer"]

    def make(kind: str, slot: int) -> Any:
        return {
            "region": lambda: Patch(slot, at=region, source=source),
            "last": lambda: Patch(slot, at=LastToken(), source=source),
            "zero": lambda: Ablate(slot, at=region),
            "steer": lambda: Steer(slot, at=region, directions=torch.ones(48), alpha=2.0),
        }[kind]()

    return Sweep(inputs, {"kind": kinds, "slot": [0, 1, 2, 3]}, make)


def logits_of(model: HookedVLM, sweep: Sweep, **kwargs: Any) -> Any:
    return sweep.run(model, lambda x: x[:, -1], dims=("batch", "token"), **kwargs)


def check(model: HookedVLM, sweep: Sweep, **kwargs: Any) -> str:
    """Checks a sweep's logits against plain passes; returns how they were made."""
    plain = logits_of(model, sweep, engine="plain", **kwargs)
    found = logits_of(model, sweep, **kwargs)
    assert float(abs(found - plain).max()) <= BOUND * float(abs(plain).max())
    return found.attrs["engine"]


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_questions_about_an_image_share_a_row(family: str, attn: str) -> None:
    model = tiny(family, attn)
    sweep = sweep_of(family, ask(family, LENGTHS, seed=1), ask(family, LENGTHS, seed=2))
    for kept in (1, 5):
        assert COMMON in check(model, sweep, logits_to_keep=kept)
    with warnings.catch_warnings():
        # What padding gives is asked for, too: with eager attention it is the mean of all
        # positions, later ones included, so that no growing pass may give it.
        warnings.simplefilter("ignore", HookedVLMWarning)
        assert COMMON not in check(model, sweep)
    even = [[5, 5], [5, 5], [5]]
    sweep = sweep_of(family, ask(family, even, seed=1), ask(family, even, seed=2))
    assert COMMON in check(model, sweep)
    with separate_prompts(model):
        assert COMMON not in logits_of(model, sweep).attrs["engine"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_with_images_of_their_own_do_not(family: str) -> None:
    source = ask(family, LENGTHS, seed=2)
    sweep = sweep_of(family, ask(family, LENGTHS, seed=1, same=False), source)
    assert "prompts in" not in check(tiny(family), sweep, logits_to_keep=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_cells_that_treat_the_prompts_of_an_image_differently_keep_their_rows(family: str) -> None:
    # Sources with an image for each prompt write other values for each.
    source = ask(family, LENGTHS, seed=2, same=False)
    sweep = sweep_of(family, ask(family, LENGTHS, seed=1), source, ["region", "zero"])
    said = check(tiny(family), sweep, logits_to_keep=1)
    assert COMMON in said  # those that ablate
    alone = sweep_of(family, ask(family, LENGTHS, seed=1), source, ["region"])
    found = check(tiny(family), alone, logits_to_keep=1)
    assert "prompts in" not in found


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(FAMILIES),
    st.lists(st.lists(st.integers(1, 8), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(0, 5),
)
def test_any_questions_are_answered_as_in_prompts_of_their_own(
    family: str, lengths: list[list[int]], seed: int
) -> None:
    sweep = sweep_of(family, ask(family, lengths, seed), ask(family, lengths, seed + 50))
    check(tiny(family), sweep, logits_to_keep=1)


@pytest.mark.parametrize("family", FAMILIES)
def test_runs_that_sweeps_share_are_those_of_common_rows(family: str) -> None:
    model = tiny(family)
    inputs, source = ask(family, LENGTHS, seed=1), ask(family, LENGTHS, seed=2)
    sweep = sweep_of(family, inputs, source)
    plain = logits_of(model, sweep, engine="plain")
    with shared_runs(model) as runs:
        for _ in range(2):
            found = logits_of(model, sweep, logits_to_keep=1)
            assert COMMON in found.attrs["engine"]
            assert float(abs(found - plain).max()) <= BOUND * float(abs(plain).max())
    assert runs.reused


def test_a_block_without_common_rows_takes_no_runs_that_had_them() -> None:
    model = tiny("llava")
    sweep = sweep_of("llava", ask("llava", LENGTHS, seed=1), ask("llava", LENGTHS, seed=2))
    with shared_runs(model):
        assert COMMON in logits_of(model, sweep, logits_to_keep=1).attrs["engine"]
        with separate_prompts(model):
            assert COMMON not in logits_of(model, sweep, logits_to_keep=1).attrs["engine"]
        assert COMMON in logits_of(model, sweep, logits_to_keep=1).attrs["engine"]


@pytest.mark.parametrize("positions", [[46], [0, 46], [1]])
def test_logits_may_be_asked_for_by_position(positions: list[int]) -> None:
    sweep = sweep_of("llava", ask("llava", LENGTHS, seed=1), ask("llava", LENGTHS, seed=2))
    kept = torch.tensor(positions)
    check(tiny("llava"), sweep, logits_to_keep=kept)
    assert "share rows" not in str(sweep.plan(tiny("llava")).explain(logits_to_keep=kept))


def test_a_model_whose_image_sees_the_question_keeps_its_rows() -> None:
    model = HookedVLM(build("gemma-3"), name="an image that sees the question")
    inputs, source = ask("gemma-3", LENGTHS, seed=1), ask("gemma-3", LENGTHS, seed=2)
    for given_inputs in (inputs, source):
        # One block from the image to the end: all of it sees all of it.
        first = (given_inputs["input_ids"] == IMAGE).int().argmax(1).max()
        given_inputs["token_type_ids"] = given_inputs["attention_mask"].int()
        given_inputs["token_type_ids"][:, :first] = 0
    assert "prompts in" not in check(
        model, sweep_of("gemma-3", inputs, source, ["region"]), logits_to_keep=1
    )


def test_a_pass_is_not_made_twice_where_its_first_block_tells(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own, passes = LlavaForConditionalGeneration.forward, []

    def counted(*args: Any, **kwargs: Any) -> Any:
        passes.append(kwargs)
        return own(*args, **kwargs)

    inputs, source = (ask("llava", [[5, 7], [5, 7]], seed=i) for i in (1, 2))
    del inputs["position_ids"], source["position_ids"]  # positions count the padding
    sweep, model = sweep_of("llava", inputs, source, ["region"]), tiny("llava")
    logits_of(model, sweep, logits_to_keep=1)
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", counted)
    logits_of(model, sweep, logits_to_keep=1)
    n_tried = len(passes)
    with separate_prompts(model):
        logits_of(model, sweep, logits_to_keep=1)
    assert n_tried == len(passes) - n_tried


def test_positions_that_count_the_padding_are_not_shared() -> None:
    inputs, source = (ask("llava", [[5, 7], [5, 7]], seed=i) for i in (1, 2))
    del inputs["position_ids"], source["position_ids"]
    sweep = sweep_of("llava", inputs, source, ["region"])
    assert "prompts in" not in check(tiny("llava"), sweep, logits_to_keep=1)


def test_images_that_differ_only_in_what_later_blocks_are_given_are_not_shared() -> None:
    # DeepStack: features of the encoder's own are added after the first blocks.
    model = conforming("qwen3_vl")
    a, b = (picture(*image_size(model), seed=i) for i in range(2))
    questions = ["Is A left of B?", "Is A above B of it?"]

    def sweep(pictures: list[Any]) -> Sweep:
        return Sweep(
            model.prepare(pictures, questions),
            {"slot": [1, 2], "at": [LastToken(), None]},
            lambda slot, at: Ablate(slot, at=at),
            base=[Ablate("vision_projector.hook_out")],
        )

    assert "2 prompts in 1 row" in check(model, sweep([a, a]), logits_to_keep=1)
    assert "prompts in" not in check(model, sweep([a, b]), logits_to_keep=1)


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_functions_may_read_padding(family: str, attn: str) -> None:
    inputs = ask(family, [[2, 12], [2, 12], [6]], seed=1)
    assert not inputs["attention_mask"][:, 0].all()

    def adds_first(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return torch.cat([x[:, :-1], x[:, -1:] + x[:, :1]], dim=1)

    sites = [f"blocks.{i}.hook_resid_pre" for i in range(3)]
    sweep = Sweep(inputs, {"site": sites}, lambda site: (site, adds_first))
    assert COMMON in check(tiny(family, attn), sweep, logits_to_keep=1)


def test_what_noise_does_not_confirm_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    model = HookedVLM(build("llava"), name="a wrong mask")
    sweep = sweep_of("llava", ask("llava", LENGTHS, seed=1), ask("llava", LENGTHS, seed=2))
    own = Layout.mask

    def sees_all(self: Layout, *args: Any) -> torch.Tensor:
        mask = own(self, *args)
        return mask | True if mask.dtype == torch.bool else mask * 0

    monkeypatch.setattr(Layout, "mask", sees_all)
    assert COMMON not in check(model, sweep, logits_to_keep=1)
    monkeypatch.undo()
    assert COMMON not in check(model, sweep, logits_to_keep=1)  # it is not asked again
    forget(model)
    assert COMMON in check(model, sweep, logits_to_keep=1)


@pytest.mark.parametrize("refused", [False, True])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_rows_of_one_length_and_of_several_are_proved_each_by_themselves(
    order: tuple[int, int], refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, proved = HookedVLM(build("llava"), name="even and uneven"), set()
    lengths = [[[7, 7, 7], [7]], [[7, 7, 7, 7]]]  # for the same shapes: uneven, even
    true = folded_run._is_right

    def noted(folding: Any, arguments: Any) -> bool:
        is_even = folding.fold.layout(0).is_even
        proved.add(is_even)
        return true(folding, arguments) and not (refused and not is_even)

    monkeypatch.setattr(folded_run, "_is_right", noted)
    for number, is_even in enumerate(order):
        inputs, source = (ask("llava", lengths[is_even], seed=i) for i in (1, 2))
        said = check(model, sweep_of("llava", inputs, source, ["region"]), logits_to_keep=1)
        assert ("prompts in" in said) == (bool(is_even) or not refused)
        assert proved == {bool(each) for each in order[: number + 1]}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_common_rows(family: str) -> None:
    model = tiny(family)
    inputs, source = ask(family, LENGTHS, seed=1), ask(family, LENGTHS, seed=2)
    fold = expected_fold(model, inputs)
    assert fold is not None and fold.layout(0).n_rows == 3
    sweep = sweep_of(family, inputs, source)
    plan = sweep.plan(model).explain(logits_to_keep=1)
    assert "share rows: 5 in 3" in str(plan)
    for other in (sweep, Sweep(inputs, sweep.axes, sweep.make, base=[Ablate(1, at=LastToken())])):
        # What padding gives is asked for; and a base within the blocks sees each prompt whole.
        kept = 0 if other is sweep else 1
        assert "share rows" not in str(other.plan(model).explain(logits_to_keep=kept))
    with separate_prompts(model):
        apart = sweep.plan(model).explain(logits_to_keep=1)
    assert "share rows" not in str(apart) and plan.planned < apart.planned
    assert expected_fold(model, ask(family, LENGTHS, seed=1, same=False)) is None
    said = logits_of(model, sweep, logits_to_keep=1).attrs["engine"]
    assert f"of {plan.rows} rows" in said or f"{plan.passes} pass" in said


def test_torch_hooks_of_others_see_a_row_for_each_prompt() -> None:
    """Sources are recorded for every engine: there a hook inside a block must not see less rows."""
    model = HookedVLM(build("llava"), name="hooked inside")
    inputs, source = (ask("llava", [[5, 5], [5, 5]], seed=seed) for seed in (1, 2))
    logits_of(model, sweep_of("llava", inputs, source, ["region"]))  # what is proved is proved
    seen: set[int] = set()
    assert expected_fold(model, inputs) is not None
    linear = model.hf_model.get_submodule(f"{model.anatomy.lm.blocks[0].path}.mlp.up_proj")
    linear.register_forward_hook(lambda _, args, output: seen.add(len(args[0])))
    sweep = sweep_of("llava", inputs, source, ["region"])
    assert expected_fold(model, inputs) is None
    assert "share rows" not in str(sweep.plan(model).explain(logits_to_keep=1))
    logits_of(model, sweep, engine="plain")
    assert seen == {4}
