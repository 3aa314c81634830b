"""OpenAI's text completions (/v1/completions): request and answer."""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

from qwen3_dist.errors import RequestError
from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.sampling_params import MAX_LOGPROBS, SamplingParams
from qwen3_dist.text.choice import ChoiceDelta
from serve_app.apis.shared.answer import Answer, AnswerContext
from serve_app.apis.shared.body import Json, Range, about, read_body
from serve_app.apis.shared.errors import to_json
from serve_app.apis.shared.generation import GenerationBody, GenerationRequest, generation_fields
from serve_app.apis.shared.openai import AnswerOptions, OpenAIAnswer, logprob
from serve_app.apis.shared.prompts import Prompt, PromptRenderer, Prompts, as_prompts

COMPLETION_MAX_TOKENS = 16  # OpenAI's default
_MAX_CHOICES = 1024
_ScoredTokens = list[tuple[int, TokenLogprob | None]]  # token ids with their log-probabilities


class CompletionBody(GenerationBody):
    """A body of /v1/completions."""

    prompt: Annotated[Prompts, about("The prompt, or several.")]
    max_tokens: (
        Annotated[int, Range(0), about("Maximum number of tokens of each choice; 0 requires echo.")] | None
    ) = None
    logprobs: (
        Annotated[
            int,
            Range(0, MAX_LOGPROBS),
            about("Returns log-probabilities of each token, and of this many alternatives."),
        ]
        | None
    ) = None
    add_special_tokens: Annotated[bool, about("Whether the tokenizer adds its special tokens to a text.")] = (
        True
    )
    echo: Annotated[bool, about("Returns the prompt ahead of the answer.")] = False


@dataclass(frozen=True)
class CompletionRequest(GenerationRequest):
    """A parsed request to /v1/completions. Each prompt is text or token ids."""

    inputs: list[str | list[int]] = field(default_factory=list)
    add_special_tokens: bool = True

    @property
    def num_prompts(self) -> int:
        return len(self.inputs)

    def prompts(self, renderer: PromptRenderer) -> list[Prompt]:
        return [
            renderer.tokenize(prompt, "prompt", self.add_special_tokens)
            if isinstance(prompt, str)
            else Prompt(prompt)
            for prompt in self.inputs
        ]

    def prompt_bytes(self) -> bytes:
        return to_json([self.model, self.terms.cache_salt, *self.inputs])

    def answer(self, context: AnswerContext) -> Answer:
        return CompletionAnswer(context, self.options)

    def params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        max_tokens = min(COMPLETION_MAX_TOKENS, defaults.get("max_tokens", COMPLETION_MAX_TOKENS))
        return super().params({**defaults, "max_tokens": max_tokens})


def parse_completion(body: bytes) -> CompletionRequest:
    """Parses a body of /v1/completions. Raises RequestError."""
    given = read_body(CompletionBody, body)
    fields = generation_fields(given, "max_tokens", "logprobs", given.logprobs)
    prompts = as_prompts(given.prompt)
    n = given.n or 1
    if len(prompts) * n > _MAX_CHOICES:
        raise RequestError(
            f"{len(prompts)} prompts with n={n} are more than {_MAX_CHOICES} choices; send several requests",
            param="prompt",
        )
    if given.echo:
        _add_echo(fields, given)
    elif given.max_tokens == 0:
        raise RequestError("max_tokens must be at least 1 unless echo is true", param="max_tokens")
    return CompletionRequest(**fields, inputs=prompts, add_special_tokens=given.add_special_tokens)


def _add_echo(fields: Json, given: CompletionBody) -> None:
    """Sets the `fields` of a request with `echo`: the prompt has log-probabilities if the answer has them."""
    fields["options"] = replace(fields["options"], echo=True)
    if given.logprobs is None:
        return
    if given.stream:
        raise RequestError(
            "echo with logprobs cannot be streamed; set stream to false, or leave out echo or logprobs",
            param="echo",
        )
    fields["sampling"]["prompt_logprobs"] = max(given.logprobs, given.prompt_logprobs or 0)


