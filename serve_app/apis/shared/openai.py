"""What OpenAI's chat and text completions share: the object around choices, and usage in streams."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qwen3_dist.protocol.outputs import TokenLogprob
from qwen3_dist.text.choice import ChoiceDelta
from serve_app.apis.shared.answer import DONE, Answer, AnswerContext, Json, event
from serve_app.apis.shared.errors import to_json

_PLACE = "\0"  # in an event, where the text of others comes; no name has it


def logprob(value: float) -> float:
    """Clamps a log-probability to OpenAI's minimum, since JSON has no infinity."""
    return max(value, -9999.0)


@dataclass(frozen=True)
class AnswerOptions:
    """What the client asked an answer to include.

    `include_usage` and `continuous_usage_stats` are OpenAI's and vLLM's stream options. `tokens_as_ids` names the
    tokens of log-probabilities `token_id:N`. `echo` puts the prompt ahead of the answer.
    """

    include_usage: bool = False
    continuous_usage_stats: bool = False
    token_ids: bool = False
    tokens_as_ids: bool = False
    logprobs: bool = False
    prompt_logprobs: bool = False
    echo: bool = False
    reasoning: bool = True


class OpenAIAnswer(Answer):
    """Serializes OpenAI's completion objects. All chunks of a stream share one id and creation time.

    Subclasses set `prefix` (of the id), `object_name` and `chunk_name` (values of `object`).
    """

    prefix: str
    object_name: str
    chunk_name: str

    def __init__(self, context: AnswerContext, options: AnswerOptions) -> None:
        super().__init__(context)
        # A checkpoint without a tokenizer yields no text, so its answers always include token ids.
        self.options = options if context.tokenizer else replace(options, token_ids=True)
        self._id = f"{self.prefix}-{context.request_id or self.unique}"
        self._created = context.identity.created
        self._around: dict[
            tuple[int, bool, str], list[bytes]
        ] = {}  # the JSON around the text of plain chunks
        self._may_be_plain = not (self.options.token_ids or self.options.continuous_usage_stats)

    def delta(self, delta: ChoiceDelta) -> bytes:
        if not (self._may_be_plain and self.is_plain(delta)):
            return self._chunks(delta)
        # Chunks of a choice differ in their text alone, so the JSON around it is made once.
        kind = (delta.index, bool(delta.reasoning), self.context.weights_version())
        around = self._around.get(kind)
        if around is None:
            like = ChoiceDelta(
                delta.index, _PLACE if delta.text else "", (), (), None, _PLACE if delta.reasoning else ""
            )
            around = self._around[kind] = self._chunks(like).split(to_json(_PLACE))
        return to_json(delta.text or delta.reasoning).join(around)

    def is_plain(self, delta: ChoiceDelta) -> bool:
        """Whether `delta` becomes one chunk that has its text, or its reasoning, and nothing else of it."""
        return (
            (not delta.reasoning if delta.text else bool(delta.reasoning))
            and delta.finish_reason is None
            and not delta.logprobs
            and not delta.tool_calls
        )

    def _chunks(self, delta: ChoiceDelta) -> bytes:
        usage: Json = {}
        if self.options.include_usage:
            usage["usage"] = self.usage.to_json() if self.options.continuous_usage_stats else None
        return b"".join(
            event(self._object(self.chunk_name, [choice]) | usage) for choice in self.chunk_choices(delta)
        )

    def end(self) -> bytes:
        if not self.options.include_usage:
            return DONE
        return event(self._object(self.chunk_name, []) | {"usage": self.usage.to_json()}) + DONE

    def full_response(self, choices: Sequence[ChoiceDelta]) -> Json:
        response = self._object(self.object_name, [self.choice(choice) for choice in choices])
        return response | {"usage": self.usage.to_json()}

    def token_text(self, token_id: int) -> str:
        """Returns the text of a token; bytes that are not UTF-8 become U+FFFD."""
        tokenizer = self.context.tokenizer
        return tokenizer.token_bytes(token_id).decode(errors="replace") if tokenizer else ""

    def token_name(self, token_id: int) -> str:
        """Returns the `token` of log-probabilities: the token's text, or `token_id:N`."""
        as_id = self.options.tokens_as_ids or self.context.tokenizer is None
        return f"token_id:{token_id}" if as_id else self.token_text(token_id)

    def vllm_fields(self, delta: ChoiceDelta) -> Json:
        """Returns vLLM's additional fields of a choice: `stop_reason`, and `token_ids` if requested."""
        ids = {"token_ids": list(delta.token_ids)} if self.options.token_ids else {}
        return {"stop_reason": delta.stop_reason, **ids} if delta.finish_reason else ids

    def prompt_logprobs(self, delta: ChoiceDelta) -> list[Json | None] | None:
        """Returns vLLM's `prompt_logprobs`, if the client asked for them.

        Each item maps token ids to scores: those of the prompt's token and of the likeliest alternatives.
        """
        if delta.prompt_logprobs is None or not self.options.prompt_logprobs:
            return None
        return [self._by_token_id(p) if p else None for p in delta.prompt_logprobs]

    def _by_token_id(self, scored: TokenLogprob) -> Json:
        likeliest = ((token_id, value, rank) for rank, (token_id, value) in enumerate(scored.top, start=1))
        return {
            str(token_id): {
                "logprob": logprob(value),
                "rank": rank,
                "decoded_token": self.token_text(token_id),
            }
            for token_id, value, rank in ((scored.token_id, scored.logprob, scored.rank), *likeliest)
        }

    @abstractmethod
    def choice(self, delta: ChoiceDelta) -> Json:
        """Returns a choice of the response body."""

    @abstractmethod
    def chunk_choices(self, delta: ChoiceDelta) -> list[Json]:
        """Returns the choice of each chunk that `delta` becomes."""

    def _object(self, name: str, choices: list[Json]) -> Json:
        version = self.context.weights_version()
        return {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self.context.model,
            "choices": choices,
            **({"system_fingerprint": version} if version else {}),
        }
