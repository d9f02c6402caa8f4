"""Daily jobs: ours give what plain torch gives, and the page in the docs is what was measured."""

import importlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.jobs import JOBS, counted
from benchmarks.jobs import page as pages
from benchmarks.jobs import tools as jobs
from benchmarks.jobs.world import MODELS, World, world


DOCS = Path(__file__).parent.parent / "docs"
EDITS = ("patch_last_token", "patch_box", "ablate_head", "knockout")


@pytest.fixture(scope="module", params=MODELS)
def made(request: Any, tmp_path_factory: Any) -> World:
    return world(request.param, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def right(made: World) -> dict[str, tuple[torch.Tensor, ...]]:
    return {job: jobs.values("plain", job, made) for job in JOBS}


def test_our_values_are_those_of_plain_torch(made: World, right: Any) -> None:
    for job in JOBS:
        found = jobs.judged("ours", job, made, right[job])
        assert found["kind"] == "right", (job, found)


def test_a_job_that_does_nothing_would_be_seen(made: World, right: Any) -> None:
    logits = made.model(made.inputs).detach()[:, -1]
    for job in EDITS:
        assert jobs.verdict((logits,), right[job])["kind"] == "wrong", job
    plain = right["sweep_last_token"][0]
    assert jobs.verdict((logits[:, made.token].expand_as(plain),), (plain,))["kind"] == "wrong"
    how = {**made.greedy, "output_logits": True, "return_dict_in_generate": True}
    unsteered = torch.cat(made.model.generate(made.inputs, **how).logits)
    assert jobs.verdict((unsteered,), right["steer_generated"])["kind"] == "wrong"
    states, positions = right["generation_activations"]
    assert len(states) == len(positions) == made.ids.shape[1] + 3
    assert not torch.equal(right["features"][0][0], right["features"][0][1])
    seen = right["attention_map"][0].sum(0) > 0
    assert seen.any()
    assert seen.all() == (made.model.cfg.model_name != "tiny-gemma-3")  # the window cuts it


def test_attributions_sum_to_what_they_attribute(made: World, right: Any) -> None:
    logits = made.model(made.inputs).detach()[0, -1]
    (parts,), (heads,) = right["logits_by_part"], right["logits_by_head"]
    torch.testing.assert_close(parts.sum(), logits[made.token] - logits[made.wrong])
    by_layer = heads.unflatten(0, (-1, made.model.cfg.n_heads)).sum(1)
    # Scales of a norm are read off its output over its input, whose rounding differs by entry.
    torch.testing.assert_close(by_layer, parts[1::2], rtol=1e-4, atol=1e-4)


def test_every_tool_has_every_job() -> None:
    for tool in counted.MODULES:
        assert all(n > 0 for n in counted.lines(tool).values()), tool


def test_lines_are_counted_as_they_are_written() -> None:
    source = '''
import x


def one(w):
    """Says.

    More.
    """
    a = f(
        w,
    )

    # why

    def inner(y):
        return y  # here

    return inner(a)
'''
    assert counted.lines_of(source) == {"one": 6}


def test_what_is_wrong_is_called_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    one = torch.ones(3)
    assert jobs.verdict((one + 1e-6,), (one,))["kind"] == "right"
    assert jobs.verdict((one + 0.1,), (one,)) == {
        "kind": "wrong",
        "difference": pytest.approx(0.1),
        "of": 1.0,
    }
    assert jobs.verdict((one * float("nan"),), (one,))["kind"] == "wrong"
    assert "shapes" in jobs.verdict((one[None],), (one,))["why"]

    def fails(*args: Any) -> Any:
        raise KeyError("hook_nothing")

    monkeypatch.setattr(jobs, "values", fails)
    found = jobs.judged("nnsight", "loss", None, (one,))  # type: ignore[arg-type]
    assert found == {"kind": "cannot", "why": "KeyError: 'hook_nothing'"}
    with pytest.raises(KeyError):
        jobs.judged("ours", "loss", None, (one,))  # type: ignore[arg-type]


def test_the_page_is_what_the_command_wrote() -> None:
    found = json.loads((DOCS / "measured" / "jobs.json").read_text(encoding="utf-8"))
    text = (DOCS / "measured" / "jobs.md").read_text(encoding="utf-8")
    assert text == pages.page(found)
    assert found["tools"] == ["ours", "transformer-lens", "nnsight"]
    assert f".venv-rivals/bin/{pages.command(found['tools'])}" in text
    assert re.search(r"TransformerLens 4\.3\.\d+, nnsight 0\.8\.\d+, torch", text)
    for tool, lines in found["lines"].items():
        assert lines == counted.lines(tool), f"{tool}: run the command at the top of the page"
    for model in MODELS:
        kinds = {found["verdicts"][model]["ours"][job]["kind"] for job in JOBS}
        assert kinds == {"right"}


def test_a_missing_tool_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    main = importlib.import_module("benchmarks.jobs.__main__")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["jobs", "--tools", "ours,nnsight"])
    with pytest.raises(SystemExit) as stopped:
        main.main()
    assert "python -m benchmarks.throughput.environment --at .venv-rivals" in str(stopped.value)
    assert ".venv-rivals/bin/python -m benchmarks.jobs --tools nnsight" in str(stopped.value)


def test_the_command_prints_a_page_of_ours_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main = importlib.import_module("benchmarks.jobs.__main__")
    monkeypatch.setattr(main, "judgements", lambda tools, model: iter(_verdicts(tools)))
    monkeypatch.setattr("sys.argv", ["jobs", "--write", str(tmp_path / "page.md")])
    main.main()
    text = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert text in capsys.readouterr().out
    assert "| job | torch: lines | hooked_vlm: lines | value |" in text
    assert "**wrong** (0.5 of 2)" in text
    assert json.loads((tmp_path / "page.json").read_text(encoding="utf-8"))["tools"] == ["ours"]


def _verdicts(tools: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    wrong = {"kind": "wrong", "difference": 0.5, "of": 2.0}
    return [(tool, job, wrong) for tool in tools for job in JOBS]
