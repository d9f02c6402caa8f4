"""Processors where torchvision is installed: transformers then wants every part that a class has.

torchvision's own extension does not load beside every build of torch, so a process of its own has
the few functions that processors use in its place.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers.utils import is_torchvision_available

from conformance import torchvision_stand_in
from hooked_vlm import zoo


MODULES = ("", "transforms", "transforms/v2")
NAMES = ", ".join(each.__name__ for each in torchvision_stand_in.FUNCTIONS)
FUNCTIONS = f"from conformance.torchvision_stand_in import InterpolationMode, {NAMES}\n"
CODE = """
import sys
import numpy as np
import torch
from PIL import Image
from transformers import AutoProcessor
from transformers.utils import is_torchvision_available
from hooked_vlm.inputs.without_torchvision import images_only, load_processor

assert is_torchvision_available()
folder, bare = sys.argv[1:]
whole = AutoProcessor.from_pretrained(folder, local_files_only=True)
loaded = load_processor(folder, local_files_only=True)
assert type(whole) is type(loaded), type(loaded)
only = loaded
if "video_processor" in whole.get_attributes():
    assert whole.video_processor.temporal_patch_size == 2
    only = images_only(type(whole)).from_pretrained(folder, local_files_only=True)
    only.save_pretrained(bare)
    only = load_processor(bare, local_files_only=True)  # without its part for videos
    assert only.get_attributes() == ["image_processor", "tokenizer"]
    try:
        only(text=["What?"], videos=[np.zeros((2, 96, 96, 3), np.uint8)])
    except ImportError as error:
        assert "it was saved without one" in str(error), error
    else:
        raise AssertionError("a video was taken")
image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (192, 192, 3), np.uint8))
content = [{"type": "image"}, {"type": "text", "text": "What?"}]
made = []
for processor in (whole, loaded, only):
    text = processor.apply_chat_template([{"role": "user", "content": content}])
    made.append(processor(text=[text], images=[[image]], return_tensors="pt"))
for each in made[1:]:
    assert torch.equal(each["input_ids"], made[0]["input_ids"])
    torch.testing.assert_close(each["pixel_values"], made[0]["pixel_values"])
try:
    load_processor(sys.argv[2] + "/none", local_files_only=True)
except OSError:
    print("done")
"""


@pytest.mark.skipif(is_torchvision_available(), reason="the rest of the suite runs with it")
@pytest.mark.parametrize("name", zoo.available())
def test_a_shipped_folder_loads(name: str, tmp_path: Path) -> None:
    packages = tmp_path / "packages"
    for module in MODULES:
        (packages / "torchvision" / module).mkdir(parents=True, exist_ok=True)
        (packages / "torchvision" / module / "__init__.py").write_text(FUNCTIONS)
    for folder in MODULES[1:]:
        (packages / "torchvision" / folder / "functional.py").write_text(FUNCTIONS)
    (packages / "torchvision" / "io.py").touch()
    about = packages / "torchvision-0.99.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: torchvision\nVersion: 0.99.0\n")
    tests = Path(__file__).parents[1]
    path = os.pathsep.join(map(str, (packages, tests, tests.parent)))
    ran = subprocess.run(
        [sys.executable, "-c", CODE, zoo.folder(name), tmp_path / "bare"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert ran.stdout == "done\n", ran.stderr
