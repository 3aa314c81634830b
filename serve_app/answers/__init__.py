"""The answer forms of the APIs that are served: choice deltas in, stream chunks or one response out."""
