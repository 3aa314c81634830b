"""The replica process: one engine, and the requests that it answers."""
