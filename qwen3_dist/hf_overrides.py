"""The setting `hf_overrides`: fields that replace those of a checkpoint's config.json, as a JSON object."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from qwen3_dist.errors import ConfigError

_ROPE = ("rope_parameters", "rope_scaling")
_ONE_FIELD = (("num_experts", "num_local_experts"), ("torch_dtype", "dtype"))  # two spellings of each


@dataclass(frozen=True)
class HfOverrides:
    """Fields of config.json, as the text of a JSON object; "" is none. `HfOverrides.parse` is the inverse of `str`."""

    text: str = ""

    @classmethod
    def parse(cls, given: str | Mapping[str, Any] | HfOverrides) -> HfOverrides:
        """Reads a mapping or the text of a JSON object. Raises ConfigError."""
        if isinstance(given, HfOverrides):
            return given
        try:
            fields = json.loads(given or "{}") if isinstance(given, str) else given
            if isinstance(fields, Mapping):
                return cls(json.dumps(fields, sort_keys=True) if fields else "")
        except (ValueError, TypeError, RecursionError):
            pass
        raise ConfigError(
            'hf_overrides must be a JSON object such as {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, '
            f'"original_max_position_embeddings": 32768}}}}, not {given!r}'
        )

    def __str__(self) -> str:
        return self.text

    def applied(self, raw: Mapping[str, Any]) -> dict[str, Any]:
        """The config.json `raw` with these fields in place of its own.

        A field also takes the place of its other spelling. RoPE's base stays unless it is among the fields.
        """
        changed = json.loads(self.text) if self.text else {}
        fields = dict(raw)
        for names in _ONE_FIELD:
            if changed.keys() & set(names):
                fields = _without(fields, names)
        if not changed.keys() & {*_ROPE, "rope_theta"}:
            return fields | changed
        if changed.keys() & set(_ROPE):
            fields = _without(fields, _ROPE)
        inner = {name: fields[name] for name in _ROPE if isinstance(fields.get(name), Mapping)}
        fields |= {name: _without(settings, ("rope_theta",)) for name, settings in inner.items()}
        base = _base(raw) if _base(changed) is None else _base(changed)
        return fields | ({} if base is None else {"rope_theta": base}) | changed


def _base(raw: Mapping[str, Any]) -> Any:
    """RoPE's base of the config.json `raw`, as `read_rope` finds it; None if it has none."""
    for name in _ROPE:
        settings = raw.get(name)
        if isinstance(settings, Mapping) and settings.get("rope_theta") is not None:
            return settings["rope_theta"]
    return raw.get("rope_theta")


def _without(fields: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if name not in names}
