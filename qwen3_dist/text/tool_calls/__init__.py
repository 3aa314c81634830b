"""Parsers of tool calls in a model's text, in Qwen3's JSON format and in Qwen3-Coder's XML format."""
