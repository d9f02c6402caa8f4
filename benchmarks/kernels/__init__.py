"""The fused kernel's bandwidth, its machine code, and predictions for GPUs.

python -m benchmarks.kernels              bandwidth beside a plain copy's
python -m benchmarks.kernels --roofline   predictions
python -m benchmarks.kernels.compiled     machine code, compiled without a GPU
"""