class CompletionAnswer(OpenAIAnswer):
    """Serializes `text_completion`. Without a tokenizer the text is empty and the choice has `token_ids`."""

    prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(self, context: AnswerContext, options: AnswerOptions) -> None:
        super().__init__(context, options)
        self._texts: dict[int, _TextLength] = {}

    def full_response(self, choices: Sequence[ChoiceDelta]) -> Json:
        # The engine scores a prompt once; its log-probabilities are in its first choice.
        n = self.context.n
        scores = [choice.prompt_logprobs for choice in choices[::n]]
        return super().full_response(
            [replace(choice, prompt_logprobs=scores[i // n]) for i, choice in enumerate(choices)]
        )

    def is_plain(self, delta: ChoiceDelta) -> bool:
        return super().is_plain(delta) and delta.index in self._texts and not delta.reasoning

    def choice(self, delta: ChoiceDelta) -> Json:
        prompt_logprobs = self.prompt_logprobs(delta)
        return {
            **self._choice(delta),
            **({} if prompt_logprobs is None else {"prompt_logprobs": prompt_logprobs}),
        }

    def chunk_choices(self, delta: ChoiceDelta) -> list[Json]:
        echoes = self.options.echo and delta.index not in self._texts
        has_content = delta.text or delta.logprobs or delta.finish_reason or self.options.token_ids or echoes
        return [self._choice(delta)] if has_content else []

    def _choice(self, delta: ChoiceDelta) -> Json:
        """Returns a choice without `prompt_logprobs`; the first of each index begins with the echoed prompt."""
        is_first = delta.index not in self._texts
        self._texts.setdefault(delta.index, _TextLength())
        text = delta.text
        tokens: _ScoredTokens = [(p.token_id, p) for p in delta.logprobs]
        if is_first and self.options.echo:
            prompt = self.context.prompts[delta.index // self.context.n]
            text = self._prompt_text(prompt) + text
            if self.options.logprobs and delta.prompt_logprobs:
                tokens = [*zip(prompt.token_ids, delta.prompt_logprobs, strict=True), *tokens]
        return {
            "index": delta.index,
            "text": text,
            "logprobs": self._logprobs(delta.index, tokens) if tokens else None,
            "finish_reason": delta.finish_reason,
            **self.vllm_fields(delta),
        }

    def _prompt_text(self, prompt: Prompt) -> str:
        tokenizer = self.context.tokenizer
        if prompt.text is not None or tokenizer is None:
            return prompt.text or ""
        return tokenizer.decode(prompt.token_ids, skip_special_tokens=False)

    def _logprobs(self, index: int, tokens: _ScoredTokens) -> Json:
        """Returns OpenAI's object of parallel lists."""
        return {
            "tokens": [self.token_name(token_id) for token_id, _ in tokens],
            "token_logprobs": [p and logprob(p.logprob) for _, p in tokens],
            "top_logprobs": [p and self._alternatives(p) for _, p in tokens],
            "text_offset": [self._offset(index, token_id) for token_id, _ in tokens],
        }

    def _alternatives(self, scored: TokenLogprob) -> Json:
        """Maps the token and its alternatives to log-probabilities.

        Of alternatives with the same text, such as parts of a character, the likeliest is kept.
        """
        return {
            self.token_name(token_id): logprob(value)
            for token_id, value in ((scored.token_id, scored.logprob), *reversed(scored.top))
        }

    def _offset(self, index: int, token_id: int) -> int:
        """Returns where the token's text begins in the text of choice `index`, and advances past it.

        Special tokens have no text.
        """
        text, tokenizer = self._texts[index], self.context.tokenizer
        offset = text.length
        if tokenizer and token_id not in tokenizer.special_token_ids:
            text.add(tokenizer.token_bytes(token_id))
        return offset


class _TextLength:
    """Counts the characters of text that is added as bytes. An incomplete character is not counted yet."""

    def __init__(self) -> None:
        self.length = 0
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, data: bytes) -> None:
        self.length += len(self._utf8.decode(data))
