"""The list of served models (/v1/models), in OpenAI's and in Anthropic's format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.answer import Json

_MAX_LIMIT = 1000  # Anthropic's


@dataclass(frozen=True)
class Models:
    """The model `names[0]` and its adapters. `created` is when the service started, in Unix seconds."""

    names: tuple[str, ...]
    created: int

    def check(self, name: str) -> None:
        """Raises RequestError (404) unless `name` is served."""
        if name not in self.names:
            served = " or ".join(map(repr, self.names))
            raise RequestError(
                f"model {name!r} is not served here; use {served}",
                param="model",
                status=HTTPStatus.NOT_FOUND,
            )

    def openai_list(self, max_model_len: int | None) -> Json:
        return {"object": "list", "data": [self.openai_model(name, max_model_len) for name in self.names]}

    def openai_model(self, name: str, max_model_len: int | None) -> Json:
        """Returns OpenAI's model object, with vLLM's `max_model_len` and `parent` (the base model of an adapter)."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "qwen3_dist",
            "parent": None if name == self.names[0] else self.names[0],
            "max_model_len": max_model_len,
        }

    def anthropic_list(self, max_model_len: int | None, query: Mapping[str, str]) -> Json:
        """Returns a page of the list, by the `limit`, `after_id` and `before_id` of `query`. Raises RequestError."""
        limit = query.get("limit", "20")
        if not (limit.isdecimal() and 1 <= int(limit) <= _MAX_LIMIT):
            raise RequestError(
                f"limit must be an integer from 1 to {_MAX_LIMIT}, not {limit!r}", param="limit"
            )
        after, before = (self._index_of(query, name) for name in ("after_id", "before_id"))
        names = self.names[0 if after is None else after + 1 : before]
        page = names[-int(limit) :] if before is not None else names[: int(limit)]
        return {
            "data": [self.anthropic_model(name, max_model_len) for name in page],
            "has_more": len(page) < len(names),
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
        }

    def _index_of(self, query: Mapping[str, str], name: str) -> int | None:
        """Returns the index of the model that `query[name]` names, None without it. Raises RequestError."""
        model = query.get(name)
        if model is not None and model not in self.names:
            raise RequestError(f"{name} must be the id of a listed model, not {model!r}", param=name)
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
