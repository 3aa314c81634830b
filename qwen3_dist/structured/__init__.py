"""Structured outputs: turns JSON schemas, regular expressions and tools into grammars. Imports no torch."""
