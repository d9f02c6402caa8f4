"""How fast a plain matrix product is on this machine, to hold a sweep's arithmetic against."""

import statistics
import time

import torch


def product_rate(rows: int, width: int, wide: int, repeats: int = 15) -> float:
    """Returns operations a second of `rows` tokens times a feed-forward map's weights.

    Both products of such a part are timed, width to wide and back, in float32 as sweeps are.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(rows, width, device=device)
    up, down = (torch.randn(*size, device=device) for size in ((width, wide), (wide, width)))
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        _ = (x @ up) @ down
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return 4.0 * rows * width * wide / statistics.median(times[3:])
