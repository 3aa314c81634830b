"""Text in and out: tokenizer, chat template, incremental detokenizer. No torch, no transformers."""
