"""Times the CUDA kernels on one GPU: `python -m benchmarks.kernels`, see `__main__.py`."""
