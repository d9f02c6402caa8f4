"""What a user imports: the public names, their version, and nothing heavy on the way."""

import subprocess
import sys
from importlib.metadata import version

import pytest

import hooked_vlm


@pytest.mark.parametrize("name", hooked_vlm.__all__)
def test_every_public_name_is_there_and_documented(name):
    assert getattr(hooked_vlm, name).__doc__
    assert name in dir(hooked_vlm)


def test_a_star_imports_the_public_names_and_no_others():
    names: dict[str, object] = {}
    exec("from hooked_vlm import *", names)
    assert names.keys() - {"__builtins__"} == set(hooked_vlm.__all__)


def test_the_version_is_the_installed_one():
    assert hooked_vlm.__version__ == version("hooked-vlm")


def test_a_misspelt_name_is_an_error():
    with pytest.raises(AttributeError, match="no attribute 'HookedVML'"):
        hooked_vlm.HookedVML  # noqa: B018


@pytest.mark.parametrize(
    "code",
    [
        "import hooked_vlm; hooked_vlm.__version__; hooked_vlm.__all__",
        "import runpy; sys.argv = ['hooked-vlm', '--help']\n"
        "try: runpy.run_module('hooked_vlm', run_name='__main__')\n"
        "except SystemExit as done: assert not done.code",
    ],
    ids=["package", "help"],
)
def test_torch_is_not_waited_for(code):
    check = f"import sys\n{code}\nassert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", check], check=True, capture_output=True)
