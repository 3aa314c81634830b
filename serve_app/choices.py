"""One generated choice as the client sees it: token deltas of the engine in, safe text deltas out."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

from qwen3_dist.engine.outputs import PromptLogprobs, TokenDelta, TokenLogprob
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.text.detokenizer import TextStream
from qwen3_dist.text.parsed import ToolCallDelta
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


class Choice:
    """Turns one choice's token deltas into text deltas. `done` once its finish reason was shown."""

    def __init__(self, index: int, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.done = False
        self._index = index
        self._stop_token_ids = params.stop_token_ids
        self._stream = (
            TextStream(
                tokenizer,
                params.stop,
                params.skip_special_tokens,
                params.include_stop_str_in_output,
                params.min_tokens,
            )
            if tokenizer
            else None
        )

    def advance(self, delta: TokenDelta) -> ChoiceDelta:
        """Takes a step's tokens; a stop string that they complete ends the choice before it."""
        assert not self.done
        text, reason, stopped_by = "", delta.finish_reason, self._stop_token(delta)
        if self._stream:
            taken = self._stream.num_taken
            text = self._stream.push(delta.token_ids)
            delta = delta.first(self._stream.num_taken - taken)
            if reason:
                text += self._stream.finish()
            if self._stream.stopped:
                reason, stopped_by = "stop", self._stream.stopped_by
        self.done = reason is not None
        return ChoiceDelta(
            self._index,
            text,
            delta.token_ids,
            delta.logprobs,
            reason,
            stop_reason=stopped_by,
            num_cached_tokens=delta.num_cached_tokens,
            prompt_logprobs=delta.prompt_logprobs,
        )

    def _stop_token(self, delta: TokenDelta) -> str | int | None:
        """The stop token that ended the choice; EOS is none."""
        last = delta.token_ids[-1] if delta.finish_reason == "stop" and delta.token_ids else None
        return last if last in self._stop_token_ids else None


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
