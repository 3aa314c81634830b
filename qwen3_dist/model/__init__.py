"""The sharded transformer, as one rank holds it."""
