"""Structured outputs: from what a request asks of its text to grammars. No torch."""
