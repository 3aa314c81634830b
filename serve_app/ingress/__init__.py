"""The ingress process: HTTP in, requests to replicas, answers out. `proxy` runs in Serve's HTTP proxies instead."""
