"""Checkpoints: found, read, cut into each rank's shard, laid into the model."""
