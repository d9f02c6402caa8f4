"""Whole sweeps beside those of hook loops and other tools.

python -m benchmarks.throughput                the tables
python -m benchmarks.throughput.battery        sweeps of E2, E4, E6 and E7 on the same pairs
python -m benchmarks.throughput.growth         time against slots, tokens and pairs
python -m benchmarks.throughput.environment    makes the environment of the other tools
"""
