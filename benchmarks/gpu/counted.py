"""The work that predictions are made from: counted without a GPU, and nothing is timed.

Operations come from `benchmarks.floors`.  Bytes of what is no product are those of one block, for
each token and number of the stream.  Dispatched operations and waits are counted on small models
of a few depths on the CPU, and are taken to grow with the depth as a loop over slots does; those
of a loop's passes are all alike, and more pairs take no more of them.  There are fewer waits on a
GPU, for which some of what is counted here is on the host.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch

from benchmarks import floors
from benchmarks.common.parts import pixels
from benchmarks.common.published import Setting, tiny
from benchmarks.gpu import workload
from benchmarks.gpu.dispatched import Dispatched
from benchmarks.gpu.given import Given
from benchmarks.gpu.rates import Work
from benchmarks.gpu.workload import SWEEPS, TOOLS, pairs_for, setting_for, sweep_name
from benchmarks.throughput.ours import Ours


NEAR = 0.75
"""The goal: this share of the ratio that exact arithmetic allows."""
Depth = tuple[int, int]
"""Blocks of the language model, and of the encoder."""
DEPTHS = ((2, 2), (3, 2), (4, 2), (2, 4), (4, 4))
"""Of the models that are counted."""
LOOP = "strip"
"""The sweep of which a loop's operations are counted."""
BATTERY = 32
"""Pairs of prompts."""


def run(given: Given) -> None:
    """Notes what is predicted, with the goals that do not depend on a measurement."""
    for name, unit in (
        ("copy, B/s", "bytes"),
        ("product bf16, FLOP/s", "flop"),
        ("product fp32, FLOP/s", "flop_fp32"),
        ("product TF32, FLOP/s", "flop_tf32"),
        ("launch, s", "launch"),
        ("wait, s", "wait"),
    ):
        given.rows.append({"part": "machine", "what": name, "rate": unit})
    for name in SWEEPS:
        setting = setting_for(name, given.tiny)
        counts = Counts(given, setting, [(2, 2)] if given.tiny else DEPTHS)
        batches = pairs_for(name, given.tiny, given.questions)
        given.rows += sweeps(name, counts, batches)
        if name == "Qwen2-VL-7B":
            given.rows += battery(counts, battery_pairs(given), batches[-1])
            given.rows += precision(name, counts)
            given.rows += profile(name, counts, batches[-1])
    given.rows += wrapper()


def battery_pairs(given: Given) -> int:
    """Returns how many pairs of images the battery has."""
    return 4 if given.tiny else BATTERY // given.questions


