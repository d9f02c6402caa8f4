"""Everything that a GPU is needed for, in one command and within a few minutes.

    python -m benchmarks.gpu [--minutes 10] [--out DIR] [--parts 0,3] [--resume] [--questions 2]
    python -m benchmarks.gpu --device cpu --tiny

With `--questions 2` sweeps ask both questions about each image, which prompts then share.  The
last command runs the same code on small shapes without a GPU.  `DIR` gets `predictions.json` before
anything is measured, and `results.json` and `table.md` after each part.

The parent process uses the standard library alone and never touches CUDA.  Each part runs in a
process of its own (`child`) and within a limit, after which it gets SIGTERM and then SIGKILL; what
it had measured counts.  A part whose limit is longer than what is left of the minutes is skipped.
Clocks and settings of the card are never changed.  The exit code is 1 if a correctness part failed.
"""
