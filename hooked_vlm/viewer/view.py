"""`view` computes what one run on one picture shows, and `View` writes it as one HTML page."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
import xarray as xr
from PIL import Image

from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.kinds import File, Model, Name, NotNegative
from hooked_vlm.errors import DataError, counted, did_you_mean
from hooked_vlm.experiments.loop import silent
from hooked_vlm.hooks.files import whole_file
from hooked_vlm.inputs.prepared import Inputs
from hooked_vlm.regions.grid import TokenGrid
from hooked_vlm.regions.region import Region
from hooked_vlm.viewer import measured
from hooked_vlm.viewer.measured import SlotProbes
from hooked_vlm.viewer.order_probes import slots_of
from hooked_vlm.viewer.page import page_of


PANELS = ("attention", "lens", "patches", "probes")
N_ANSWERS = 4
"""Answers that are followed where none are named: the most probable next tokens."""
LIMIT_MB = 25


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """What `view` computed of one run on one picture: numbers in full precision, and their page."""

    facts: Mapping[str, str]
    """Model, question, dtype and so on, as the page states them."""
    image: Image.Image
    grid: TokenGrid
    tokens: Sequence[str]
    """The text of each position of the prompt; of visual tokens their cell."""
    answers: Mapping[str, int]
    """The followed answers, and the token id of each."""
    slots: Mapping[int, str]
    """The hook name of each slot."""
    layers: Mapping[int, str]
    """The hook name of each layer's attention pattern."""
    arrays: Mapping[str, xr.DataArray]
    """By name: `attention` (layer, query, head, row, col), `attention_share` (layer, query, head),
    `lens` (slot, pos, answer), `top_ids` and `top_probabilities` (slot, pos, rank), `final`
    (answer), `patches` (slot, place, answer), `probes.NAME` (slot, class, row, col)."""
    words: Mapping[int, str]
    """The text of every token id in `top_ids`."""
    regions: Mapping[str, Region]
    """Regions whose patches are in `patches`, after the cells in raster order."""
    probes: Mapping[str, SlotProbes]
    notes: Mapping[str, str] = field(default_factory=dict)
    """One sentence on how a panel's numbers were computed, by panel."""

    def __repr__(self) -> str:
        panels = ", ".join(sorted({name.partition(".")[0] for name in self.arrays}))
        return f"View({self.facts['model']}, {self.grid.describe()}; {panels})"

    @checked(DataError)
    def to_html(self, path: File | None = None) -> str:
        """Returns the page: one HTML text that loads nothing; writes it to `path` if one is given.

        Attention is embedded in 16 bits, in steps of 1/65535 of its range, all else in 32 bits; the
        page states each step.  The file is written as a whole or not at all.

        Raises `DataError` for a path that cannot be written to and for numbers that are not finite.
        """
        page = page_of(self)
        if path is not None:
            with whole_file(path, "page") as part:
                part.write_text(page, encoding="utf-8")
        return page

    def _repr_html_(self) -> str:
        # A frame keeps the page's style and its link from those of the notebook.
        return (
            f'<iframe title="{escape(repr(self))}" srcdoc="{escape(self.to_html())}" '
            'style="width: 100%; height: 900px; border: 1px solid #8888"></iframe>'
        )