class Counts:
    """Counts the work of sweeps on one model, with some questions about each image."""

    def __init__(self, given: Given, setting: Setting, depths: Sequence[Depth]) -> None:
        self.given, self.setting = given, setting
        self.questions, self.arithmetic = given.questions, floors.of_setting(setting)
        self.name = setting.name.removeprefix("tiny ")
        self.model = model = setting.build("meta", torch.bfloat16)
        vision = model.require_vision()
        self.depth = model.cfg.n_layers, vision.n_layers
        self.traffic = traffic(model, setting.length)
        width = vision.n_heads * vision.d_head
        numbers = vision.n_layers * width * setting.patches(model)
        self.image_traffic = image_traffic(self.name) * numbers
        self._asked = dispatched(given, self.name, depths)

    def work(self, tool: str, sweep: str, pairs: int = 1, kind: str = "flop") -> Work:
        """Returns what a sweep over so many pairs of images takes."""
        flop, prompts = self.flop(tool, [[sweep]]), pairs * self.questions
        n_cells, source = len(self.arithmetic.cells(sweep)), sweep != "alpha"
        images = n_cells + source if tool == "usual" else (1 + source) / self.questions
        grown = self.grown(sweep, pairs) if tool == "ours" else 0
        passes = 1 + source + grown if tool == "ours" else n_cells + source
        logits = (n_cells + source) * (self.setting.length if tool == "usual" else 1)
        operations, waits = self.asked(tool, sweep)
        # One growing pass is counted; the others are taken to be as a loop's passes.
        operations += max(0, grown - 1) * self.asked("careful", sweep)[0] / (n_cells + source)
        costs = self.arithmetic.costs
        blocks = (flop - images * costs.vision - logits * costs.head) / costs.block
        wide = 1 if kind == "flop" else 2  # bytes are counted in bfloat16
        moved = wide * prompts * (blocks * self.traffic + images * self.image_traffic)
        weights = wide * passes * costs.n_layers * float(costs.block)
        return Work(flop * prompts, moved, weights, operations, waits, kind)

    def grown(self, sweep: str, pairs: int) -> int:
        """Returns how many growing passes are planned."""
        (task,) = workload.tasks_for(
            replace(self.given, device="cpu"), self.model, self.setting, (sweep,), pairs
        )
        return Ours(self.model).planned(task).passes

    def flop(self, tool: str, groups: Sequence[Sequence[str]]) -> float:
        """Returns a tool's operations for groups of sweeps on one pair of prompts."""
        found = self.arithmetic.sweeps(groups, self.questions)
        return {"ours": found.floor, "careful": found.careful, "usual": found.usual}[tool]

    def asked(self, tool: str, sweep: str) -> tuple[float, float]:
        """Returns dispatched operations and waits at the depth of the model."""
        if tool == "ours":
            return at_depth(self._asked[tool, sweep], self.depth)
        passes, counted = (
            len(self.arithmetic.cells(name)) + (name != "alpha") for name in (sweep, LOOP)
        )
        operations, waits = at_depth(self._asked[tool, LOOP], self.depth)
        return operations * passes / counted, waits * passes / counted


def at_depth(counts: Mapping[Depth, tuple[int, int]], depth: Depth) -> tuple[float, float]:
    """Returns operations and waits at a depth from those at others."""
    if depth in counts:
        return counts[depth]
    terms = np.array([_terms(*each) for each in counts])
    fitted, *_ = np.linalg.lstsq(terms, np.array(list(counts.values())), rcond=None)
    operations, waits = _terms(*depth) @ fitted
    return float(operations), float(waits)


def _terms(blocks: int, encoder: int) -> np.ndarray:
    # A loop over the slots runs all blocks for each slot; the usual one the encoder as well.
    return np.array([1, blocks, blocks**2, encoder, blocks * encoder], dtype=float)


def traffic(model: Any, length: int) -> float:
    """Returns the bytes that a block moves for each token, beside its products."""
    language = model.hf_model.model.language_model
    layers, counts = language.layers, []
    embeds = torch.zeros(1, length, model.cfg.d_model, device="meta", dtype=model.cfg.dtype)
    for n in (1, 2):
        language.layers = layers[:n]
        masks = dict.fromkeys(("full_attention", "sliding_attention"))
        with Dispatched("meta") as found, torch.no_grad():
            language(inputs_embeds=embeds, attention_mask=masks, use_cache=False)
        counts.append(found.bytes)
    language.layers = layers
    return (counts[1] - counts[0]) / length


def image_traffic(name: str) -> float:
    """Returns the bytes that a block of the encoder moves for each number of its stream."""
    found = []
    for blocks in (2, 4):
        setting = tiny(name, (2, blocks))
        model = setting.build("cpu", torch.float32)
        given = pixels(setting.inputs(model, 1, 0))
        with Dispatched() as count, torch.no_grad():
            model.hf_model.model.get_image_features(**given)  # type: ignore[union-attr]
        found.append(count.bytes)
    vision = model.require_vision()
    numbers = 2 * vision.n_heads * vision.d_head * setting.patches(model)
    return (found[1] - found[0]) / 2 / numbers  # half of it in bfloat16


