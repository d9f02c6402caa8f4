"""The work that predictions are made from: counted without a GPU, and nothing is timed.

Operations come from `benchmarks.floors`.  Bytes of what is no product are those of one block, for
each token and number of the stream.  Dispatched operations and waits are counted on small models
of a few depths on the CPU, and are taken to grow with the depth as a loop over slots does; those
of a loop's passes are all alike, and more pairs take no more of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
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


NEAR = 0.75
"""The goal: this share of the ratio that exact arithmetic allows."""
Depth = tuple[int, int]
"""Blocks of the language model, and of the encoder."""
DEPTHS = ((2, 2), (3, 2), (4, 2), (2, 4), (4, 4))
"""Of the models that are counted."""
LOOP = "strip"
"""The sweep of which a loop's operations are counted."""
BATTERY = 32


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
        counts = Counts(setting, [(2, 2)] if given.tiny else DEPTHS)
        given.rows += sweeps(name, counts, pairs_for(name, given.tiny))
        if name == "Qwen2-VL-7B":
            pairs = 4 if given.tiny else BATTERY
            given.rows += battery(counts, pairs, pairs_for(name, given.tiny)[-1])
            given.rows += precision(name, counts)
            given.rows += profile(name, counts, pairs_for(name, given.tiny)[-1])
    given.rows += wrapper()


class Counts:
    """Counts the work of sweeps on one model."""

    def __init__(self, setting: Setting, depths: Sequence[Depth]) -> None:
        self.setting, self.arithmetic = setting, floors.of_setting(setting)
        self.name = setting.name.removeprefix("tiny ")
        model = setting.build("meta", torch.bfloat16)
        vision = model.require_vision()
        self.depth = model.cfg.n_layers, vision.n_layers
        self.traffic = traffic(model, setting.length)
        width = vision.n_heads * vision.d_head
        numbers = vision.n_layers * width * setting.patches(model)
        self.image_traffic = image_traffic(self.name) * numbers
        self._asked = dispatched(self.name, depths)

    def work(self, tool: str, sweep: str, pairs: int = 1, kind: str = "flop") -> Work:
        """Returns what a sweep over so many pairs takes."""
        flop, loops = self.flop(tool, [[sweep]]), tool != "ours"
        n_cells, source = len(self.arithmetic.cells(sweep)), sweep != "alpha"
        images = n_cells + source if tool == "usual" else 1 + source
        passes = n_cells + source if loops else 2 + source
        logits = passes * (self.setting.length if tool == "usual" else 1)
        operations, waits = self.asked(tool, sweep)
        costs = self.arithmetic.costs
        blocks = (flop - images * costs.vision - logits * costs.head) / costs.block
        wide = 1 if kind == "flop" else 2  # bytes are counted in bfloat16
        moved = wide * pairs * (blocks * self.traffic + images * self.image_traffic)
        weights = wide * passes * costs.n_layers * float(costs.block)
        return Work(flop * pairs, moved, weights, operations, waits, kind)

    def flop(self, tool: str, groups: Sequence[Sequence[str]], questions: int = 1) -> float:
        """Returns a tool's operations for groups of sweeps on one pair."""
        found = self.arithmetic.sweeps(groups, questions)
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
    name: str, depths: Sequence[Depth]
) -> dict[tuple[str, str], dict[Depth, tuple[int, int]]]:
    """Returns operations and own waits of each tool at each depth, counted on the CPU."""
    counts: dict[tuple[str, str], dict[Depth, tuple[int, int]]] = {}
    for depth in depths:
        setting = tiny(name, depth)
        model = setting.build("cpu", torch.float32)
        tools = workload.tools_for(model)
        for task in workload.tasks_for(model, setting, SWEEPS[name], 1, "cpu", 0):
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
            what = sweep_name(name, sweep, pairs)
            for tool in TOOLS:
                yield _entry(name, f"{what}: {tool}, s", counts.work(tool, sweep, pairs))
            bounds = counts.arithmetic.sweeps([[sweep]]).over
            for tool, bound in zip(TOOLS[1:], bounds, strict=True):
                goal = {"least": NEAR * bound} if pairs > 1 else {}
                yield _ratio(name, f"{what}: {tool} ÷ ours", what, tool) | goal


def battery(counts: Counts, pairs: int, batch: int) -> Iterator[dict[str, Any]]:
    """Yields the predictions of part 5: E4 and E2, on other pairs."""
    found = counts.arithmetic.sweeps(floors.PAPER)
    for tool in TOOLS:
        parts = [counts.work(tool, sweep, pairs) for group in floors.PAPER for sweep in group]
        flop = counts.flop(tool, floors.PAPER) * pairs
        share = flop / sum(part.flop for part in parts)  # runs that a group shares
        batches = pairs // batch
        yield _entry(
            "battery",
            f"battery, {pairs} pairs: {tool}, s",
            Work(
                flop,
                share * sum(part.bytes for part in parts),
                batches * share * sum(part.weights for part in parts),
                batches * sum(part.operations for part in parts),
                batches * sum(part.waits for part in parts),
            ),
        )
    for tool, bound in zip(TOOLS[1:], found.over, strict=True):
        what = f"battery, {pairs} pairs"
        yield _ratio("battery", f"{what}: {tool} ÷ ours", what, tool) | {"least": NEAR * bound}


def precision(name: str, counts: Counts) -> Iterator[dict[str, Any]]:
    """Yields the predictions of part 7."""
    for label, kind in (("fp32", "flop_fp32"), ("TF32", "flop_tf32")):
        for tool in TOOLS[:2]:
            work = counts.work(tool, "strip", 1, kind)
            yield _entry("fp32 and TF32", f"{name} strip, {label}: {tool}, s", work)


def profile(name: str, counts: Counts, pairs: int) -> Iterator[dict[str, Any]]:
    """Yields the predictions of part 9."""
    what = sweep_name(name, "strip", pairs)
    work = counts.work("ours", "strip", pairs)
    busy = {"part": "profile", "what": f"{what}: share of time busy", "busy": f"{what}: ours, s"}
    yield busy | {"least": 0.9}
    yield {
        "part": "profile",
        "what": f"{what}: waits of this library",
        "value": work.waits,
        "most": 12 + counts.depth[0],  # what the tests allow on a stand-in for a GPU
    }


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