@checked(DataError, but=("source",))
def view(
    model: Model,
    image: Image.Image,
    question: str,
    *,
    source: Image.Image | None = None,
    answers: Sequence[Name] | None = None,
    regions: Mapping[str, Region] | None = None,
    probes: Mapping[str, SlotProbes] | None = None,
    panels: Sequence[str] = ("attention", "lens", "patches"),
    layers: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
    limit_mb: NotNegative = LIMIT_MB,
    system: str | None = None,
    chat: bool | None = None,
    on_progress: Callable[[int, int], None] = silent,
) -> View:
    """Returns what a model reads from a picture and a question, for an interactive page.

    The panels are those named and, where `probes` are given, `"probes"`:

    - `"attention"`: the attention of every token to the picture, for `layers` (default: all).
    - `"lens"`: what the logit lens reads at every position, for `slots` (default: all).
    - `"patches"`: by how much an edit of each cell, and of each of `regions` (default: thirds of
      columns and rows, and the whole picture), at each slot changes the log odds of `answers`
      against all other tokens.  The edit writes the activations of the run on `source`, a picture
      of the same size with the same question; without one, the mean over the picture's cells.
    - `"probes"`: the class probabilities of fitted `probes` in every cell; see `order_probes`.

    `answers` are single tokens (default: the four most probable next ones).  `system` and `chat`
    are those of `model.prepare`.  `on_progress` is called with the numbers of done and of all units
    of work.  Load the model with `attn_implementation="eager"`, so that all panels show the same
    run.

    Raises `DataError`, before a model runs, for an unknown panel, slot or layer, for no answer and
    for a page that would be larger than `limit_mb`, and what `prepare`, `Patch` and
    `attention_maps` raise.

    >>> from hooked_vlm import HookedVLM
    >>> model = HookedVLM.from_pretrained("tiny-qwen2-vl", attn_implementation="eager")
    >>> seen = view(model, Image.new("RGB", (64, 32), "red"), "What is this?", panels=["lens"])
    >>> seen.arrays["lens"].sizes["slot"], seen.slots[1]
    (7, 'blocks.0.hook_resid_post')
    >>> page = seen.to_html()
    """
    if answers is not None and not len(answers):
        raise DataError(
            "answers is empty; expected single tokens, or None for the most probable next ones."
        )
    how = {"system": system, "chat": chat}
    work = _Work(model, image, question, source, how, on_progress)
    work.check(list(panels), layers, slots, probes or {}, regions, limit_mb)
    return work.done(answers)


def check_view(
    model: Any,
    image: Image.Image,
    question: str,
    *,
    source: Image.Image | None = None,
    panels: Sequence[str],
    layers: Sequence[int] | None = None,
    slots: Sequence[int] | None = None,
    limit_mb: float | int = LIMIT_MB,
    system: str | None = None,
) -> None:
    """Raises what `view` would raise before its model runs: also before probes are fitted."""
    work = _Work(model, image, question, source, {"system": system}, silent)
    work.check(list(panels), layers, slots, {}, None, limit_mb)


def layers_of(model: Model, layers: Sequence[int] | None) -> list[int]:
    """Returns the layers whose attention is kept (default: all); raises `DataError` for others."""
    every = range(model.cfg.n_layers)
    chosen = list(every) if layers is None else list(dict.fromkeys(layers))
    if not chosen or not set(chosen) <= set(every):
        raise DataError(f"layers={layers} was given; expected some of 0 to {every[-1]}.")
    return chosen


