"""OpenAI's chat completions."""

from __future__ import annotations

from qwen3_dist.engine.outputs import TokenLogprob
from qwen3_dist.text.tokenizer import Tokenizer
from serve_app.answers.base import Answer, Json
from serve_app.choices import ChoiceDelta


class ChatAnswer(Answer):
    """`chat.completion` and its chunks."""

    prefix = "chatcmpl"
    object_name = "chat.completion"
    chunk_name = "chat.completion.chunk"

    def __init__(self, model: str, tokenizer: Tokenizer | None, include_usage: bool) -> None:
        super().__init__(model, tokenizer, include_usage)
        self._begun: set[int] = set()

    def _choice(self, delta: ChoiceDelta) -> Json:
        return self._with(delta, {"message": {"role": "assistant", "content": delta.text}})

    def _choice_chunk(self, delta: ChoiceDelta) -> Json:
        role = {} if delta.index in self._begun else {"role": "assistant"}
        self._begun.add(delta.index)
        return self._with(delta, {"delta": {**role, "content": delta.text} if delta.text or role else {}})

    def _with(self, delta: ChoiceDelta, body: Json) -> Json:
        content = [
            {**self._token(p.token_id, p.logprob), "top_logprobs": self._top(p)} for p in delta.logprobs
        ]
        return {
            "index": delta.index,
            **body,
            "logprobs": {"content": content} if content else None,
            "finish_reason": delta.finish_reason,
        }

    def _top(self, logprob: TokenLogprob) -> list[Json]:
        return [self._token(*alternative) for alternative in logprob.top]

    def _token(self, token_id: int, logprob: float) -> Json:
        data = self._tokenizer and list(self._tokenizer.token_bytes(token_id))
        return {"token": self._token_text(token_id), "logprob": logprob, "bytes": data}
