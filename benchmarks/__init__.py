"""Timings: `python -m benchmarks.wrapper`, `python -m benchmarks.throughput`."""
