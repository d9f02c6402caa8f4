"""What several benchmarks use: models to time, paths of their parts, the machine."""
