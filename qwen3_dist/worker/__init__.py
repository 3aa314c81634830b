"""The code of a rank, which runs in its own process; a single rank may run in the engine's process."""
