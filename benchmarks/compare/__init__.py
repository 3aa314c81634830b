"""Compares this project with other engines on the same checkpoints: `python -m benchmarks.compare --help`."""
