"""Tool calls in a model's text, in Qwen3's JSON form and in Qwen3-Coder's XML form."""
