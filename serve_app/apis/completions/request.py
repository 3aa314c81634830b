"""Bodies of /v1/completions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from qwen3_dist.errors import RequestError
from qwen3_dist.sampling_params import MAX_LOGPROBS, SamplingParams
from serve_app.apis.completions.answer import CompletionAnswer
from serve_app.apis.shared.answer import Answer, Served
from serve_app.apis.shared.generation import GENERATION, GenerationRequest, read_generation
from serve_app.apis.shared.kinds import BOOL, FILLED_TEXT, Either, Field, Json, ListOf, Record, integer
from serve_app.apis.shared.prompts import Prompt, Texts

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
_MOST_CHOICES = 1024
_TOKEN_IDS = ListOf(integer(0), "a list of token ids", least=1)
_EXPECTED = "text, a list of token ids, or a list of either, none of them empty"
PROMPT = Either(
    _EXPECTED,
    (FILLED_TEXT, _TOKEN_IDS, ListOf(Either(_EXPECTED, (FILLED_TEXT, _TOKEN_IDS)), _EXPECTED, least=1)),
)
COMPLETION_BODY = Record(
    "an object",
    {
        **GENERATION,
        "prompt": Field(PROMPT, "What the answer goes on from.", required=True),
        "max_tokens": Field(integer(0), "Most tokens of each choice; 0 with echo alone."),
        "logprobs": Field(
            integer(0, MAX_LOGPROBS), "Log-probabilities of each token and of so many alternatives."
        ),
        "add_special_tokens": Field(
            BOOL, "Whether a text gets what the tokenizer puts around one; it does unless this is false."
        ),
        "echo": Field(BOOL, "Shows the prompt ahead of the answer."),
    },
)


@dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
    """A body of /v1/completions; each prompt is text or token ids."""

    wanted: list[str | list[int]] = field(default_factory=list)
    add_special_tokens: bool = True

    @property
    def num_prompts(self) -> int:
        return len(self.wanted)

    def prompts(self, texts: Texts) -> list[Prompt]:
        return [
            texts.prompt(prompt, "prompt", self.add_special_tokens)
            if isinstance(prompt, str)
            else Prompt(prompt)
            for prompt in self.wanted
        ]

    def answer(self, served: Served) -> Answer:
        return CompletionAnswer(served, self.shown)

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        most = min(COMPLETION_MAX_TOKENS, defaults.get("max_tokens", COMPLETION_MAX_TOKENS))
        return super().params({**defaults, "max_tokens": most})


def parse_completion(body: bytes) -> CompletionRequest:
    """Reads a completion request. Raises RequestError."""
    given = COMPLETION_BODY.read_body(body)
    read = read_generation(given, "max_tokens", ("logprobs", given.get("logprobs")))
    prompts = as_prompts(given["prompt"])
    if len(prompts) * given.get("n", 1) > _MOST_CHOICES:
        raise RequestError(
            f"{len(prompts)} prompts of {given.get('n', 1)} choices are more than {_MOST_CHOICES}; "
            "send several requests",
            param="prompt",
        )
    if given.get("echo", False):
        _read_echo(given, read)
    elif given.get("max_tokens") == 0:
        raise RequestError("max_tokens must be at least 1 without echo", param="max_tokens")
    return CompletionRequest(**read, wanted=prompts, add_special_tokens=given.get("add_special_tokens", True))


def as_prompts(given: Any) -> list[str | list[int]]:
    """The prompts of a PROMPT; the same list if it was one of prompts."""
    return [given] if isinstance(given, str) or isinstance(given[0], int) else given


def _read_echo(given: Json, read: Json) -> None:
    """The prompt is shown as the answer is, with log-probabilities if the answer has them."""
    read["shown"] = replace(read["shown"], echo=True)
    if "logprobs" not in given:
        return
    if given.get("stream", False):
        raise RequestError("echo with logprobs does not come in a stream", param="echo")
    read["sampling"]["prompt_logprobs"] = max(given["logprobs"], given.get("prompt_logprobs", 0))
