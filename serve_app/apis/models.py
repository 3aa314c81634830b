"""The list of served models (/v1/models), in OpenAI's and in Anthropic's format."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus

from qwen3_dist.errors import RequestError
from serve_app.apis.shared.answer import Json

_MAX_LIMIT = 1000  # Anthropic's


@dataclass(frozen=True)
class Model:
    """A model, or an adapter of the model `parent`. `max_model_len` is None while it is not known."""

    name: str
    parent: str | None = None
    max_model_len: int | None = None


@dataclass(frozen=True)
class Models:
    """The served models. `created` is when the service started, in Unix seconds. Unknown names raise RequestError."""

    served: tuple[Model, ...]
    created: int

    def openai_list(self) -> Json:
        return {"object": "list", "data": [self.openai_model(model.name) for model in self.served]}

    def openai_model(self, name: str) -> Json:
        """Returns OpenAI's model object, with vLLM's `max_model_len` and `parent` (the base model of an adapter)."""
        model = self._find(name)
        return {
            "id": model.name,
            "object": "model",
            "created": self.created,
            "owned_by": "qwen3_dist",
            "parent": model.parent,
            "max_model_len": model.max_model_len,
        }

    def anthropic_list(self, query: Mapping[str, str]) -> Json:
        """Returns a page of the list, by the `limit`, `after_id` and `before_id` of `query`."""
        limit = query.get("limit", "20")
        if not (limit.isdecimal() and 1 <= int(limit) <= _MAX_LIMIT):
            raise RequestError(
                f"limit must be an integer from 1 to {_MAX_LIMIT}, not {limit!r}", param="limit"
            )
        after, before = (self._index_of(query, name) for name in ("after_id", "before_id"))
        names = [model.name for model in self.served][0 if after is None else after + 1 : before]
        page = names[-int(limit) :] if before is not None else names[: int(limit)]
        return {
            "data": [self.anthropic_model(name) for name in page],
            "has_more": len(page) < len(names),
            "first_id": page[0] if page else None,
            "last_id": page[-1] if page else None,
        }

    def anthropic_model(self, name: str) -> Json:
        model = self._find(name)
        return {
            "type": "model",
            "id": model.name,
            "display_name": model.name,
            "created_at": datetime.fromtimestamp(self.created, UTC).isoformat().replace("+00:00", "Z"),
            "lifecycle": "active",
            "max_input_tokens": model.max_model_len,
            "max_tokens": model.max_model_len,
        }

    def _find(self, name: str) -> Model:
        for model in self.served:
            if model.name == name:
                return model
        raise model_not_found(name, [model.name for model in self.served])

    def _index_of(self, query: Mapping[str, str], field: str) -> int | None:
        """Returns the index of the model that a field of `query` names, None without the field."""
        name = query.get(field)
        if name is None:
            return None
        names = [model.name for model in self.served]
        if name not in names:
            raise RequestError(f"{field} must be the id of a listed model, not {name!r}", param=field)
        return names.index(name)


def model_not_found(name: str, served: Sequence[str]) -> RequestError:
    """The refusal (404) of a name that no model or adapter has."""
    return RequestError(
        f"model {name!r} is not served here; use {one_of(served)}", param="model", status=HTTPStatus.NOT_FOUND
    )


def one_of(served: Sequence[str]) -> str:
    """The served names, for the end of a sentence."""
    return " or ".join(map(repr, served))
