"""Folders of photographs, for the experiments that read them."""

from pathlib import Path

import pytest

from helpers import photograph_folders


@pytest.fixture
def spatial(tmp_path: Path) -> Path:
    """A copy of COCO-spatial's list, with two usable items."""
    return photograph_folders.spatial(tmp_path)


@pytest.fixture
def boxed(tmp_path: Path) -> Path:
    """Twelve photographs of a cup and a dog, with COCO's boxes."""
    return photograph_folders.boxed(tmp_path)


@pytest.fixture
def three(tmp_path: Path) -> Path:
    """What'sUp around all three references."""
    return photograph_folders.three(tmp_path)
