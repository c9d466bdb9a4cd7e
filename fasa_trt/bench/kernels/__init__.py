"""Times the CUDA kernels on one GPU, against the fastest dense attention of the same run."""
