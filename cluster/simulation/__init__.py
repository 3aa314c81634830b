"""Simulates a whole service: arrivals, routing, autoscaling, and the real scheduler with predicted step times.

The entry point is `service.simulate`; `docs/simulation.md` says what is modelled and what is not.
"""
