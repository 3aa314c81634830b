"""Logs and traces of ingresses and replicas."""
