"""One generated choice as its reader sees it, offline or a client: token deltas of the engine in, safe text out."""

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


@dataclass(frozen=True)
class ChoiceDelta:
    """What one step shows of choice `index`; `finish_reason` is OpenAI's, None while it runs.

    `text` is content: what follows reasoning and is no tool call. `stop_reason` is the stop string or stop
    token that ended the choice, None for EOS. `num_reasoning_tokens` of `token_ids` were thought. The first
    delta of a prompt's first choice has the `prompt_logprobs`.
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
class Reading:
    """How the text of a choice is read: where thinking stands at its start (as SamplingParams has it), what makes a
    parser for each choice from where thinking stands there, and what its tool calls mean for its end.

    `form` is what calls make of the form that the text must have; None leaves it to the request's parameters.
    `calls_end_it`: finishing with a tool call is the finish reason "tool_calls", not "stop". Of more than
    `most_calls` calls the choice ends with the last that is shown.
    """

    reasoning: str = "none"
    form: StructuredOutputs | None = None
    new_parser: Callable[[str], OutputParser] | None = None
    calls_end_it: bool = True
    most_calls: int | None = None


class Choice:
    """Turns one choice's token deltas into text deltas. `done` once its finish reason was shown."""

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        tokenizer: Tokenizer | None,
        reading: Reading,
    ) -> None:
        self.done = False
        self._index = index
        self._reading = reading
        self._num_calls = 0
        self._stop_token_ids = params.stop_token_ids
        self._has_form = params.structured_outputs is not None
        self._text: TextStream | None = None
        self._parser: OutputParser | None = None
        self._thinking: _Thinking | None = None
        if tokenizer:
            self._text = TextStream(
                tokenizer,
                params.stop,
                params.skip_special_tokens,
                params.include_stop_str_in_output,
                params.min_tokens,
            )
            self._thinking = _Thinking(tokenizer, params.reasoning) if params.reasoning != "none" else None

    def advance(self, delta: TokenDelta) -> ChoiceDelta:
        """Takes a step's tokens; a stop string that they complete ends the choice before it."""
        assert not self.done
        if self._parser is None and self._text and self._reading.new_parser and delta.token_ids:
            self._parser = self._reading.new_parser(self._reasoning(delta))
        text, reason, stopped_by = "", delta.finish_reason, self._stop_token(delta)
        if self._text:
            taken = self._text.num_taken
            text = self._text.push(delta.token_ids)
            delta = delta.first(self._text.num_taken - taken)
            if reason:
                text += self._text.finish()
            if self._text.stopped:
                reason, stopped_by = "stop", self._text.stopped_by
        parsed = self._parse(text, reason)
        calls = self._shown_calls(parsed.tool_calls)
        if len(calls) < len(parsed.tool_calls):
            reason = reason or "stop"
        if reason == "stop" and self._num_calls and self._reading.calls_end_it:
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
            self._thinking.count(delta.token_ids) if self._thinking else 0,
            delta.prompt_logprobs,
        )

    def _reasoning(self, first: TokenDelta) -> str:
        """Where thinking stands at the start. A form that begins with the text <think>, and not with that token, is
        no thought."""
        thinks = self._thinking is None or not self._has_form or self._thinking.opens in first.token_ids[:1]
        return self._reading.reasoning if thinks or self._reading.reasoning == "open" else "none"

    def _parse(self, text: str, reason: str | None) -> Parsed:
        if self._parser is None:
            return Parsed(text)
        parsed = self._parser.push(text)
        return parsed + self._parser.finish(cut=reason == "length") if reason else parsed

    def _shown_calls(self, parts: tuple[ToolCallDelta, ...]) -> tuple[ToolCallDelta, ...]:
        """Those of calls that the client wants."""
        most = self._reading.most_calls
        shown = tuple(part for part in parts if most is None or part.index < most)
        self._num_calls = max([self._num_calls, *(part.index + 1 for part in shown)])
        return shown

    def _stop_token(self, delta: TokenDelta) -> str | int | None:
        """The stop token that ended the choice; EOS is none."""
        last = delta.token_ids[-1] if delta.finish_reason == "stop" and delta.token_ids else None
        return last if last in self._stop_token_ids else None


class Choices:
    """All choices of one prompt, numbered from `first_index`."""

    def __init__(
        self, params: SamplingParams, tokenizer: Tokenizer | None, reading: Reading, first_index: int = 0
    ) -> None:
        self._choices = [Choice(first_index + i, params, tokenizer, reading) for i in range(params.n)]

    @property
    def done(self) -> bool:
        return all(choice.done for choice in self._choices)

    def advance(self, deltas: Iterable[TokenDelta], abort: Callable[[int], object]) -> list[ChoiceDelta]:
        """The text deltas of one step, for those choices that were not done yet.

        Calls `abort` with the engine's index of each choice that a stop string or a last tool call ended, since the
        engine would continue it. Raises RequestError if the engine could not go on with a choice.
        """
        shown = []
        for delta in deltas:
            if delta.error is not None:
                raise RequestError(delta.error)
            choice = self._choices[delta.index]
            if choice.done:
                continue
            shown.append(choice.advance(delta))
            if choice.done and delta.finish_reason is None:
                abort(delta.index)
        return shown


class _Thinking:
    """Counts the tokens of one choice that lie between <think> and </think>. A model thinks once, and first."""

    def __init__(self, tokenizer: Tokenizer, reasoning: str) -> None:
        self._tokenizer = tokenizer
        self.opens, self._closes = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
        self._inside = reasoning == "open"
        self._over = False

    def count(self, token_ids: Iterable[int]) -> int:
        """How many of these next tokens were thought."""
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
    """All `deltas` of one choice as one, each tool call whole."""
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
