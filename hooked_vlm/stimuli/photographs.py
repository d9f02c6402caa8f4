"""Photographs as backgrounds: the same layouts on natural images (paper, App. C.8).

The paper does not give the source of its photographs.  The package ships nine photographs in
the public domain or under CC0 (`assets/NOTICE.md`): six `SCENES` for measurements and three
`TEXTURES`.  Two shipped models were trained on the textures, none on the scenes.  A
user's own folder of pictures can be used instead.
"""

from functools import cache
from pathlib import Path

from PIL import Image, ImageOps

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import Count
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.stimuli.pictures import open_picture


SCENES = ("coffee", "chelsea", "rocket", "camera", "astronaut", "hubble")
TEXTURES = ("brick", "grass", "gravel")

_SHIPPED = Path(__file__).parent / "assets" / "photographs"
_ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


@checked(DataError)
@cache
def shipped(name: str) -> Image.Image:
    """Returns a shipped photograph, 336x336 px.

    Raises `DataError` for an unknown name.
    """
    known = (*SCENES, *TEXTURES)
    if name not in known:
        raise DataError(
            f"No photograph {name!r} among {', '.join(known)}.{did_you_mean(name, known)}"
        )
    with Image.open(_SHIPPED / f"{name}.jpg") as opened:
        return opened.convert("RGB")


@checked(DataError)
def load_photographs(folder: Path) -> dict[str, Image.Image]:
    """Returns a folder's pictures by file name, in order.

    Raises `DataError` for a folder without pictures, and for a file that is no picture.
    """
    return {path.stem: open_picture(path) for path in files_in(folder)}


def files_in(folder: Path) -> list[Path]:
    """Returns the pictures' files of a folder, in order; raises `DataError` without any."""
    files = [p for p in sorted(Path(folder).glob("*")) if p.suffix.lower() in _ENDINGS]
    if not files:
        raise DataError(
            f"There are no pictures ({', '.join(_ENDINGS)}) in '{folder}' to use as backgrounds. "
            "Give a folder with at least one."
        )
    return files


@checked(DataError)
def fitted(photograph: Image.Image, side: Count) -> Image.Image:
    """Returns the middle of a photograph, scaled to a square canvas."""
    return ImageOps.fit(photograph, (side, side), Image.Resampling.LANCZOS)
