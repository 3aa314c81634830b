"""What OpenAI's chat and text completions share: the form around choices, and usage in streams."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from serve_app.answers.base import DONE, Answer, Json, Served, event
from serve_app.choices import ChoiceDelta


class OpenAIAnswer(Answer):
    """Chunks of one answer share its id and time. With `include_usage` a last chunk has the counts."""

    prefix: str
    object_name: str
    chunk_name: str

    def __init__(self, served: Served, include_usage: bool) -> None:
        super().__init__(served)
        self._include_usage = include_usage
        self._id = f"{self.prefix}-{self.unique}"
        self._created = int(time.time())

    def delta(self, delta: ChoiceDelta) -> bytes:
        return b"".join(
            event(self._form(self.chunk_name, [choice], None if self._include_usage else ...))
            for choice in self.chunk_choices(delta)
        )

    def end(self) -> bytes:
        if not self._include_usage:
            return DONE
        return event(self._form(self.chunk_name, [], self.usage.to_json())) + DONE

    def whole(self, choices: Sequence[ChoiceDelta]) -> Json:
        return self._form(self.object_name, [self.choice(c) for c in choices], self.usage.to_json())

    @abstractmethod
    def choice(self, delta: ChoiceDelta) -> Json:
        """A finished choice."""

    @abstractmethod
    def chunk_choices(self, delta: ChoiceDelta) -> list[Json]:
        """The choice of each chunk that shows `delta`."""

    def _form(self, name: str, choices: list[Json], counts: Any) -> Json:
        form = {
            "id": self._id,
            "object": name,
            "created": self._created,
            "model": self.served.model,
            "choices": choices,
        }
        return form if counts is ... else {**form, "usage": counts}
