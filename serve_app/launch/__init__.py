"""Starts, changes, watches and ends services on Ray, for `qwen3-dist serve`, `deploy`, `status` and `stop`."""
