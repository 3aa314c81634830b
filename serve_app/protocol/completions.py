"""Bodies of /v1/completions."""

from __future__ import annotations

from dataclasses import dataclass, field

from qwen3_dist.errors import RequestError
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.answers.base import Answer, Served
from serve_app.answers.completions import CompletionAnswer
from serve_app.protocol.fields import Fields, is_int, is_list_of, short
from serve_app.protocol.generation import GenerationRequest, check_sampling, read_shared

COMPLETION_MAX_TOKENS = 16  # OpenAI's default


@dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
    """A body of /v1/completions; each prompt is text or token ids."""

    prompts: list[str | list[int]] = field(default_factory=list)

    def prompt_token_ids(self, tokenizer: Tokenizer | None, template: ChatTemplate | None) -> list[list[int]]:
        return [_token_ids(prompt, tokenizer) for prompt in self.prompts]

    def answer(self, served: Served) -> Answer:
        return CompletionAnswer(served, self.include_usage)


def parse_completion(body: bytes) -> CompletionRequest:
    """Reads a completion request. Raises RequestError."""
    fields = Fields.of_body(body)
    shared = read_shared(fields, "max_tokens")
    logprobs = fields.read("logprobs", is_int, "an integer", None)
    if logprobs is not None:
        shared["sampling"]["logprobs"] = logprobs
    shared["sampling"].setdefault("max_tokens", COMPLETION_MAX_TOKENS)
    shared.pop("limit_name")
    check_sampling(shared["sampling"], {})
    return CompletionRequest(**shared, prompts=_prompts(fields))


def _token_ids(prompt: str | list[int], tokenizer: Tokenizer | None) -> list[int]:
    if not isinstance(prompt, str):
        return prompt
    if tokenizer is None:
        raise RequestError("this model has no tokenizer; send the prompt as token ids", param="prompt")
    return tokenizer.encode(prompt)


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
