"""A whole service in simulated time: arrivals, routing, the real scheduler on modelled steps, autoscaling.

`service.simulate` is the way in; `docs/simulation.md` says what is modelled and what is not.
"""
