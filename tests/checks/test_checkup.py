"""`hooked-vlm check`: the laws on a user's model, and an answer that a script can act on."""

import re

import pytest
from torch import Tensor

from helpers.prepared_models import prepared
from helpers.strange_models import llama
from hooked_vlm import cli
from hooked_vlm.checks import checkup, laws
from hooked_vlm.checks.checkup import check_model
from hooked_vlm.checks.laws import NO, YES, Finding, Verdict
from hooked_vlm.engine.batch import Growing
from hooked_vlm.errors import UnsupportedModelError
from hooked_vlm.model.vlm import HookedVLM


def test_a_model_that_keeps_every_law() -> None:
    found = list(check_model(prepared("llava")))
    # It takes no videos.
    assert {f.law: f.verdict for f in found if f.verdict != YES} == {"videos": "n/a"}
    notes = {finding.law: finding.note for finding in found}
    assert {"parity", "grid", "LM attention", "generate", "sweep"} <= set(notes)
    assert notes["sweep"].startswith("grown: slots, merged, ")


def test_an_engine_that_is_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the control comes out right."""
    true = Growing.run

    def run(self: Growing) -> Tensor:
        logits = true(self)
        for number, job in enumerate(self.jobs):
            if job.index == 3:
                logits[number] += 0.01 * logits.abs().max()
        return logits

    monkeypatch.setattr(Growing, "run", run)
    found = {finding.law: finding for finding in check_model(prepared("llava"))}
    assert found["sweep"].verdict == NO
    assert re.match(r"slots: off by 1.\de-02 of the largest logit \(growing: ", found["sweep"].note)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The sites that are checked, while nothing really is."""
    names: list[str] = []

    def check_sites(model, inputs, group, wanted=()) -> Finding:
        names.extend(wanted)
        return Finding(group, YES)

    monkeypatch.setattr(laws, "check_sites", check_sites)
    for law in ("parity", "fires", "residual", "grid", "generate", "start_layer"):
        monkeypatch.setattr(laws, f"check_{law}", lambda *_, law=law: Finding(law, YES))
    return names


def test_what_a_law_raises_is_a_finding(asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(model, inputs) -> Finding:
        raise RuntimeError("planted")

    monkeypatch.setattr(laws, "check_patterns", broken)
    found = {finding.law: finding for finding in check_model(prepared("llava"))}
    assert found["patterns"].verdict == NO
    assert "planted" in found["patterns"].note
    assert found["start_layer"].verdict == YES  # the others are checked all the same


@pytest.mark.slow
def test_every_layer_checks_every_site(asked: list[str]) -> None:
    model = prepared("gemma-3")
    list(check_model(model))
    few = list(asked)
    asked.clear()
    list(check_model(model, every_layer=True))
    assert set(few) < set(asked) == set(model.hook_names)
    middle = [name for name in few if name.startswith("blocks.")]
    assert {name.split(".")[1] for name in middle} == {"0", "2", "5"}


def test_a_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="has no vision encoder"):
        next(check_model(HookedVLM(llama(), processor=print)))


@pytest.mark.parametrize(("verdict", "code"), [(YES, 0), (NO, 1)])
def test_the_command_says_so_with_its_exit_code(
    verdict: Verdict, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = [Finding("parity", YES), Finding("grid", verdict, "4x4")]
    monkeypatch.setattr(checkup, "check_model", lambda *_: found)
    monkeypatch.setattr("sys.argv", ["hooked-vlm", "check", "tiny-gemma-3"])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == code
    said = capsys.readouterr().out
    assert f"grid               {verdict:<4} 4x4" in said
    assert ("1 check failed on tiny-gemma-3." in said) == bool(code)
