"""Sampling: turns logits into tokens on tp rank 0 of the last stage."""
