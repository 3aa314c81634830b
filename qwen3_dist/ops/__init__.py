"""The only room that knows devices: kernels for CPUs (`cpu/`) and GPUs (`cuda/`), plain torch for all else."""
