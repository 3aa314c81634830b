"""What runs on a rank, in a process of its own (or in the engine's, for one CPU rank)."""
