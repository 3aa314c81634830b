"""OpenAI's text completions."""

from __future__ import annotations

from serve_app.answers.base import Json, Served
from serve_app.answers.openai import OpenAIAnswer, Shown
from serve_app.choices import ChoiceDelta


class CompletionAnswer(OpenAIAnswer):
    """`text_completion`. Where there is no tokenizer, the text is empty and `token_ids` are given."""

    prefix = "cmpl"
    object_name = chunk_name = "text_completion"

    def __init__(self, served: Served, shown: Shown) -> None:
        super().__init__(served, shown)
        self._offsets: dict[int, int] = {}

    def choice(self, delta: ChoiceDelta) -> Json:
        return {
            "index": delta.index,
            "text": delta.text,
            "logprobs": self._logprobs(delta) if delta.logprobs else None,
            "finish_reason": delta.finish_reason,
            **self.beside(delta),
        }

    def chunk_choices(self, delta: ChoiceDelta) -> list[Json]:
        shown = delta.text or delta.logprobs or delta.finish_reason or self.shown.token_ids
        return [self.choice(delta)] if shown else []

    def _logprobs(self, delta: ChoiceDelta) -> Json:
        """OpenAI's columns. Of several alternatives with one text (parts of a character) the likeliest stays."""
        return {
            "tokens": [self.token_name(p.token_id) for p in delta.logprobs],
            "token_logprobs": [p.logprob for p in delta.logprobs],
            "top_logprobs": [
                {self.token_name(i): value for i, value in reversed(p.top)} for p in delta.logprobs
            ],
            "text_offset": [self._offset(delta.index, p.token_id) for p in delta.logprobs],
        }

    def _offset(self, index: int, token_id: int) -> int:
        """Where the token's text begins in the choice's; moves past it. Special tokens have no text."""
        offset = self._offsets.get(index, 0)
        tokenizer = self.served.tokenizer
        special = tokenizer is None or token_id in tokenizer.special_token_ids
        self._offsets[index] = offset + (0 if special else len(self.token_text(token_id)))
        return offset
