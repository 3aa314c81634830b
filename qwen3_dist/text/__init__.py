"""Tokenizer, chat template, detokenizer, and parsers for reasoning and tool calls. No torch, no transformers."""
