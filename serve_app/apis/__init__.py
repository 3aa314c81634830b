"""The HTTP APIs: of each, how a request is read and how its answer is written."""
