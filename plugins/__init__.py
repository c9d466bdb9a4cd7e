"""Stage 3: the CUDA kernels, their adapters, and the loader that builds and finds them."""
