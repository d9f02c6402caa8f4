"""A picture of the throughput table: one panel for each model and batch, one bar for each rival."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure


COLOURS = ("#1f5fa8", "#b5541c", "#3b7d4f", "#8a4b9c", "#7a7a7a", "#c2a300", "#444444")


def drawn(rows: Sequence[dict[str, Any]]) -> Figure:
    """Returns bars of the rivals' time over ours, whiskers to the smallest and largest turn."""
    rows = [row for row in rows if "ratio" in row]
    panels = list(dict.fromkeys((row["size"], row["batch"]) for row in rows))
    rivals = list(dict.fromkeys(row["rival"] for row in rows))
    figure = Figure(figsize=(9, 3.2 * max(1, len(panels))), layout="constrained")
    for axes, panel in zip(
        figure.subplots(max(1, len(panels)), squeeze=False)[:, 0], panels, strict=False
    ):
        here = [row for row in rows if (row["size"], row["batch"]) == panel]
        tasks = list(dict.fromkeys(row["task"] for row in here))
        width = 0.8 / len(rivals)
        for k, rival in enumerate(rivals):
            found = [row for row in here if row["rival"] == rival]
            x = np.array([tasks.index(row["task"]) for row in found]) + (k + 0.5) * width - 0.4
            y = np.array([row["ratio"] for row in found])
            low = y - [min(row["ratios"]) for row in found]
            high = np.array([max(row["ratios"]) for row in found]) - y
            axes.bar(x, y, width, label=rival, color=COLOURS[k % len(COLOURS)])
            axes.errorbar(x, y, [low, high], fmt="none", ecolor="black", elinewidth=0.8)
        axes.axhline(1, color="black", linewidth=0.8, linestyle=":")
        axes.set_yscale("log")
        axes.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
        axes.set_yticks([], minor=True)
        axes.set_xticks(range(len(tasks)), [task.replace("_", " ") for task in tasks])
        axes.set_ylabel("rival's time over ours")
        axes.set_title(f"{panel[0]}, batches of {panel[1]}", loc="left", fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, ncols=len(rivals), fontsize=8)
    return figure
