"""Turns the engine's token deltas of a choice into text, reasoning and tool-call deltas for clients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from qwen3_dist.errors import RequestError
from qwen3_dist.protocol.outputs import PromptLogprobs, TokenDelta, TokenLogprob
from qwen3_dist.sampling_params import SamplingParams, StructuredOutputs
from qwen3_dist.text.detokenizer import TextStream
from qwen3_dist.text.parsed import OutputParser, Parsed, ToolCallDelta
from qwen3_dist.text.tokenizer import Tokenizer


@dataclass(slots=True)  # not frozen, which would triple what making one costs; nobody changes one
class ChoiceDelta:
    """What one step adds to choice `index`.

    `text` is content, without reasoning and tool calls. `finish_reason` is OpenAI's, None while the choice runs.
    `stop_reason` is the stop string or stop token that ended the choice, None for EOS. `num_reasoning_tokens` of the
    `token_ids` are reasoning. `prompt_logprobs` are in the first delta of a prompt's first choice alone.
    """

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish_reason: str | None
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    stop_reason: str | int | None = None
    num_cached_tokens: int = 0
    num_reasoning_tokens: int = 0
    prompt_logprobs: PromptLogprobs | None = None


@dataclass(frozen=True)
class ParserSpec:
    """How to parse the text of a choice.

    `reasoning` is the reasoning state at its start, as in SamplingParams. `new_parser` makes a choice's parser from
    that state and the choice's index; None leaves all text content. `structured_outputs` replaces that of the request,
    unless None. `reports_tool_calls` changes the finish reason "stop" of a choice with tool calls to "tool_calls". A
    choice ends after `max_tool_calls` calls.
    """

    reasoning: str = "none"
    structured_outputs: StructuredOutputs | None = None
    new_parser: Callable[[str, int], OutputParser] | None = None
    reports_tool_calls: bool = True
    max_tool_calls: int | None = None


class Choice:
    """Turns one choice's token deltas into text deltas. `done` once a delta had its finish reason."""

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        spec: ParserSpec,
    ) -> None:
        self.done = False
        self._index = index
        self._spec = spec
        self._num_calls = 0
        self._stop_token_ids = params.stop_token_ids
        self._has_form = params.structured_outputs is not None
        self._text: TextStream | None = None
        self._parser: OutputParser | None = None
        self._reasoning_counter: _ReasoningTokenCounter | None = None
        if tokenizer:
            self._text = TextStream(
                tokenizer,
                params.stop,
                params.skip_special_tokens,
                params.include_stop_str_in_output,
                params.min_tokens,
            )
            self._reasoning_counter = (
                _ReasoningTokenCounter(tokenizer, params.reasoning) if params.reasoning != "none" else None
            )

    def advance(self, delta: TokenDelta) -> ChoiceDelta:
        """Adds a step's tokens. A stop string that they complete ends the choice before that string."""
        assert not self.done
        if self._parser is None and self._text and self._spec.new_parser and delta.token_ids:
            self._parser = self._spec.new_parser(self._reasoning_state(delta), self._index)
        text, reason, stopped_by = "", delta.finish_reason, self._stop_token(delta)
        if self._text:
            num_tokens = self._text.num_tokens
            text = self._text.push(delta.token_ids)
            delta = delta.first(self._text.num_tokens - num_tokens)
            if reason:
                text += self._text.finish()
            if self._text.stopped:
                reason, stopped_by = "stop", self._text.stopped_by
        parsed = self._parse(text, reason)
        calls = self._limit_calls(parsed.tool_calls)
        if len(calls) < len(parsed.tool_calls):
            reason = reason or "stop"
        if reason == "stop" and self._num_calls and self._spec.reports_tool_calls:
            reason = "tool_calls"
        self.done = reason is not None
        return ChoiceDelta(
            self._index,
            parsed.content,
            delta.token_ids,
            delta.logprobs,
            reason,
            parsed.reasoning,
            calls,
            stopped_by,
            delta.num_cached_tokens,
            self._reasoning_counter.count(delta.token_ids) if self._reasoning_counter else 0,
            delta.prompt_logprobs,
        )

    def _reasoning_state(self, first: TokenDelta) -> str:
        """Returns the reasoning state at the start, given the `first` delta.

        A structured output may begin with the text `<think>`; only the token `<think>` begins reasoning in it.
        """
        thinks = (
            self._reasoning_counter is None
            or not self._has_form
            or self._reasoning_counter.opens in first.token_ids[:1]
        )
        return self._spec.reasoning if thinks or self._spec.reasoning == "open" else "none"

    def _parse(self, text: str, reason: str | None) -> Parsed:
        if self._parser is None:
            return Parsed(text)
        parsed = self._parser.push(text)
        return parsed + self._parser.finish(cut=reason == "length") if reason else parsed

    def _limit_calls(self, parts: tuple[ToolCallDelta, ...]) -> tuple[ToolCallDelta, ...]:
        """Returns `parts` without calls beyond `max_tool_calls`."""
        if not parts:
            return ()
        limit = self._spec.max_tool_calls
        shown = tuple(part for part in parts if limit is None or part.index < limit)
        self._num_calls = max([self._num_calls, *(part.index + 1 for part in shown)])
        return shown

    def _stop_token(self, delta: TokenDelta) -> str | int | None:
        """Returns the id from `stop_token_ids` that ended the choice, None for EOS."""
        last = delta.token_ids[-1] if delta.finish_reason == "stop" and delta.token_ids else None
        return last if last in self._stop_token_ids else None


