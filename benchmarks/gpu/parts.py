"""The parts of `benchmarks.gpu`: what runs, and for how long at most."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One process of measurements."""

    name: str
    limit: float
    """Seconds after which it is ended."""
    function: str
    """`module:function`; it is called with a `benchmarks.gpu.given.Given`."""
    correctness: bool = False
    """Whether a wrong answer, or none, makes the exit code 1."""


PARTS = (
    Part("machine", 40, "benchmarks.gpu.machine:run"),
    Part("kernel correct", 60, "benchmarks.gpu.kernel_correct:run", correctness=True),
    Part("kernel speed", 75, "benchmarks.gpu.kernel_speed:run"),
    Part("sweeps correct", 60, "benchmarks.gpu.sweeps_correct:run", correctness=True),
    Part("Qwen2-VL-7B", 170, "benchmarks.gpu.sweep_speed:qwen"),
    Part("battery", 100, "benchmarks.gpu.battery:run"),
    Part("Gemma-3-4b", 120, "benchmarks.gpu.sweep_speed:gemma"),
    Part("fp32 and TF32", 45, "benchmarks.gpu.precision:run"),
    Part("wrapper", 30, "benchmarks.gpu.wrapper:run"),
    Part("profile", 30, "benchmarks.gpu.profile:run"),
)
"""In the order in which they run; a part's number is its place."""


def chosen(wanted: str) -> list[int]:
    """Returns the numbers of the parts that are named, by number or by name, with commas between.

    Raises `ValueError` for a part that is not there.

    >>> chosen("sweeps correct,0")
    [0, 3]
    """
    names = [part.name for part in PARTS]
    found = set()
    for word in filter(None, map(str.strip, wanted.split(","))):
        if word in names:
            found.add(names.index(word))
        elif word.isdigit() and int(word) < len(PARTS):
            found.add(int(word))
        else:
            known = ", ".join(f"{i} {name}" for i, name in enumerate(names))
            raise ValueError(f"there is no part {word!r}; there are {known}")
    return sorted(found) or list(range(len(PARTS)))
