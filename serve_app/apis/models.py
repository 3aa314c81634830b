"""The models that are served, in OpenAI's form and in Anthropic's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.answer import Json

_MOST = 1000  # Anthropic's


@dataclass(frozen=True)
class Models:
    """The model `names[0]` and its adapters, which were `created` at a time in seconds since 1970."""

    names: tuple[str, ...]
    created: int

    def check(self, name: str) -> None:
        """Raises RequestError (404) unless `name` is served."""
        if name not in self.names:
            served = ", ".join(map(repr, self.names))
            raise RequestError(
                f"model {name!r} is not served here; {served} {'are' if len(self.names) > 1 else 'is'}",
                param="model",
                status=HTTPStatus.NOT_FOUND,
            )

    def openai_list(self, max_model_len: int | None) -> Json:
        return {"object": "list", "data": [self.openai_model(name, max_model_len) for name in self.names]}

    def openai_model(self, name: str, max_model_len: int | None) -> Json:
        """OpenAI's object, with the model that an adapter is for, and vLLM's context length."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "qwen3_dist",
            "parent": None if name == self.names[0] else self.names[0],
            "max_model_len": max_model_len,
        }

    def anthropic_list(self, max_model_len: int | None, query: Mapping[str, str]) -> Json:
        """A page of the list: at most `limit` models after `after_id` or before `before_id`. Raises RequestError."""
        limit = query.get("limit", "20")
        if not (limit.isdecimal() and 1 <= int(limit) <= _MOST):
            raise RequestError(f"limit must be an integer from 1 to {_MOST}, not {limit!r}", param="limit")
        after, before = (self._place(query, name) for name in ("after_id", "before_id"))
        names = self.names[0 if after is None else after + 1 : before]
        shown = names[-int(limit) :] if before is not None else names[: int(limit)]
        return {
            "data": [self.anthropic_model(name, max_model_len) for name in shown],
            "has_more": len(shown) < len(names),
            "first_id": shown[0] if shown else None,
            "last_id": shown[-1] if shown else None,
        }

    def _place(self, query: Mapping[str, str], name: str) -> int | None:
        """The index of the model that the field `name` of `query` names. Raises RequestError if none is called so."""
        model = query.get(name)
        if model is not None and model not in self.names:
            raise RequestError(f"{name} must be the id of a model that is listed, not {model!r}", param=name)
        return None if model is None else self.names.index(model)

    def anthropic_model(self, name: str, max_model_len: int | None) -> Json:
        return {
            "type": "model",
            "id": name,
            "display_name": name,
            "created_at": datetime.fromtimestamp(self.created, UTC).isoformat().replace("+00:00", "Z"),
            "lifecycle": "active",
            "max_input_tokens": max_model_len,
            "max_tokens": max_model_len,
        }
