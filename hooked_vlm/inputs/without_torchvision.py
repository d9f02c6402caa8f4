"""Loads processors without torchvision.

transformers' video processors need torchvision, so a processor that can take videos does not
load without torchvision even for images only.  One that was saved without its part for videos
does not load with torchvision either.  `images_only` makes the same processor class
without the parts for other inputs than images and text; image processors use PIL instead.

transformers reads the parts of a processor from the signature of its class's `__init__`, and
the accepted options from that function's code, so `__init__` must not be wrapped.  Therefore
an object is made by a class that accepts missing parts, and its class is then replaced by one
that has only the remaining parts.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

from transformers import AutoConfig, AutoProcessor, ImageProcessingMixin, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING, processor_class_from_name
from transformers.utils import is_torchvision_available

from hooked_vlm.errors import MissingExtraError, UnsupportedModelError


_READ_BY = {
    "videos": ("video_processor",),
    **dict.fromkeys(("audio", "audios"), ("audio_processor", "feature_extractor")),
}
"""For arguments of a processor, the parts that read them."""


class _Absent:
    """Replaces a missing part while a processor reads defaults from its attributes."""

    def __init__(self, default: str | None = None) -> None:
        self._default = default

    def __getattr__(self, name: str) -> str | None:
        if name.startswith("_"):
            raise AttributeError(name)
        return self._default


class _Construction(type):
    """Makes an object whose missing parts are None, then sets its class."""

    full: type[ProcessorMixin]
    parts: tuple[str, ...]
    absent: tuple[str, ...]

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        names = cls.parts
        if len(args) < len(names):  # only the remaining parts were given
            names = [name for name in names if name not in cls.absent]
        given = dict(zip(names, args, strict=False))
        doubled = sorted(given.keys() & kwargs.keys())
        if doubled:
            raise TypeError(f"{cls.__name__} got several values for {', '.join(doubled)}.")
        given |= {name: kwargs.pop(name) for name in cls.parts if name in kwargs}
        for name in cls.absent:
            if given.get(name) is not None:
                raise UnsupportedModelError(
                    f"A {name} was given to a {cls.__name__} for images and text only. Give none, "
                    "or use the original class."
                )
        parts = [_Absent() if name in cls.absent else given.get(name) for name in cls.parts]
        made = cls.full(*parts, *args[len(names) :], **kwargs)
        for name in cls.absent:
            setattr(made, name, None)
        made.__class__ = cls  # pyright: ignore[reportAttributeAccessIssue]
        return made


@cache
def images_only(processor_class: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """Returns a processor class of the same name and behaviour for images and text only.

    Its `image_processor` and tokenizers are those of the class; the other parts are None.  The
    constructor takes all parts, or all but the missing ones, by keyword or by position.
    """
    parts = tuple(processor_class.get_attributes())
    absent = tuple(n for n in parts if n != "image_processor" and "tokenizer" not in n)
    if not absent:
        return processor_class
    common = {"__module__": processor_class.__module__, "__doc__": processor_class.__doc__}

    def check(self: Any, argument_name: str, argument: Any) -> Any:
        if argument_name in absent:
            return None
        return processor_class.check_argument_for_proper_class(self, argument_name, argument)

    name = processor_class.__name__
    full = type(name, (processor_class,), common | {"check_argument_for_proper_class": check})
    members = common | _members(processor_class, parts, absent)
    made = _Construction(name, (processor_class,), members)
    made.full, made.parts, made.absent = full, parts, absent
    return made


def _members(base: Any, parts: Sequence[str], absent: Sequence[str]) -> dict[str, Any]:
    """Returns the methods in which the class for images only differs from the original class."""
    kept = [name for name in parts if name not in absent]

    def loaded(cls: Any, *args: Any, **kwargs: Any) -> list[Any]:
        found = base._get_arguments_from_pretrained.__func__(cls, *args, **kwargs)
        by_name = dict(zip(kept, found, strict=True))
        return [by_name.get(name) for name in parts]

    def processor_dict(cls: Any, *args: Any, **kwargs: Any) -> Any:
        saved, rest = base.get_processor_dict.__func__(cls, *args, **kwargs)
        return _without(saved, absent), rest

    def to_dict(self: Any) -> dict[str, Any]:
        return _without(base.to_dict(self), absent)

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        _refuse_absent(base, absent, [self, *args], kwargs)
        return base.__call__(self, *args, **kwargs)

    def apply_chat_template(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _standing_in(self, absent):
            return base.apply_chat_template(self, *args, **kwargs)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        with _standing_in(self, absent, ""):  # it looks for a file with this name
            return base.save_pretrained(self, *args, **kwargs)

    def reduced(self: Any, _protocol: Any) -> Any:
        # pickle would look for the original class under this one's name.
        return _made_again, (base, dict(vars(self)))

    return {
        "__reduce_ex__": reduced,
        "get_attributes": classmethod(lambda _cls: list(kept)),
        "_get_arguments_from_pretrained": classmethod(loaded),
        "get_processor_dict": classmethod(processor_dict),
        "to_dict": to_dict,
        "__call__": call,
        "apply_chat_template": apply_chat_template,
        "save_pretrained": save_pretrained,
    }


def _made_again(base: Any, state: dict[str, Any]) -> Any:
    """Returns a processor for images only from its original class and its attributes."""
    made = object.__new__(images_only(base))
    vars(made).update(state)
    return made


def _without(options: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in names}


def _refuse_absent(
    base: Any, absent: Sequence[str], args: Sequence[Any], kwargs: dict[str, Any]
) -> None:
    """Raises `MissingExtraError` for an argument that a missing part would have to read."""
    given = inspect.signature(base.__call__).bind_partial(*args).arguments | kwargs
    for name, parts in _READ_BY.items():
        missing = [part for part in parts if part in absent]
        if missing and given.get(name) is not None:
            reason, remedy = (
                ("it was saved without one", "Load a checkpoint that has one")
                if is_torchvision_available()
                else ("torchvision is not installed", "Install torchvision and load it again")
            )
            raise MissingExtraError(
                f"{name} was given to a {base.__name__} without a {missing[0]}: {reason}, so the "
                f"processor was loaded for images and text only. {remedy}, or give only images."
            )


@contextmanager
def _standing_in(
    processor: Any, absent: Sequence[str], default: str | None = None
) -> Iterator[None]:
    """Lets code read defaults from missing parts, as a chat template does for videos."""
    before = {name: getattr(processor, name) for name in absent}
    for name, value in before.items():
        setattr(processor, name, _Absent(default) if value is None else value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(processor, name, value)


def load_processor(name: str, **kwargs: Any) -> Any:
    """Returns the processor of a folder or hub name.

    A processor with a part for videos is loaded for images and text only when torchvision is
    not installed, and when the part was not saved with it.
    """
    if kwargs.get("trust_remote_code"):
        return AutoProcessor.from_pretrained(name, **kwargs)
    if is_torchvision_available():
        try:
            return AutoProcessor.from_pretrained(name, **kwargs)
        except OSError:
            # A processor for images and text only was saved; its class says nothing of that.
            if not _is_saved_for_images_only(name, kwargs):
                raise
    processor_class = _processor_class(name, kwargs)
    if processor_class is None or "video_processor" not in processor_class.get_attributes():
        return AutoProcessor.from_pretrained(name, **kwargs)
    return images_only(processor_class).from_pretrained(name, **kwargs)


def _is_saved_for_images_only(name: str, kwargs: dict[str, Any]) -> bool:
    """Returns whether one file has all parts of a processor, and none for videos."""
    try:
        saved, _ = ProcessorMixin.get_processor_dict(name, **kwargs)
    except (OSError, ValueError):  # the name is none of a folder or of the hub
        return False
    return "image_processor" in saved and "video_processor" not in saved


def _processor_class(name: str, kwargs: dict[str, Any]) -> Any:
    """Returns the saved class of a processor, else the usual class of the model, else None."""
    for read in (ProcessorMixin.get_processor_dict, ImageProcessingMixin.get_image_processor_dict):
        try:
            saved, _ = read(name, **kwargs)
        except OSError:
            continue
        if isinstance(saved.get("processor_class"), str):
            return processor_class_from_name(saved["processor_class"])
    config = type(AutoConfig.from_pretrained(name, **kwargs))
    return PROCESSOR_MAPPING.get(config, None)