class _Work:
    """The parts of a view, checked before the first one runs."""

    def __init__(
        self,
        model: Any,
        image: Image.Image,
        question: str,
        source: Image.Image | None,
        kwargs: Mapping[str, Any],
        on_progress: Callable[[int, int], None],
    ) -> None:
        self.model, self.image, self.on_progress = model, image, on_progress
        self.question, self.source = question, source
        self.inputs: Inputs = model.prepare(image, question, **kwargs)
        self.grid = self.inputs.grid
        self.other = None if source is None else model.prepare(source, question, **kwargs)
        self.length = self.inputs["input_ids"].shape[-1]

    def check(
        self,
        panels: Sequence[str],
        layers: Sequence[int] | None,
        slots: Sequence[int] | None,
        probes: Mapping[str, SlotProbes],
        regions: Mapping[str, Region] | None,
        limit_mb: float | int,
    ) -> None:
        """Raises what is wrong with the arguments; counts the units of work."""
        for panel in panels:
            if panel not in PANELS:
                raise DataError(
                    f"panels has {panel!r}; expected some of {', '.join(PANELS)}."
                    f"{did_you_mean(panel, PANELS)}"
                )
        self.panels = [p for p in PANELS if p in panels or (p == "probes" and probes)]
        if "probes" in self.panels and not probes:
            raise DataError(
                "panels has 'probes', and no probes were given. Give probes=order_probes(model)."
            )
        if not self.panels:
            raise DataError(f"No panel was named; expected some of {', '.join(PANELS)}.")
        self.layers = layers_of(self.model, layers)
        self.slots, self.probes = slots_of(self.model, slots), dict(probes)
        for name, own in self.probes.items():
            slots_of(self.model, list(own.by_slot))
            if "." in name:
                raise DataError(f"A probe is named {name!r}; expected a name without a full stop.")
        self.regions = _thirds(self.grid) if regions is None else dict(regions)
        for region in self.regions.values():
            region.check_same_grid(self.grid.all())
            region.check_not_empty("a patch")
        cells = [(r, c) for r in range(self.grid.rows) for c in range(self.grid.cols)]
        self.places = [self.grid.cells([cell]) for cell in cells] + list(self.regions.values())
        if "patches" in self.panels:
            first = measured.edit(min(self.slots), self.grid.all(), self.inputs, self.other)
            first.check(self.model, self.inputs)
        self._check_size(limit_mb)
        self._units = {
            "attention": 1,
            "lens": measured.lens_passes(self.model, self.length),
            "patches": len(self.slots) * len(self.places),
            "probes": 1,
        }
        self._total = sum(self._units[panel] for panel in self.panels)
        self._finished = 0

    def _check_size(self, limit_mb: float | int) -> None:
        """Raises `DataError` for a page above the limit, with what makes it smaller."""
        size = self._megabytes()
        if sum(size.values()) <= limit_mb:
            return
        largest = max(size, key=lambda panel: size[panel])
        name = "layers" if largest == "attention" else "slots"
        n = self.model.cfg.n_layers + (name == "slots")
        raise DataError(
            f"The page would have up to {sum(size.values()):.3g} MB, of which {largest} takes "
            f"{size[largest]:.3g}: {counted(len(getattr(self, name)), name[:-1])}, "
            f"{counted(self.length, 'token')} and {counted(len(self.grid), 'cell')}; limit_mb is "
            f"{limit_mb:g}. Give fewer {name}, such as {name}=range(0, {n}, {max(2, -(-n // 6))}), "
            "a smaller picture, or a larger limit_mb."
        )

    def _megabytes(self) -> dict[str, float]:
        """Returns the size of each panel's numbers before compression, in MB."""
        cells, slots = len(self.grid), len(self.slots)
        numbers = {
            "attention": len(self.layers) * self.length * self.model.cfg.n_heads * cells,
            "lens": slots * self.length * (3 * measured.TOP + N_ANSWERS),
            "patches": slots * len(self.places) * N_ANSWERS,
            "probes": sum(cells * len(p.by_slot) * len(p.classes) for p in self.probes.values()),
        }
        size = {"attention": 2}
        return {p: numbers[p] * size.get(p, 4) * 4 / 3 / 1e6 for p in self.panels}

    def done(self, answers: Sequence[str] | None) -> View:
        """Runs the model and returns the view."""
        model, inputs = self.model, self.inputs
        ids = None if answers is None else [model.to_single_token(word) for word in answers]
        self._step(0)
        read = {slot for own in self.probes.values() for slot in own.by_slot}
        # The lens reads the streams of all slots; logits of other positions are not shown.
        sites = slots_of(model, None if "lens" in self.panels else [*self.slots, *read])
        with torch.no_grad():
            logits, cache = model.run_with_cache(inputs, list(sites.values()), logits_to_keep=1)
        last = logits[0, -1].float()
        ids = last.topk(N_ANSWERS).indices.tolist() if ids is None else list(dict.fromkeys(ids))
        found = {"final": xr.DataArray(last.softmax(-1)[ids].cpu().numpy(), dims="answer")}
        layers: dict[int, str] = {}
        if "attention" in self.panels:
            found |= measured.attention(model, inputs, self.grid, self.layers)
            layers = {layer: f"blocks.{layer}.attn.hook_pattern" for layer in self.layers}
            self._step(1)
        if "lens" in self.panels:
            slots = list(self.slots)
            found |= measured.lens(model, cache, self.length, slots, ids, lambda: self._step(1))
        for name, own in self.probes.items() if "probes" in self.panels else ():
            names = slots_of(model, list(own.by_slot))
            found[f"probes.{name}"] = measured.probe_maps(cache, names, self.grid, own)
        self._step(1 if "probes" in self.panels else 0)
        if "patches" in self.panels:
            found["patches"] = self._patches(ids)
        top = found["top_ids"].values.flatten().tolist() if "top_ids" in found else []
        text = {i: model.tokenizer.decode(i) for i in sorted({*top, *ids})}
        return View(
            facts=self._facts(found),
            image=self.image,
            grid=self.grid,
            tokens=inputs.to_str_tokens()[0],
            answers=_named(ids, text),
            slots=self.slots,
            layers=layers,
            arrays=found,
            words=text,
            regions=self.regions if "patches" in self.panels else {},
            probes=self.probes,
            notes=self._notes(),
        )

    def _patches(self, ids: Sequence[int]) -> xr.DataArray:
        start = self._finished

        def moved(done: int, _: int) -> None:
            self._step(start + done - self._finished)

        return measured.effects(
            self.model, self.inputs, self.other, self.places, list(self.slots), ids, moved
        )

    def _step(self, units: int) -> None:
        self._finished += units
        self.on_progress(self._finished, self._total)

    def _facts(self, found: Mapping[str, xr.DataArray]) -> dict[str, str]:
        cfg, given = self.model.cfg, self.inputs["input_ids"]
        facts = {
            "model": str(cfg.model_name),
            "blocks": f"{cfg.n_layers}, each of {counted(cfg.n_heads, 'head')} "
            f"and width {cfg.d_model}",
            "run": f"{str(cfg.dtype).removeprefix('torch.')} on {self.model.device}, attention "
            f"{cfg.attn_implementation}",
            "picture": self.grid.describe(),
            "question": self.question,
            "prompt": f"{counted(given.shape[-1], 'token')}, of which {len(self.grid)} are cells",
        }
        facts["software"] = ", ".join(f"{n} {version(n)}" for n in ("hooked-vlm", "transformers"))
        if "patches" in found:
            facts["sweep of patches"] = str(found["patches"].attrs["engine"])
        return facts

    def _notes(self) -> dict[str, str]:
        written = (
            "the activations of the same place in the run on the other picture"
            if self.other is not None
            else "the mean over all cells of the picture at that slot"
        )
        notes = {"patches": f"The edit writes {written}."}
        return notes | {f"probes.{name}": own.about for name, own in self.probes.items()}


def _named(ids: Sequence[int], text: Mapping[int, str]) -> dict[str, int]:
    """Returns tokens by their text; of equal texts (parts of characters) each has its id too."""
    texts = [text[i] for i in ids]
    return {
        one if texts.count(one) == 1 else f"{one} [{i}]": i
        for one, i in zip(texts, ids, strict=True)
    }


def _thirds(grid: TokenGrid) -> dict[str, Region]:
    """Returns thirds of the grid's columns and rows, where it has three, and the whole picture."""
    found = {"whole picture": grid.all()}
    for kind, n, word in (("vertical", grid.cols, "columns"), ("horizontal", grid.rows, "rows")):
        edges = [round(n * third / 3) for third in range(4)]
        for start, stop in pairwise(edges) if n >= 3 else ():
            name = f"{word} {start}–{stop - 1}" if stop - start > 1 else f"{word[:-1]} {start}"
            found[name] = grid.strip(kind, start, stop, name)
    return found
