"""Process groups of ranks: collectives, pipeline stages, and the dispatch of tokens to experts."""
