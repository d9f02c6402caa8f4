"""The items of a data set, whatever kind of one it is: images, a text and a label each.

A data set is a sequence or an iterable of `(image, text)` or `(image, text, label)`, or of
mappings, which Hugging Face data sets are.  Images may be paths.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from hooked_vlm.arguments.checked import is_listed, shown
from hooked_vlm.errors import DataError
from hooked_vlm.inputs.prepare import to_pil


IMAGE_COLUMNS = ("image", "images", "picture", "img")
TEXT_COLUMNS = ("text", "question", "prompt", "caption")
LABEL_COLUMNS = ("label", "labels", "answer")


@dataclass(frozen=True)
class Columns:
    """The names of a mapping's entries; None: the first usual name that it has."""

    image: str | None = None
    text: str | None = None
    label: str | None = None


@dataclass(frozen=True, eq=False)
class Item:
    """One item of a data set, read."""

    index: int
    images: tuple[Image.Image, ...]
    text: str
    label: Any = None
    given: Any = None
    """The item as the data set has it."""

    def digest(self) -> str:
        """Returns a digest of the pictures, the text and the label."""
        made = hashlib.blake2b(told(self.text, self.label).encode(), digest_size=16)
        for image in self.images:
            made.update(f"{image.size}".encode() + image.tobytes())
        return made.hexdigest()


def plain_label(label: Any) -> Any:
    """Returns a label as JSON has it."""
    if hasattr(label, "tolist"):
        label = label.tolist()
    if label is None or isinstance(label, str | int | float | bool):
        return label
    if isinstance(label, list | tuple):
        return [plain_label(part) for part in label]
    return str(label)


def length_of(dataset: Any) -> int | None:
    """Returns the number of items where the data set has a length; raises `DataError` for none."""
    if isinstance(dataset, str | bytes | Mapping) or not (
        is_listed(dataset) or hasattr(dataset, "__getitem__")
    ):
        raise DataError(
            f"dataset={shown(dataset)} was given; expected a sequence or an iterable of (image, "
            "text), (image, text, label) or mappings such as {'image': …, 'text': …}."
        )
    try:
        n = len(dataset) if hasattr(dataset, "__len__") else None
    except TypeError:
        raise DataError(f"dataset={shown(dataset)} was given, which has no length.") from None
    if n == 0:
        raise DataError("The data set is empty. Give at least one item.")
    return n


def raw_items(dataset: Any, wanted: Any) -> Iterator[tuple[int, Any]]:
    """Yields the number and the item of all that are at hand, in order.

    Of a sequence that reads its items from elsewhere, these are those that `wanted(number)` asks
    for.
    """
    is_at_hand = type(dataset) in (list, tuple) or not hasattr(dataset, "__len__")
    if hasattr(dataset, "__getitem__") and not is_at_hand:
        for index in range(len(dataset)):
            if wanted(index):
                yield index, dataset[index]
        return
    iterable: Iterable[Any] = dataset
    yield from enumerate(iterable)


def text_and_label(given: Any, columns: Columns, text: str | None) -> tuple[Any, Any]:
    """Returns an item's text and label, without a look at its pictures; raises `DataError`."""
    _, own, label = _parts(given, columns, text is not None)
    return own if text is None else text, label


def told(text: str, label: Any) -> str:
    """Returns a text and a label in words that no others have (a NaN is not equal to itself)."""
    return json.dumps([text, plain_label(label)], default=str)


def read_item(index: int, given: Any, columns: Columns, text: str | None) -> Item:
    """Returns an item with its pictures loaded; raises `DataError`, which names its number."""
    try:
        images, own, label = _parts(given, columns, text is not None)
        prompt = text if text is not None else own
        if not isinstance(prompt, str):
            raise DataError(f"its text is {shown(prompt)}; expected a text.")
        listed = images if isinstance(images, list | tuple) else [images]
        pictures = tuple(_picture(image) for image in listed if image is not None)
        return Item(index, pictures, prompt, label, given)
    except DataError as error:
        raise DataError(f"Item {index}: {error}") from None


def _parts(given: Any, columns: Columns, has_text: bool) -> tuple[Any, Any, Any]:
    if isinstance(given, Mapping):
        image = _column(given, columns.image, IMAGE_COLUMNS, "image", needed=True)
        text = _column(given, columns.text, TEXT_COLUMNS, "text", needed=not has_text)
        return image, text, _column(given, columns.label, LABEL_COLUMNS, "label", needed=False)
    if isinstance(given, tuple | list) and 2 <= len(given) <= 3:
        return given[0], given[1], given[2] if len(given) == 3 else None
    if has_text and not isinstance(given, tuple | list):
        return given, None, None
    raise DataError(
        f"it is {shown(given)}; expected (image, text), (image, text, label) or a mapping. For "
        "images alone give text='…'."
    )


def _column(
    given: Mapping[str, Any], name: str | None, usual: tuple[str, ...], kind: str, needed: bool
) -> Any:
    if name is not None:
        if name not in given:
            raise DataError(f"it has no entry {name!r}; it has {', '.join(map(str, given))[:120]}.")
        return given[name]
    found = next((n for n in usual if n in given), None)
    if found is None and needed:
        raise DataError(
            f"it has no {kind} by one of the names {', '.join(usual)}; it has "
            f"{', '.join(map(str, given))[:120]}. Give {kind}_column='…'."
        )
    return None if found is None else given[found]


def _picture(image: Any) -> Image.Image:
    if not isinstance(image, str | Path):
        return to_pil(image)
    try:
        with Image.open(image) as opened:
            return to_pil(opened)
    except (OSError, SyntaxError, ValueError, EOFError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the picture '{image}' cannot be read: {str(error)[:120]}.") from None
