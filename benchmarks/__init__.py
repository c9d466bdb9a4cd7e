"""Benchmarks: scripts that measure, print a table and record raw figures under `results/`."""
