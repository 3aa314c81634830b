"""All code that depends on the device: kernels for CPUs (`cpu/`) and GPUs (`cuda/`), plain torch for the rest."""
