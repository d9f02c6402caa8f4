"""Benchmarks, run from the repository's root.

    python -m benchmarks.throughput    sweeps beside hook loops and other tools
    python -m benchmarks.wrapper       the cost of wrapping, hooks, patches and caches
    python -m benchmarks.attribution   estimated sweeps beside exact ones
    python -m benchmarks.encodings     images that the encoder processes
    python -m benchmarks.kernels       bandwidth of the fused kernel
    python -m benchmarks.floors        the fewest operations of exact sweeps, counted
    python -m benchmarks.scaling       an experiment with several worker processes
    python -m benchmarks.gpu           everything that a GPU is needed for, within minutes

`common` holds what several of them use.
"""
