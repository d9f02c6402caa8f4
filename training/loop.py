"""One run of training: steps under warm-up and cosine, a log, and checkpoints to go on from.

A checkpoint has the weights and the optimizers' states, in one safetensors file that is replaced
as a whole, so a run that is ended at any moment goes on as if it had not been.  Batches are drawn
from the number of their step.
"""

import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from hooked_vlm.disk.files import replaced_file
from training.muon import Muon


EVERY = 50
"""Steps between rows of the log."""
Rates = Sequence[tuple[torch.optim.Optimizer, float]]
"""Optimizers with their peak rates."""


@dataclass(frozen=True)
class Schedule:
    """A linear warm-up, then a cosine to `floor` of the peak rate."""

    steps: int
    warmup: int = 50
    floor: float = 0.05

    def share(self, step: int) -> float:
        """Returns the learning rate at a step as a share of its peak."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * done))


def muon_and_adam(
    named: Sequence[tuple[str, nn.Parameter]],
    muon_lr: float,
    adam_lr: float,
    weight_decay: float = 0.01,
) -> list[tuple[torch.optim.Optimizer, float]]:
    """Returns Muon for the matrices of blocks and AdamW for all else, with their peak rates."""
    named = [(name, weights) for name, weights in named if weights.requires_grad]
    matrices = [p for n, p in named if p.ndim == 2 and (".layers." in n or ".blocks." in n)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    made: list[tuple[torch.optim.Optimizer, float]] = []
    if matrices:
        muon = Muon(matrices, lr=muon_lr, weight_decay=weight_decay)
        made.append((muon, muon_lr))
    if rest:
        adam = torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=weight_decay)
        made.append((adam, adam_lr))
    return made


@dataclass
class Loop:
    """A run in a folder: `module` is what checkpoints hold, `rates` is what changes it."""

    out: Path
    module: nn.Module
    rates: Rates
    schedule: Schedule
    checkpoint: str = "checkpoint.safetensors"
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the log that are the same in all of its rows."""
    recipe: str = ""
    """What determines the run, in words: a checkpoint of another one is refused."""

    def run(self, loss_of: Callable[[int], Tensor], check: Callable[[int], float]) -> None:
        """Goes on from the checkpoint if there is one, to the last step.

        `loss_of` returns the loss of a step's batch; `check` a number for the log after a step:
        loss or accuracy on held-out pictures.
        """
        self.out.mkdir(parents=True, exist_ok=True)
        first = self.load()
        self._forget_after(first)
        losses: list[float] = []
        started = time.time()
        for step in range(first, self.schedule.steps):
            loss = loss_of(step)
            loss.backward()
            nn.utils.clip_grad_norm_([p for p in self.module.parameters() if p.requires_grad], 1.0)
            for optimizer, peak in self.rates:
                for group in optimizer.param_groups:
                    group["lr"] = peak * self.schedule.share(step)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            done = step + 1
            if done % EVERY == 0 or done == self.schedule.steps:
                checked = check(step)
                self._log(done, losses, checked, time.time() - started, done - first)
                self.save(done)
                losses = []

    def _log(
        self, done: int, losses: Sequence[float], checked: float, seconds: float, own: int
    ) -> None:
        """Appends a row to the log, and prints it with an estimate of what is left."""
        row = {
            **self.columns,
            "step": str(done),
            "loss": f"{sum(losses) / len(losses):.4f}",
            "held_out": f"{checked:.4f}",
            "seconds": f"{seconds:.0f}",
        }
        file = self.out / "training_log.csv"
        is_new = not file.exists()
        with file.open("a", newline="") as handle:
            writer = csv.DictWriter(handle, list(row))
            if is_new:
                writer.writeheader()
            writer.writerow(row)
        left = seconds / own * (self.schedule.steps - done)
        print(  # noqa: T201
            f"{self.out.name} {done}/{self.schedule.steps}: loss {row['loss']}, "
            f"held out {row['held_out']}, {left / 60:.0f} min left",
            flush=True,
        )

    def _forget_after(self, step: int) -> None:
        """Drops this run's rows of the log that no checkpoint has: they will come again."""
        file = self.out / "training_log.csv"
        if not file.exists():
            return
        with file.open(newline="") as handle:
            rows = list(csv.DictReader(handle))
        own = [all(row[name] == value for name, value in self.columns.items()) for row in rows]
        kept = [
            r for r, mine in zip(rows, own, strict=True) if not (mine and int(r["step"]) > step)
        ]
        if len(kept) < len(rows):
            with replaced_file(file) as building, building.open("w", newline="") as handle:
                writer = csv.DictWriter(handle, list(rows[0]))
                writer.writeheader()
                writer.writerows(kept)

    def save(self, done: int) -> None:
        """Writes weights and states after a number of steps, whole or not at all."""
        held = {f"weights.{n}": p for n, p in self.module.named_parameters()}
        for i, (optimizer, _) in enumerate(self.rates):
            for index, state in optimizer.state_dict()["state"].items():
                held |= {f"state.{i}.{index}.{key}": value for key, value in state.items()}
        whole = {name: value.detach().clone().contiguous() for name, value in held.items()}
        with replaced_file(self.out / self.checkpoint) as building:
            save_file(whole, building, {"step": str(done), "recipe": self.recipe})

    def load(self) -> int:
        """Takes weights and states from the checkpoint; returns its number of steps, or 0.

        Raises `ValueError` for a checkpoint of another recipe.
        """
        file = self.out / self.checkpoint
        if not file.exists():
            return 0
        with safe_open(file, "pt") as held:
            about = held.metadata()
            if about["recipe"] != self.recipe:
                raise ValueError(
                    f"'{file}' is of a run with {about['recipe']}, and this one has {self.recipe}. "
                    "Give another folder, or delete this one."
                )
            step = int(about["step"])
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118
        with torch.no_grad():
            for name, weights in self.module.named_parameters():
                weights.copy_(tensors[f"weights.{name}"])
        for i, (optimizer, _) in enumerate(self.rates):
            state: dict[int, dict[str, Tensor]] = {}
            for name, value in tensors.items():
                kind, *path = name.split(".", 3)
                if kind == "state" and path[0] == str(i):
                    state.setdefault(int(path[1]), {})[path[2]] = value
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
        return step
