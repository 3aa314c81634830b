"""Bodies of /v1/completions."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen3_dist.errors import RequestError
from serve_app.protocol.fields import Fields, is_int, is_list_of, short
from serve_app.protocol.generation import GenerationRequest, check_sampling, read_shared

COMPLETION_MAX_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
    """A body of /v1/completions; each prompt is text or token ids."""

    prompts: list[str | list[int]] = field(default_factory=list)


def parse_completion(body: bytes) -> CompletionRequest:
    """Reads a completion request. Raises RequestError."""
    fields = Fields(body)
    shared = read_shared(fields, "max_tokens")
    logprobs = fields.read("logprobs", is_int, "an integer", None)
    if logprobs is not None:
        shared["sampling"]["logprobs"] = logprobs
    shared["sampling"].setdefault("max_tokens", COMPLETION_MAX_TOKENS)
    shared.pop("limit_name")
    check_sampling(shared["sampling"], {})
    return CompletionRequest(**shared, prompts=_prompts(fields))


def _prompts(fields: Fields) -> list[str | list[int]]:
    """The `prompt` field's four forms (text, token ids, a list of either) as a list of prompts."""
    expected = "text, a list of token ids, or a list of either"
    prompt = fields.read("prompt", lambda v: isinstance(v, (str, list)), expected)
    prompts = [prompt] if isinstance(prompt, str) or is_list_of(int)(prompt) else prompt
    for item in prompts:
        if not isinstance(item, str) and not is_list_of(int)(item):
            raise RequestError(f"prompt must be {expected}, not {short(prompt)}", param="prompt")
    if not prompts or any(not item for item in prompts):
        raise RequestError("prompt must not be empty", param="prompt")
    return list(prompts)
