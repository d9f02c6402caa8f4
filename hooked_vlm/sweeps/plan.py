"""What a sweep will do, and what it costs, before it runs: also on the `meta` device.

Costs are floating-point operations, counted from module sizes.  A linear map costs two
operations for each weight and row, attention four for each query, key and number of a head.
Norms, activations and the embedding are left out: they are below a hundredth.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any, overload

from torch import Tensor, nn

from hooked_vlm.anatomy.parts import is_linear
from hooked_vlm.arguments.checked import checked
from hooked_vlm.arguments.displayed import brief, html_block, html_table
from hooked_vlm.arguments.kinds import Count
from hooked_vlm.engine.batch import goes_alike
from hooked_vlm.engine.budget import PASS_TOKENS, row_bytes, rows_within
from hooked_vlm.engine.folded_run import expected_fold, folds_under
from hooked_vlm.engine.folding import Fold
from hooked_vlm.engine.stages import RowPlan, ids_of, job_of, last_kept
from hooked_vlm.engine.starts import firsts_of, groups_of, starts_of, whole_rows
from hooked_vlm.engine.vision import tower_depth
from hooked_vlm.errors import InterventionError, counted
from hooked_vlm.hooks.names import last_block
from hooked_vlm.inputs.rows import known_grids
from hooked_vlm.interventions.chain import Cell, flattened, source_of
from hooked_vlm.interventions.recording import Recording
from hooked_vlm.model.memory import size_text


@dataclass(frozen=True)
class Costs:
    """Operations of a model's parts, for one prompt or row."""

    block: int
    """Of one block's linear maps, for one position."""
    trimmed: int
    """The share of that which the last block needs for its last position alone."""
    attention: int
    """Of one block's attention, for one query and one key."""
    head: int
    """Of the vocabulary, for one position."""
    n_layers: int
    vision: int
    """Of the vision encoder and projector, for all images of the inputs."""

    def rows(
        self, n_rows: int, n: int, length: int, first: int = 0, *, last_only: bool = False
    ) -> int:
        """Returns what `n_rows` rows of `n` positions cost in blocks `first` and above.

        They see `length` positions.  With `last_only` the last block runs trimmed.
        """
        n_blocks = self.n_layers - first
        if n_blocks <= 0:
            return 0
        each = n * self.block + n * length * self.attention
        total = n_blocks * each
        if last_only:
            total -= (n - 1) * self.trimmed
        return n_rows * total


def costs_of(model: Any, inputs: Mapping[str, Any]) -> Costs:
    """Returns a model's costs; blocks are taken to be as costly as their mean."""
    lm, whole = model.anatomy.lm, model.hf_model
    blocks = [whole.get_submodule(block.path) for block in lm.blocks]
    cfg = model.cfg
    last = lm.blocks[-1]
    paths = [last.attn and last.attn.out, last.mlp and last.mlp.path]
    trimmed = sum(_linear(whole.get_submodule(path)) for path in paths if path)
    return Costs(
        block=sum(_linear(block) for block in blocks) // len(blocks),
        trimmed=trimmed,
        attention=4 * cfg.n_heads * cfg.d_head,
        head=2 * cfg.d_model * cfg.d_vocab,
        n_layers=len(blocks),
        vision=_vision(model, inputs),
    )


def _linear(module: nn.Module) -> int:
    return 2 * sum(
        m.in_features * m.out_features  # type: ignore[operator]
        for m in module.modules()
        if is_linear(m) and not m._modules  # an adapter's layer holds its maps inside
    )


def _vision(model: Any, inputs: Mapping[str, Any]) -> int:
    vision = model.anatomy.vision
    grids = known_grids(model, inputs)
    if vision is None or not grids:
        return 0
    total = 0
    blocks = [model.hf_model.get_submodule(block.path) for block in vision.blocks]
    width = model.cfg.vision.n_heads * model.cfg.vision.d_head
    for grid in grids:
        n = grid.patch_rows * grid.patch_cols
        total += sum(n * _linear(block) + 4 * n * n * width for block in blocks)
        if model.anatomy.projector:
            projector = model.hf_model.get_submodule(model.anatomy.projector)
            total += len(grid) * _linear(projector)
    patches = inputs.get("pixel_values")
    if isinstance(patches, Tensor):
        total += 2 * prod(patches.shape) * width
    return total


