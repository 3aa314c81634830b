"""API keys: their hashes, what each key may do, and the file that lists them.

keys:
  - name: alice
    key: sha256:3c5b...              # or the key itself
    requests_per_minute: 60
  - {name: ops, key: sha256:91ab..., admin: true}
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections import Counter
from dataclasses import dataclass
from typing import Any

from cluster.yaml_file import read_yaml
from qwen3_dist.errors import ConfigError
from qwen3_dist.settings_reader import setting
from serve_app.settings.checks import require_positive

API_KEY, ADMIN_KEY = "api_key", "admin_key"  # the names of the keys that are set without a file
_SCHEME = "sha256:"
_RANDOM_BYTES = 32


def hash_of(key: str) -> str:
    """Returns `sha256:` and the hexadecimal SHA-256 of `key`, as a client sends it."""
    return _SCHEME + hashlib.sha256(key.encode()).hexdigest()


def hash_key(key: Any) -> Any:
    """Returns the hash of a key from the settings. A hash stays as it is, and so does "" and all that is not text."""
    return hash_of(key) if isinstance(key, str) and key and not is_hash(key) else key


def is_hash(key: str) -> bool:
    """Returns whether `key` is the hash of a key rather than a key."""
    return key.startswith(_SCHEME)


def check_hash(setting: str, key: Any) -> None:
    """Raises ConfigError, which names `setting`, if `key` begins as a hash does and is none."""
    if isinstance(key, str) and is_hash(key) and not re.fullmatch(_SCHEME + "[0-9a-f]{64}", key):
        raise ConfigError(f"{setting} must have 64 digits of 0-9 and a-f after {_SCHEME}")


def new_key() -> str:
    """Returns a new random key of 256 bits."""
    return "sk-" + secrets.token_urlsafe(_RANDOM_BYTES)


@dataclass(frozen=True)
class Key:
    """An API key, as its hash, and what its holder may do. A limit of None does not limit."""

    name: str
    key: str = setting("", "the hash of the key, as hash_key returns it", parse=hash_key, secret=True)
    admin: bool = False
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None
    max_concurrent_requests: int | None = None
    min_priority: int | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"\w[\w.@-]{0,63}", self.name):
            raise ConfigError(
                f"name must be up to 64 letters, digits, '_', '-', '.' and '@', not {self.name!r}; logs and "
                "metrics show it"
            )
        if not isinstance(self.key, str) or not is_hash(self.key):
            raise ConfigError(f"key of {self.name!r} must be a key, or sha256: and its hash")
        check_hash("key", self.key)
        require_positive(self, "requests_per_minute", "tokens_per_minute", "max_concurrent_requests")


@dataclass(frozen=True)
class KeysFile:
    """The contents of a keys file. With an empty list no request has a valid key."""

    keys: tuple[Key, ...]

    def __post_init__(self) -> None:
        for what, values in (
            ("name", [each.name for each in self.keys]),
            ("key", [each.key for each in self.keys]),
        ):
            twice = next((value for value, count in Counter(values).items() if count > 1), None)
            if twice is not None:
                names = [each.name for each in self.keys if getattr(each, what) == twice]
                raise ConfigError(f"keys has two entries with one {what}: {' and '.join(names)}; keep one")
        if taken := {API_KEY, ADMIN_KEY} & {each.name for each in self.keys}:
            raise ConfigError(f"keys must not use the name {min(taken)}, which is that of a setting")


def read_keys(path: str) -> tuple[Key, ...]:
    """Reads a keys file. Raises ConfigError with file, line and reason."""
    return read_yaml(path).settings(KeysFile).keys
