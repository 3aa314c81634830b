"""Measurements of a machine, which become the cost model's constants."""
