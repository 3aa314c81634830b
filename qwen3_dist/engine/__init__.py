"""The driver schedules steps, sends their plans to the ranks and turns the results into outputs.

These files run in the process that owns the engine.
"""
