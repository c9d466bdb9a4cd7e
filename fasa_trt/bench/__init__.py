"""Benchmarks: the CUDA kernels, whole decode steps on a GPU or a CPU, records of runs, and reports of records."""
