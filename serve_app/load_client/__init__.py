"""A load generator for OpenAI-compatible services, with the measurements of `vllm bench serve`. Imports no Ray."""
