"""Small faithful copies of What'sUp and COCO-spatial as they lie on disk."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from hooked_vlm.stimuli import squares
from hooked_vlm.stimuli.datasets import whatsup


PREPOSITIONS = ("left_of", "right_of", "on", "under")
CAPTION = "A {} {} a {}"


def picture(path: Path, color: tuple[int, int, int], size: tuple[int, int] = (64, 48)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, quality=95)


def spatial(tmp_path: Path) -> Path:
    for number in (42, 139):
        picture(tmp_path / "data" / "val2017" / f"{number:012d}.jpg", (number, 9, 9))
    entries = [
        [42, "A photo of a teddy bear to the left of an oven", "… to the right of …"],
        [139, "A photo of a cup above a dog", "A photo of a cup below a dog"],
        [7, "A photo of a cup below a dog", "A photo of a cup above a dog"],  # no picture
        [42, "Two dogs", "One dog"],
        ["short"],
    ]
    (tmp_path / "data" / "coco_qa_two_obj.json").write_text(json.dumps(entries))
    one = [[42, "A photo of a cat on the left", "A photo of a cat on the right"]]
    (tmp_path / "data" / "coco_qa_one_obj.json").write_text(json.dumps(one))
    return tmp_path


def boxed(tmp_path: Path) -> Path:
    """Twelve photographs of two sizes with a cup and a dog, with COCO's annotations of them."""
    entries, annotations = [], []
    rng = np.random.default_rng(0)
    for number in range(1, 13):
        size = (80, 64) if number % 3 else (64, 80)
        pixels = rng.integers(0, 60, (*size[::-1], 3), dtype=np.uint8)
        swapped, upright = bool(number % 2), number > 6
        cup, dog = ([8, 8, 20, 20], [size[0] - 30, size[1] - 30, 20, 20])
        if swapped:
            cup, dog = dog, cup
        for (x, y, w, h), color in ((cup, (200, 0, 0)), (dog, (0, 0, 200))):
            pixels[y : y + h, x : x + w] = color
        path = tmp_path / "data" / "val2017" / f"{number:012d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)
        side = ("below" if swapped else "above") if upright else f"to the {_side(swapped)} of"
        entries.append([number, f"A photo of a cup {side} a dog", "…"])
        for category, box in ((1, cup), (2, dog)):
            annotations.append({"image_id": number, "category_id": category, "bbox": box})
    annotations.append({"image_id": 2, "category_id": 1, "bbox": [0, 0, 1, 1]})  # a smaller cup
    del annotations[23]  # picture 12 has no dog
    categories = [{"id": 1, "name": "cup"}, {"id": 2, "name": "dog"}]
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "instances_val2017.json").write_text(
        json.dumps({"annotations": annotations, "categories": categories})
    )
    (tmp_path / "data" / "coco_qa_two_obj.json").write_text(json.dumps(entries))
    return tmp_path


def _side(swapped: bool) -> str:
    return "right" if swapped else "left"


def three(tmp_path: Path) -> Path:
    """Set A around all three references, six objects each, whose colours differ by side."""
    names = ("red", "green", "blue", "black", "gray", "brown")
    entries = []
    for reference in whatsup.REFERENCES:
        for name in names[: 5 if reference == "table" else 6]:
            for preposition, dark in (("left_of", 0), ("right_of", 1)):
                file = f"{name}_{preposition}_{reference}.jpeg"
                r, g, b = (value // (1 + dark) for value in squares.COLORS[name])
                picture(tmp_path / "data" / "controlled_images" / file, (r, g, b))
                captions = [
                    CAPTION.format(name, p.replace("_", " "), reference) for p in PREPOSITIONS
                ]
                captions = captions if preposition == "left_of" else captions[1:] + captions[:1]
                path = f"data/controlled_images/{file}"
                entries.append({"image_path": path, "caption_options": captions})
    listing = tmp_path / "data" / "controlled_images_dataset.json"
    listing.write_text(json.dumps(entries))
    return tmp_path