@dataclass(frozen=True)
class Explanation:
    """Operations and memory of a sweep; `print` it."""

    n_cells: int
    n_prompts: int
    length: int
    naive: float
    """Operations of one whole pass for each cell, and one for each source."""
    planned: float
    """Operations of what will run, the clean run and the sources included."""
    floor: float
    """Operations of what changes: each cell from its own first block and position on."""
    passes: int
    rows: int
    peak: int
    """Bytes of the largest pass beside the weights, about."""
    shortcuts: tuple[str, ...]
    """What is left out, and what that saves, in words."""
    obstacles: tuple[str, ...] = ()
    """Why cells run one by one, or rows carry more than they need."""

    def __str__(self) -> str:
        """Says it in a few lines."""
        lines = [
            f"{counted(self.n_cells, 'cell')} x {counted(self.n_prompts, 'prompt')} of "
            f"{self.length} positions: {_flops(self.planned)} in "
            f"{counted(self.passes, 'pass', 'passes')} of {counted(self.rows, 'row')}, against "
            f"{_flops(self.naive)} for a pass each ({self.naive / self.planned:.1f} times) and "
            f"{_flops(self.floor)} at least ({self.planned / self.floor:.2f} times that).",
            f"About {size_text(self.peak)} beside the weights.",
            *self.shortcuts,
            *self.obstacles,
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _RowShape:
    """What one cell's rows look like."""

    rows: int
    carried: int
    """Positions that a row carries."""
    seen: int
    """Positions that its last one sees."""

    def after(self, start: int) -> "_RowShape":
        """Returns rows that carry the positions from `start` on alone."""
        return replace(self, carried=self.seen - start)

    def cost(self, costs: Costs, first: int = 0, *, last_only: bool = False) -> int:
        """Returns operations of blocks `first` and above."""
        last_only = last_only and first < costs.n_layers
        return costs.rows(self.rows, self.carried, self.seen, first, last_only=last_only)


def _row_shape(fold: Fold | None, batch: int, length: int, start: int) -> _RowShape:
    """Returns one cell's rows from a position on, prompts that share an image in one row."""
    layout = fold and fold.paying_layout(start)
    if not layout:
        return _RowShape(batch, length - start, length)
    return _RowShape(layout.n_rows, layout.width, layout.width + layout.kept_places.shape[1])


def _one_by_one(
    n_cells: int, batch: int, length: int, naive: float, peak: int, missing: str
) -> Explanation:
    """Explains a sweep with a pass for each cell, because of some that rows cannot carry."""
    reason = f"Rows cannot carry what {missing} would change: cells run one by one."
    sizes = (n_cells, batch, length, naive, naive, naive, n_cells, n_cells * batch, peak)
    return Explanation(*sizes, (), (reason,))


def _common(fold: Fold | None, batch: int) -> tuple[str, ...]:
    if fold is None:
        return ()
    n_rows = fold.layout(0).n_rows
    said = f"Prompts that begin alike, image included, share rows: {batch} in {n_rows}."
    return (said,)


class CheckedCells(Sequence[Cell]):
    """A sweep's cells, checked, for one model; `explain` says what running them takes."""

    def __init__(self, model: Any, inputs: Mapping[str, Any], cells: Sequence[Cell]) -> None:
        """Takes cells whose interventions have been checked."""
        self.model, self.inputs, self.cells = model, inputs, list(cells)

    @overload
    def __getitem__(self, index: int) -> Cell: ...
    @overload
    def __getitem__(self, index: slice) -> list[Cell]: ...
    def __getitem__(self, index: int | slice) -> Cell | list[Cell]:
        return self.cells[index]

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        return f"CheckedCells({counted(len(self), 'cell')} for {self.model.cfg.model_name!r})"

    def _repr_html_(self) -> str:
        rows = [(brief(c.coords), ", ".join(map(str, c.interventions))) for c in self.cells[:9]]
        return html_block(repr(self), html_table(("first cells", "interventions"), rows))

    def __iter__(self) -> Iterator[Cell]:
        return iter(self.cells)

    @checked(InterventionError)
    def explain(
        self,
        pass_tokens: Count = PASS_TOKENS,
        memory: Count | None = None,
        **forward_kwargs: Any,
    ) -> Explanation:
        """Returns which shortcuts apply and what they save; nothing runs.

        Takes the keyword arguments of `Sweep.run`.  Whether positions before the first
        change look ahead is known once the clean run has shown its masks; here it is assumed
        that none does, but in an image block where the inputs mark one (`token_type_ids`).
        """
        model, inputs = self.model, self.inputs
        model.require_call(inputs, forward_kwargs)
        costs = costs_of(model, inputs)
        if (ids := ids_of(inputs)) is None:
            raise InterventionError(
                "explain needs the length of the prompts, and these inputs have no input_ids. "
                "Sweep.run takes them, one pass for each cell."
            )
        batch, length = ids.shape
        keep = forward_kwargs.get("logits_to_keep", 0)
        keep = len(keep) if isinstance(keep, Tensor) else keep or length
        fold = self._fold(last_kept(forward_kwargs) or length)
        whole = costs.vision + costs.rows(batch, length, length) + batch * keep * costs.head
        clean = costs.vision + _row_shape(fold, batch, length, 0).cost(costs)
        clean += batch * keep * costs.head
        sources = self._sources()
        naive = float(whole * (len(self.cells) + len(sources)))
        found = [job_of(model, inputs, cell, i) for i, cell in enumerate(self.cells)]
        jobs = [job for job in found if job is not None]
        reason = whole_rows(model)
        starts = self._inside_images(starts_of(jobs, forward_kwargs, inputs))
        starts = [0] * len(starts) if reason else starts
        brought = self._brings_all(jobs, starts)
        # Rows that bring all of themselves along need no clean run, once that is proved.
        fixed = float(costs.vision * self._below_all(jobs) if brought else clean)
        fixed += sum(self._early(costs, job) for job in jobs)
        for source, layer in sources:
            depth = costs.n_layers if layer is None else layer + 1
            shape = _row_shape(expected_fold(model, source), batch, length, 0)
            fixed += costs.vision + shape.cost(costs, costs.n_layers - depth)
        if len(jobs) != len(found):
            missing = counted(len(found) - len(jobs), "cell")
            peak = batch * row_bytes(model, length, 0, keep, model.cfg.dtype.itemsize)
            return _one_by_one(len(found), batch, length, naive, peak, missing)
        firsts = self._inside_images(firsts_of(jobs, forward_kwargs, inputs))
        planned, floor, proof, passes, rows, peak = fixed, fixed, float(clean * brought), 0, 0, 0
        one = _RowShape(batch, length, length)
        heads = batch * keep * costs.head

        def cost(job: RowPlan, shape: _RowShape) -> int:
            n_heads = min(heads, batch * shape.carried * costs.head)
            return shape.cost(costs, job.stage, last_only=keep == 1) + n_heads

        for job, start in zip(jobs, firsts, strict=True):
            floor += cost(job, _row_shape(fold if goes_alike(job) else None, batch, length, start))
        for start, whole_group in groups_of(jobs, starts):
            shapes = {
                alike: _row_shape(fold if alike else None, batch, length, start)
                for alike in (True, False)
            }
            proof += whole
            for job in (RowPlan(-1, whole_group[0].stage, start), whole_group[0]):
                proof += cost(job, one.after(start))
            for alike, shape in shapes.items():
                group = [job for job in whole_group if goes_alike(job) is alike]
                sizes = (shape.seen, shape.seen - shape.carried, keep, model.cfg.dtype.itemsize)
                size = rows_within(model, *sizes, pass_tokens=pass_tokens, memory=memory)
                per_pass = max(1, size // shape.rows)
                for i in range(0, len(group), per_pass):
                    chunk = group[i : i + per_pass]
                    planned += sum(cost(job, shape) for job in chunk)
                    passes, rows = passes + 1, rows + len(chunk) * shape.rows
                    peak = max(peak, len(chunk) * shape.rows * row_bytes(model, *sizes))
        said = (*self._shortcuts(costs, jobs, starts, brought), *_common(fold, batch))
        return Explanation(
            len(found), batch, length, naive, planned, floor, passes, rows, peak,
            (*said, _proof(proof)), (f"Rows carry all positions: {reason}.",) if reason else (),
        )  # fmt: skip

    def _fold(self, kept: int) -> Fold | None:
        """Returns which prompts of the clean run will share rows, with so many logits kept."""
        if self.cells and not folds_under(self.model, self.cells[0].base):
            return None
        return expected_fold(self.model, self.inputs, kept)

    def _brings_all(self, jobs: Sequence[RowPlan], starts: Sequence[int]) -> bool:
        """Whether rows bring all of themselves along, so that no clean run is made."""
        if not jobs or any(cell.base for cell in self.cells):
            return False
        return all(job.front for job in jobs) and not any(starts)

    def _early(self, costs: Costs, job: RowPlan) -> float:
        """Returns what making the rows of a job costs that acts before the blocks."""
        return costs.vision * (1 - self._below(job)) if job.front else 0.0

    def _below(self, job: RowPlan) -> float:
        """Returns the share of the encoder that is below a job's first edit."""
        if not self.model.anatomy.vision:
            return 1.0
        return tower_depth(self.model, job.front) / max(1, self.model.cfg.vision.n_layers)

    def _below_all(self, jobs: Sequence[RowPlan]) -> float:
        """Returns the share of the encoder that runs once for all jobs."""
        return min(map(self._below, jobs))

    def _inside_images(self, starts: list[int]) -> list[int]:
        """Returns where rows start whose image blocks see all of themselves."""
        if "token_type_ids" not in self.inputs:
            return starts
        grids = known_grids(self.model, self.inputs)
        spans = [(int(grid.positions.min()), int(grid.positions.max())) for grid in grids]
        return [
            next((low for low, high in spans if low <= start <= high), start) for start in starts
        ]

    def _sources(self) -> list[tuple[Mapping[str, Any], int | None]]:
        """Returns each source, and the last block that is read of it (None: it runs to the end)."""
        wanted: dict[int, list[str]] = {}
        inputs = {}
        for part in (part for cell in self.cells for part in flattened(cell.interventions)):
            _, source = source_of(part)
            if source is not None and not isinstance(source, Recording):
                wanted.setdefault(id(source), []).append(getattr(part, "read", part.site))
                inputs[id(source)] = source
        return [(inputs[key], last_block(names)) for key, names in wanted.items()]

    def _shortcuts(
        self, costs: Costs, jobs: Sequence[RowPlan], starts: Sequence[int], brought: bool
    ) -> tuple[str, ...]:
        n_layers, ids = costs.n_layers, ids_of(self.inputs)
        length = 0 if ids is None else ids.shape[1]
        below = sum(min(job.stage, n_layers) for job in jobs)
        front = sum(starts)
        early = [job for job in jobs if job.front]
        encoder = self.model.cfg.vision.n_layers if early and self.model.cfg.vision else 0
        kept = sum(tower_depth(self.model, job.front) for job in early) if encoder else 0
        return (
            f"Blocks below a cell's first change are the clean run's: {below} of "
            f"{len(jobs) * n_layers} block passes left out.",
            f"Positions before it are the clean run's: {front} of {len(jobs) * length} left out.",
            _encoder(costs, brought),
            *[
                f"Cells before the blocks begin where they change something there: {kept} of "
                f"{len(early) * encoder} passes through blocks of the encoder left out."
            ][: bool(early)],
        )


def _encoder(costs: Costs, brought: bool) -> str:
    """Says how often the encoder runs."""
    each = _flops(float(costs.vision))
    if brought:
        return (
            "No clean run is made, once the control has passed: the vision encoder runs once for "
            f"each source ({each}), and below the first edits of all cells once for all of them."
        )
    return (
        "The vision encoder runs once for the clean run and once for each source, not for each "
        f"cell ({each} each)."
    )


def _proof(operations: float) -> str:
    return (
        f"Before the first sweep of this kind a control runs, for {_flops(operations)} more: noise "
        "must do in such a pass what it does in a plain one."
    )


def _flops(operations: float) -> str:
    for size, name in ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP")):
        if operations >= size:
            return f"{operations / size:.3g} {name}"
    return f"{operations / 1e6:.3g} MFLOP"
