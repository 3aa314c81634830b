"""The driver: it schedules steps, hands their plans to the ranks and turns what comes back into outputs.

Its files run in the process that owns the engine.
"""
