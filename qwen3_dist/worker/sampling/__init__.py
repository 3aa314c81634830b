"""From logits to tokens, on the rank that samples."""
