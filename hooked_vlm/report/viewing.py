"""What `hooked-vlm view` does: loads a model, asks it about a picture, and writes the page."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from hooked_vlm.disk.files import writable_folder
from hooked_vlm.errors import DataError, did_you_mean
from hooked_vlm.experiments.options import OnProgress
from hooked_vlm.experiments.setting import Setting, system_of
from hooked_vlm.model.vlm import HookedVLM
from hooked_vlm.report.devices import device_of, dtype_of
from hooked_vlm.report.progress import say_loading
from hooked_vlm.stimuli.pairs import Question
from hooked_vlm.stimuli.pictures import open_picture, upright
from hooked_vlm.stimuli.settings import stimulus_set
from hooked_vlm.viewer.order_probes import order_probes
from hooked_vlm.viewer.view import LIMIT_MB, PANELS, View, check_view, view


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is looked at, as the command line gives it; nothing is loaded."""

    image: Path | None = None
    question: str | None = None
    source: Path | None = None
    answers: str | None = None
    """Words, separated by commas."""
    panels: str = ",".join(PANELS)
    layers: str | None = None
    """Numbers, separated by commas."""
    slots: str | None = None
    limit_mb: float | int = LIMIT_MB

    def __post_init__(self) -> None:
        if (self.image is None) != (self.question is None):
            raise DataError(
                "--image and --question are given together, or neither: without them a picture of "
                "three squares is drawn."
            )
        if self.source is not None and self.image is None:
            raise DataError("--source is another picture for --image, which was not given.")
        for panel in self.chosen_panels:
            if panel not in PANELS:
                raise DataError(
                    f"--panels has {panel!r}; expected some of {', '.join(PANELS)}."
                    f"{did_you_mean(panel, PANELS)}"
                )
        _numbers("--layers", self.layers)
        _numbers("--slots", self.slots)
        if self.chosen_answers is not None and not self.chosen_answers:
            raise DataError(
                f"--answers was given {str(self.answers)[:40]!r}; expected words, separated by "
                "commas, such as red,blue."
            )
        if not self.limit_mb >= 0:  # NaN too
            raise DataError(f"--limit-mb must be at least 0 (got {self.limit_mb}).")

    @property
    def chosen_panels(self) -> list[str]:
        """The names of the panels."""
        return _words(self.panels)

    @property
    def chosen_answers(self) -> list[str] | None:
        """The answers that are followed; None: the most probable ones."""
        return None if self.answers is None else _words(self.answers)


def write(
    model: str, asked: Asked, out: Path, device: str, dtype: str, on_progress: OnProgress
) -> str:
    """Writes the page of a model to `out`; returns a line about it.

    Raises `DataError` for a path that cannot be written to and for a picture that cannot be read,
    before the model is loaded.
    """
    if out.is_dir():
        raise DataError(f"--out '{out}' is a folder; expected a file, such as --out view.html.")
    writable_folder(out.parent)
    images = [open_picture(path, upright) for path in (asked.image, asked.source) if path]
    how = {"dtype": dtype_of(dtype), "device": device_of(device), "attn_implementation": "eager"}
    say_loading(model)
    loaded = HookedVLM.from_pretrained(model, **how)
    made = make(loaded, asked, images, on_progress)
    page = made.to_html(out)
    return f"page: {out} ({len(page.encode()) / 1e6:.1f} MB: {', '.join(asked.chosen_panels)})"


def make(
    model: HookedVLM, asked: Asked, images: Sequence[Image.Image], on_progress: OnProgress
) -> View:
    """Returns the view of a model for what is asked; `images` are the picture and its source."""
    image, question, source, system = _stimulus(model, asked, images)
    layers, slots = _numbers("--layers", asked.layers), _numbers("--slots", asked.slots)
    for word in asked.chosen_answers or ():
        model.to_single_token(word)
    probes = None
    how = {"source": source, "layers": layers, "slots": slots, "system": system}
    how |= {"limit_mb": asked.limit_mb}
    if "probes" in asked.chosen_panels:
        # What is wrong is said before probes are fitted, which takes long.
        if others := [panel for panel in asked.chosen_panels if panel != "probes"]:
            check_view(model, image, question, panels=others, **how)
        probes = order_probes(model, slots=slots, on_progress=on_progress)
    return view(
        model,
        image,
        question,
        answers=asked.chosen_answers,
        probes=probes,
        panels=asked.chosen_panels,
        on_progress=on_progress,
        **how,
    )


def _stimulus(
    model: HookedVLM, asked: Asked, images: Sequence[Image.Image]
) -> tuple[Image.Image, str, Image.Image | None, str | None]:
    """Returns the picture, the question, the other picture and the system message.

    They are drawn where none are given.
    """
    if asked.question is not None:
        return images[0], asked.question, images[1] if len(images) > 1 else None, None
    setting = Setting(model, stimulus_set("squares"), 1)
    first, middle, last = setting.names[:3]
    shown = [Question(names, "left") for names in ((first, middle, last), (last, middle, first))]
    image, source = map(setting.picture, shown)
    system = system_of(model, setting.stimuli.system)
    return image, setting.stimuli.prompt(shown[0]), source, system


def _words(text: str) -> list[str]:
    return [word for word in (part.strip() for part in text.split(",")) if word]


def _numbers(option: str, text: str | None) -> Sequence[int] | None:
    if text is None:
        return None
    words = _words(text)
    if not words or not all(word.isdecimal() for word in words):
        raise DataError(
            f"{option} was given {text[:40]!r}; expected numbers from 0, separated by commas, such "
            "as 0,2,4."
        )
    return [int(word) for word in words]
