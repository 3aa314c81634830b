"""Records requests while an engine answers them: latencies, lengths, and how they end."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType

from qwen3_dist.errors import RequestError
from qwen3_dist.percentiles import percentile
from qwen3_dist.protocol.outputs import TokenDelta
from qwen3_dist.text.choice import ChoiceDelta
from serve_app.metrics import definitions as names
from serve_app.metrics.values import Values

_FIRST_TOKENS_KEPT = 1000
_ENDS = ("stop", "length", "abort", "error")


class RequestMetrics:
    """Counts requests of one engine in `values`. A request here is a sequence: one choice of one prompt."""

    def __init__(self, values: Values | None = None) -> None:
        self.values = values = values or Values()
        for reason in _ENDS:
            values.add(names.REQUEST_SUCCESS, 0.0, reason)
        self.to_first_token = values.histogram(names.TIME_TO_FIRST_TOKEN)
        self.between_tokens = values.histogram(names.INTER_TOKEN_LATENCY)
        self.per_output_token = values.histogram(names.TIME_PER_OUTPUT_TOKEN)
        self.e2e = values.histogram(names.E2E_LATENCY)
        self.queue = values.histogram(names.QUEUE_TIME)
        self.prefill = values.histogram(names.PREFILL_TIME)
        self.decode = values.histogram(names.DECODE_TIME)
        self.inference = values.histogram(names.INFERENCE_TIME)
        self.prompt_tokens = values.histogram(names.REQUEST_PROMPT_TOKENS)
        self.generation_tokens = values.histogram(names.REQUEST_GENERATION_TOKENS)
        self._first_tokens: deque[tuple[float, float]] = deque(maxlen=_FIRST_TOKENS_KEPT)

    def watch(self, arrival_s: float, prompt_tokens: int, n: int) -> PromptWatch:
        """Watches the `n` choices of a prompt that came at `arrival_s`, on the monotonic clock, and is queued now."""
        return PromptWatch(self, arrival_s, prompt_tokens, n)

    def count_first_token(self, ttft_s: float) -> None:
        """Counts a request whose first token came now, after `ttft_s` seconds."""
        self.to_first_token.observe(ttft_s)
        self._first_tokens.append((time.monotonic(), ttft_s))

    def recent_ttft_s(self, period_s: float) -> float:
        """The time within which nine of ten requests had their first token, of those that had it in the last
        `period_s` seconds; 0 if none had."""
        since = time.monotonic() - period_s
        recent = sorted(ttft_s for at_s, ttft_s in self._first_tokens if at_s > since)
        return percentile(recent, 90) if recent else 0.0

    def pooled(self, arrival_s: float, count: int) -> None:
        """Counts `count` prompts of a pooling request that ended."""
        self.values.add(names.REQUEST_SUCCESS, count, "stop")
        self.e2e.observe(time.monotonic() - arrival_s, count)


class _Choice:
    """One choice while it runs; times are of the engine's clock."""

    # `first_s` stays 0 if another engine generated the first token.
    __slots__ = ("first_s", "last_s", "scheduled_s", "tokens", "ended", "finish_reason")

    def __init__(self) -> None:
        self.first_s = self.last_s = self.scheduled_s = 0.0
        self.tokens = 0
        self.ended = False
        self.finish_reason = ""


class PromptWatch:
    """A context in which the choices of one prompt are generated. Those that have not ended when it ends count as
    aborted, or as failed if an error ends it; not at all if the request was refused before its first token."""

    def __init__(self, metrics: RequestMetrics, arrival_s: float, prompt_tokens: int, n: int) -> None:
        self._metrics = metrics
        self._arrival_s, self._queued_s = arrival_s, time.monotonic()
        self._prompt_tokens = prompt_tokens
        self._choices = [_Choice() for _ in range(n)]

    def resume(self, num_tokens: Mapping[int, int]) -> None:
        """Another engine generated `num_tokens` of the choices that go on, by their index, and all of the others."""
        for index, choice in enumerate(self._choices):
            choice.ended = index not in num_tokens
            choice.tokens, choice.last_s = num_tokens.get(index, 0), self._queued_s

    def generated(self, deltas: Iterable[TokenDelta]) -> None:
        """Takes the deltas of a part as the engine gave them."""
        metrics = self._metrics
        for delta in deltas:
            count, step_s = len(delta.token_ids), delta.step_s
            choice = self._choices[delta.index]
            if choice.ended or not step_s:
                continue
            if choice.scheduled_s == 0.0:
                choice.scheduled_s = delta.scheduled_s
                metrics.queue.observe(max(0.0, delta.scheduled_s - self._queued_s))
            if not count:
                continue
            if choice.tokens:
                metrics.between_tokens.observe((step_s - choice.last_s) / count, count)
            else:
                choice.first_s = step_s
                metrics.count_first_token(time.monotonic() - self._arrival_s)
                metrics.prefill.observe(step_s - choice.scheduled_s)
            choice.last_s = step_s
            choice.tokens += count

    def shown(self, deltas: Sequence[ChoiceDelta], first_index: int = 0) -> None:
        """Takes what is shown of the part; the prompt's first choice has `first_index`."""
        for delta in deltas:
            if delta.finish_reason is not None:
                choice = self._choices[delta.index - first_index]
                choice.finish_reason = delta.finish_reason
                self._end(choice, "stop" if delta.finish_reason == "tool_calls" else delta.finish_reason)

    def _end(self, choice: _Choice, reason: str) -> None:
        metrics = self._metrics
        choice.ended = True
        metrics.values.add(names.REQUEST_SUCCESS, 1.0, reason if reason in _ENDS else "error")
        metrics.prompt_tokens.observe(self._prompt_tokens)
        metrics.generation_tokens.observe(choice.tokens)
        metrics.e2e.observe(time.monotonic() - self._arrival_s)
        if choice.first_s:
            metrics.decode.observe(choice.last_s - choice.first_s)
            metrics.inference.observe(choice.last_s - choice.scheduled_s)
        if choice.first_s and choice.tokens > 1:
            metrics.per_output_token.observe((choice.last_s - choice.first_s) / (choice.tokens - 1))

    @property
    def finish_reasons(self) -> list[str]:
        """How the choices ended that did."""
        return [choice.finish_reason for choice in self._choices if choice.finish_reason]

    @property
    def stages(self) -> tuple[float, float | None, float | None, float | None]:
        """When the prompt was queued, when its first choice was scheduled and had its first token, and when the last
        token of all came; None for what has not happened. On the monotonic clock."""
        begun = [choice for choice in self._choices if choice.scheduled_s]
        talking = [choice for choice in begun if choice.first_s]
        return (
            self._queued_s,
            min((choice.scheduled_s for choice in begun), default=None),
            min((choice.first_s for choice in talking), default=None),
            max((choice.last_s for choice in talking), default=None),
        )

    def __enter__(self) -> PromptWatch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        begun = any(choice.scheduled_s for choice in self._choices)
        if isinstance(error, RequestError) and not begun:
            return
        reason = "error" if isinstance(error, Exception) else "abort"
        for choice in self._choices:
            if not choice.ended:
                choice.finish_reason = reason
                self._metrics.values.add(names.REQUEST_SUCCESS, 1.0, reason)