def dispatched(
    given: Given, name: str, depths: Sequence[Depth]
) -> dict[tuple[str, str], dict[Depth, tuple[int, int]]]:
    """Returns operations and own waits of each tool at each depth, counted on the CPU."""
    counts: dict[tuple[str, str], dict[Depth, tuple[int, int]]] = {}
    for depth in depths:
        setting = tiny(name, depth)
        model = setting.build("cpu", torch.float32)
        tools = workload.tools_for(model)
        on_cpu = replace(given, device="cpu")
        for task in workload.tasks_for(on_cpu, model, setting, SWEEPS[name], 1):
            for who, tool in tools.items():
                if who != "ours" and task.name != LOOP:
                    continue
                with torch.no_grad():
                    tool.run(task)  # what is verified once is verified before
                    with Dispatched() as found:
                        tool.run(task)
                counts.setdefault((who, task.name), {})[depth] = found.operations, found.own
    return counts


def sweeps(name: str, counts: Counts, batches: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yields the predictions of parts 4 and 6."""
    for pairs in batches:
        for sweep in SWEEPS[name]:
            what = sweep_name(f"{name} {sweep}", pairs, counts.questions)
            for tool in TOOLS:
                yield _entry(name, f"{what}: {tool}, s", counts.work(tool, sweep, pairs))
            bounds = counts.arithmetic.sweeps([[sweep]], counts.questions).over
            for tool, bound in zip(TOOLS[1:], bounds, strict=True):
                goal = {"least": NEAR * bound} if pairs > 1 else {}
                yield _ratio(name, f"{what}: {tool} ÷ ours", what, tool) | goal


def battery(counts: Counts, pairs: int, batch: int) -> Iterator[dict[str, Any]]:
    """Yields the predictions of part 5: E4 and E2, on other pairs."""
    found = counts.arithmetic.sweeps(floors.PAPER, counts.questions)
    what = sweep_name("battery", pairs, counts.questions)
    for tool in TOOLS:
        parts = [counts.work(tool, sweep, pairs) for group in floors.PAPER for sweep in group]
        flop = counts.flop(tool, floors.PAPER) * pairs * counts.questions
        share = flop / sum(part.flop for part in parts)  # runs that a group shares
        batches = pairs // batch
        yield _entry(
            "battery",
            f"{what}: {tool}, s",
            Work(
                flop,
                share * sum(part.bytes for part in parts),
                batches * share * sum(part.weights for part in parts),
                batches * sum(part.operations for part in parts),
                batches * sum(part.waits for part in parts),
            ),
        )
    for tool, bound in zip(TOOLS[1:], found.over, strict=True):
        yield _ratio("battery", f"{what}: {tool} ÷ ours", what, tool) | {"least": NEAR * bound}


def precision(name: str, counts: Counts) -> Iterator[dict[str, Any]]:
    """Yields the predictions of part 7."""
    for label, kind in (("fp32", "flop_fp32"), ("TF32", "flop_tf32")):
        for tool in TOOLS[:2]:
            work = counts.work(tool, "strip", 1, kind)
            yield _entry("fp32 and TF32", f"{name} strip, {label}: {tool}, s", work)


def profile(name: str, counts: Counts, pairs: int) -> Iterator[dict[str, Any]]:
    """Yields the predictions of part 9."""
    what = sweep_name(f"{name} strip", pairs, counts.questions)
    busy = {"part": "profile", "what": f"{what}: share of time busy", "busy": f"{what}: ours, s"}
    yield busy | {"least": 0.9}
    allowed = 12 + counts.depth[0]  # by the tests, on a stand-in for a GPU
    waits = {"part": "profile", "what": f"{what}: waits of this library"}
    yield waits | {"value": float(allowed), "most": float(allowed)}


def wrapper() -> Iterator[dict[str, Any]]:
    """Yields the predictions of part 8: ratios to the plain model."""
    for what, most in (
        ("no hooks ÷ plain", 1.02),
        ("one hook that reads ÷ plain", 1.05),
        ("cache of residuals ÷ bare hooks", 1.1),
    ):
        yield {"part": "wrapper", "what": what, "value": 1.0, "most": most}


def _entry(part: str, what: str, work: Work) -> dict[str, Any]:
    return {"part": part, "what": what, "work": asdict(work)}


def _ratio(part: str, name: str, what: str, tool: str) -> dict[str, Any]:
    return {"part": part, "what": name, "ratio": [f"{what}: {tool}, s", f"{what}: ours, s"]}
