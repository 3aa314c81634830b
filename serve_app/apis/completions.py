"""OpenAI's text completions: bodies of /v1/completions and what answers them."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from qwen3_dist.errors import RequestError
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.sampling_params import MAX_LOGPROBS, SamplingParams
from qwen3_dist.text.choice import ChoiceDelta
from serve_app.apis.shared.answer import Answer, Served
from serve_app.apis.shared.body import Json, Range, about, read_body
from serve_app.apis.shared.generation import GenerationBody, GenerationRequest, read_generation
from serve_app.apis.shared.openai import OpenAIAnswer, Shown, logprob
from serve_app.apis.shared.prompts import Prompt, Prompts, Texts, as_prompts

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
_MOST_CHOICES = 1024
Scored = list[tuple[int, TokenLogprob | None]]  # tokens with their log-probabilities


class CompletionBody(GenerationBody):
    """A body of /v1/completions."""

    prompt: Annotated[Prompts, about("What the answer goes on from.")]
    max_tokens: Annotated[int, Range(0), about("Most tokens of each choice; 0 with echo alone.")] | None = (
        None
    )
    logprobs: (
        Annotated[
            int,
            Range(0, MAX_LOGPROBS),
            about("Log-probabilities of each token and of so many alternatives."),
        ]
        | None
    ) = None
    add_special_tokens: Annotated[bool, about("Whether a text gets what the tokenizer puts around one.")] = (
        True
    )
    echo: Annotated[bool, about("Shows the prompt ahead of the answer.")] = False


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
    given = read_body(CompletionBody, body)
    read = read_generation(given, "max_tokens", ("logprobs", given.logprobs))
    prompts = as_prompts(given.prompt)
    n = given.n or 1
    if len(prompts) * n > _MOST_CHOICES:
        raise RequestError(
            f"{len(prompts)} prompts of {n} choices are more than {_MOST_CHOICES}; send several requests",
            param="prompt",
        )
    if given.echo:
        _read_echo(given, read)
    elif given.max_tokens == 0:
        raise RequestError("max_tokens must be at least 1 without echo", param="max_tokens")
    return CompletionRequest(**read, wanted=prompts, add_special_tokens=given.add_special_tokens)


def _read_echo(given: CompletionBody, read: Json) -> None:
    """The prompt is shown as the answer is, with log-probabilities if the answer has them."""
    read["shown"] = replace(read["shown"], echo=True)
    if given.logprobs is None:
        return
    if given.stream:
        raise RequestError("echo with logprobs does not come in a stream", param="echo")
    read["sampling"]["prompt_logprobs"] = max(given.logprobs, given.prompt_logprobs or 0)


class CompletionAnswer(OpenAIAnswer):
    """`text_completion`. Where there is no tokenizer, the text is empty and `token_ids` are given."""

    prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(self, served: Served, shown: Shown) -> None:
        super().__init__(served, shown)
        self._texts: dict[int, _TextLength] = {}

    def whole(self, choices: Sequence[ChoiceDelta]) -> Json:
        """Choices of one prompt have its log-probabilities in common."""
        n = self.served.n
        scores = [choice.prompt_logprobs for choice in choices[::n]]
        return super().whole(
            [replace(choice, prompt_logprobs=scores[i // n]) for i, choice in enumerate(choices)]
        )

    def choice(self, delta: ChoiceDelta) -> Json:
        prompt_logprobs = self.prompt_logprobs(delta)
        return {
            **self._shown(delta),
            **({} if prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs}),
        }

    def chunk_choices(self, delta: ChoiceDelta) -> list[Json]:
        begins = self.shown.echo and delta.index not in self._texts
        shown = delta.text or delta.logprobs or delta.finish_reason or self.shown.token_ids or begins
        return [self._shown(delta)] if shown else []

    def _shown(self, delta: ChoiceDelta) -> Json:
        """The choice, with its prompt ahead if that is asked for and has not been shown."""
        begins = delta.index not in self._texts
        self._texts.setdefault(delta.index, _TextLength())
        text = delta.text
        tokens: Scored = [(p.token_id, p) for p in delta.logprobs]
        if begins and self.shown.echo:
            prompt = self.served.prompts[delta.index // self.served.n]
            text = self._prompt_text(prompt) + text
            if self.shown.logprobs and delta.prompt_logprobs:
                tokens = [*zip(prompt.token_ids, delta.prompt_logprobs, strict=True), *tokens]
        return {
            "index": delta.index,
            "text": text,
            "logprobs": self._logprobs(delta.index, tokens) if tokens else None,
            "finish_reason": delta.finish_reason,
            **self.beside(delta),
        }

    def _prompt_text(self, prompt: Prompt) -> str:
        tokenizer = self.served.tokenizer
        if prompt.text is not None or tokenizer is None:
            return prompt.text or ""
        return tokenizer.decode(prompt.token_ids, skip_special_tokens=False)

    def _logprobs(self, index: int, tokens: Scored) -> Json:
        """OpenAI's columns, the token itself among the alternatives. Of several with one text (parts of a
        character) the likeliest stays."""
        return {
            "tokens": [self.token_name(token_id) for token_id, _ in tokens],
            "token_logprobs": [p and logprob(p.logprob) for _, p in tokens],
            "top_logprobs": [p and self._alternatives(p) for _, p in tokens],
            "text_offset": [self._offset(index, token_id) for token_id, _ in tokens],
        }

    def _alternatives(self, scored: TokenLogprob) -> Json:
        return {
            self.token_name(token_id): logprob(value)
            for token_id, value in ((scored.token_id, scored.logprob), *reversed(scored.top))
        }

    def _offset(self, index: int, token_id: int) -> int:
        """Where the token's text begins in the choice's; moves past it. Special tokens have no text."""
        text, tokenizer = self._texts[index], self.served.tokenizer
        offset = text.length
        if tokenizer and token_id not in tokenizer.special_token_ids:
            text.add(tokenizer.token_bytes(token_id))
        return offset


class _TextLength:
    """Characters so far of a text that comes as bytes; one begun is not counted yet."""

    def __init__(self) -> None:
        self.length = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> None:
        self.length += len(self._utf8.decode(data))
