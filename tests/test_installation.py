"""What is needed to install and to test: constraints that can be met, and whose warnings count."""

import re
import shutil
import subprocess
import sys
import warnings
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parent.parent
PYTHONS = ("3.11", "3.12", "3.13")


def resolved(python: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """What uv finds for the test extra under the constraints, with torch from the index."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        pytest.skip("uv is not installed")
    command = [
        *(uv, "pip", "compile", "--quiet", "--python-version", python, "--extra", "test"),
        *("--no-sources", "-c", str(ROOT / "constraints.txt"), str(ROOT / "pyproject.toml")),
        *("-o", str(tmp_path / "found.txt")),
    ]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_can_be_met_with_torch_from_the_index(python, tmp_path):
    """A GPU machine's torch names its own triton, which no constraint may contradict."""
    found = resolved(python, tmp_path)
    offline = r"dns error|connect|network|timed? ?out|tunnel|failed to fetch"
    if found.returncode and re.search(offline, found.stderr, re.IGNORECASE):
        pytest.skip("the package index cannot be reached")
    assert not found.returncode, found.stderr
    assert re.search(r"^torch==", (tmp_path / "found.txt").read_text(), re.MULTILINE)


def test_the_triton_of_the_constraints_is_the_one_that_torch_asks_for():
    """Also where the resolver cannot be run: torch 2.13.0 from the index requires it so."""
    pinned = dict(
        line.split("==")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if line and not line.startswith("#")
    )
    assert (pinned["torch"], pinned["triton"]) == ("2.13.0", "3.7.1")


def test_every_requirement_has_a_lower_bound_and_no_upper_one():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for text in [*project["dependencies"], *extras["gpu"], *extras["test"], *extras["docs"]]:
        required = Requirement(text)
        operators = {specifier.operator for specifier in required.specifier}
        assert operators <= {">="}, text
        if required.name in {"torch", "transformers", "numpy", "scikit-learn"}:
            assert operators, text
            assert required.specifier.contains(version(required.name)), text


def warn_from(module: str, category: type[Warning] = DeprecationWarning) -> None:
    warnings.warn_explicit("to be removed", category, "file.py", 1, module=module, registry={})


@pytest.mark.parametrize(
    "module", ["hooked_vlm", "hooked_vlm.analysis.probes", "benchmarks.throughput.tasks"]
)
def test_a_warning_about_our_own_code_is_an_error(module):
    with pytest.raises(DeprecationWarning, match="to be removed"):
        warn_from(module)


def test_a_warning_of_the_package_is_an_error_wherever_it_points():
    from hooked_vlm.errors import HookedVLMWarning

    with pytest.raises(HookedVLMWarning, match="to be removed"):
        warn_from("a_users_script", HookedVLMWarning)


@pytest.mark.parametrize("module", ["numpy", "triton.compiler", "hooked_vlm_plugin"])
def test_a_warning_between_dependencies_is_none_of_ours(module):
    with warnings.catch_warnings(record=True) as caught:  # under the filters of pyproject.toml
        warn_from(module)
    assert len(caught) == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_help_lists_every_target():
    text = (ROOT / "Makefile").read_text()
    (line,) = re.findall(r"^\.PHONY: (.*)$", text, re.MULTILINE)
    listed = subprocess.run(
        ["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    assert set(line.split()) == set(re.findall(r"^make (\S+)", listed, re.MULTILINE))
