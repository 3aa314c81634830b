"""The HTTP APIs: how each parses its requests and serializes its responses."""
