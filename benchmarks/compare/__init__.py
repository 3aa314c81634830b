"""Every system on one checkpoint in one run: `python -m benchmarks.compare --help`."""
