"""The process of `qwen3-dist serve`: deploys a service on Ray, watches it and shuts it down."""
