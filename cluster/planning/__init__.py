"""The cost model, and the plans that are made with it."""