class Choices:
    """All choices of one prompt, numbered from `first_index`."""

    def __init__(
        self,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        spec: ParserSpec,
        first_index: int = 0,
    ) -> None:
        self._choices = [Choice(first_index + i, params, tokenizer, spec) for i in range(params.n)]
        self._num_running = params.n

    @property
    def done(self) -> bool:
        return not self._num_running

    @property
    def unfinished(self) -> list[int]:
        """The engine's indexes of the choices that are not done."""
        return [index for index, choice in enumerate(self._choices) if not choice.done]

    def advance(self, deltas: Iterable[TokenDelta], abort: Callable[[int], object]) -> list[ChoiceDelta]:
        """Returns the text deltas of one step, for choices that were not done before it.

        Calls `abort` with the engine's index of each choice that a stop string or the limit on tool calls ended,
        since the engine would continue it. Raises RequestError if the engine failed on a choice.
        """
        shown = []
        for delta in deltas:
            if delta.error is not None:
                raise RequestError(delta.error)
            choice = self._choices[delta.index]
            if choice.done:
                continue
            shown.append(choice.advance(delta))
            if choice.done:
                self._num_running -= 1
                if delta.finish_reason is None:
                    abort(delta.index)
        return shown


class _ReasoningTokenCounter:
    """Counts the tokens of one choice between `<think>` and `</think>`, which may only precede its content."""

    def __init__(self, tokenizer: Tokenizer, reasoning: str) -> None:
        self._tokenizer = tokenizer
        self.opens, self._closes = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
        self._inside = reasoning == "open"
        self._over = False

    def count(self, token_ids: Iterable[int]) -> int:
        """Returns how many of the next `token_ids` are reasoning."""
        counted = 0
        for token_id in token_ids:
            if self._over:
                break
            if self._inside and token_id == self._closes:
                self._over = True
            elif self._inside:
                counted += 1
            elif token_id == self.opens:
                self._inside = True
            else:
                self._over = bool(self._tokenizer.token_bytes(token_id).strip())
        return counted


def join(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    """Merges all `deltas` of one choice, and the parts of each tool call."""
    calls: dict[int, ToolCallDelta] = {}
    for part in (part for delta in deltas for part in delta.tool_calls):
        begun = calls.get(part.index)
        calls[part.index] = (
            dataclasses.replace(begun, arguments=begun.arguments + part.arguments) if begun else part
        )
    return dataclasses.replace(
        deltas[-1],
        text="".join(delta.text for delta in deltas),
        token_ids=tuple(token_id for delta in deltas for token_id in delta.token_ids),
        logprobs=tuple(logprob for delta in deltas for logprob in delta.logprobs),
        reasoning="".join(delta.reasoning for delta in deltas),
        tool_calls=tuple(calls.values()),
        num_cached_tokens=deltas[0].num_cached_tokens,
        num_reasoning_tokens=sum(delta.num_reasoning_tokens for delta in deltas),
        prompt_logprobs=deltas[0].prompt_logprobs,
    )
