"""A checkpoint's Jinja chat template, rendered in a sandbox as transformers renders it.

Templates and messages are untrusted: any exception while rendering becomes a RequestError.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from qwen3_dist.errors import CheckpointError, RequestError
from qwen3_dist.text import history
from qwen3_dist.text.sidecars import read_json_object, read_special_tokens

_SENTINEL = "<|end of the final message|> "  # the trailing space reveals a template that strips content
# Names that clients use for a message's reasoning; templates read the first.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """Renders a conversation to the prompt format that the model was trained on.

    `templates` are Jinja sources by name: "default", and "tool_use" if the checkpoint has a separate template for
    conversations with tools. Raises CheckpointError for a source that is not valid Jinja.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._sources = dict(templates)
        self._supported: dict[tuple[str, int], bool] = {}
        try:
            self._templates = {name: environment.from_string(source) for name, source in templates.items()}
        except Exception as error:  # noqa: BLE001 - beside Jinja's own, those of Python's compiler for deep nesting
            raise CheckpointError(f"the checkpoint's chat template is not valid Jinja: {error}") from None

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate | None:
        """Reads chat_template.jinja, tokenizer_config.json or chat_template.json, the first that has a template.

        Returns None if none has. Raises CheckpointError if a file is unreadable or names no "default" template.
        """
        templates = _read_templates(Path(path))
        return cls(templates, read_special_tokens(path)) if templates else None

    def source(self, with_tools: bool = False) -> str:
        """Returns the Jinja source that renders a conversation with or without tools."""
        return self._sources[self._name(with_tools)]

    def _name(self, with_tools: bool) -> str:
        return "tool_use" if with_tools and "tool_use" in self._templates else "default"

    def render(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **kwargs: Any,
    ) -> str:
        """Renders `messages` in OpenAI's format; `kwargs` such as `enable_thinking` are template variables.

        `continue_final_message` ends the prompt where the last message's text ends. Missing content becomes an empty
        string, and a list of text parts their text. System messages are merged at the front if the template does not
        render later ones. Call arguments that are not an object are wrapped in one if the template requires it. Raises
        RequestError (param "messages") if the template refuses the conversation or fails on it.
        """
        if not messages:
            raise RequestError("messages must have at least one message", param="messages")
        name = self._name(bool(tools))
        plain = self._adapted(name, [_plain_message(message) for message in messages])
        if continue_final_message:
            plain[-1]["content"] += _SENTINEL
        variables = {
            **self._special_tokens,
            **kwargs,
            "messages": plain,
            "tools": tools,
            "documents": kwargs.get("documents"),
            "add_generation_prompt": add_generation_prompt,
        }
        try:
            rendered = self._templates[name].render(variables)
        except Exception as error:  # noqa: BLE001 - untrusted code may raise anything
            raise RequestError(
                f"the model's chat template cannot render these messages: {error}", param="messages"
            ) from None
        return _cut_at_end(rendered) if continue_final_message else rendered

    def _adapted(self, name: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Returns `messages` in a form that template `name` supports."""
        if history.has_late_system(messages) and not self._supports(name, history.SYSTEM_PROBE):
            messages = history.merge_system_messages(messages)
        if history.has_non_object_arguments(messages) and not self._supports(name, history.ARGUMENTS_PROBE):
            messages = [history.wrap_arguments(message) for message in messages]
        return messages

    def _supports(self, name: str, probe: list[dict[str, Any]]) -> bool:
        """Whether template `name` renders every sentinel in `probe`."""
        key = (name, id(probe))
        if key not in self._supported:
            variables = {**self._special_tokens, "messages": probe, "tools": None, "documents": None}
            try:
                rendered = self._templates[name].render(variables)
            except Exception:  # noqa: BLE001 - untrusted code may raise anything
                rendered = ""
            self._supported[key] = rendered.count(history.SENTINEL) >= str(probe).count(history.SENTINEL)
        return self._supported[key]


def _cut_at_end(rendered: str) -> str:
    """Returns `rendered` up to the sentinel, stripped if the template strips the last message."""
    text, sentinel, after = rendered.rpartition(_SENTINEL.strip())
    if not sentinel:
        raise RequestError(
            "the model's chat template does not render the last message, so it cannot be continued; "
            "set continue_final_message to false",
            param="continue_final_message",
        )
    return text if after.startswith(" ") else text.rstrip()


def _read_templates(path: Path) -> dict[str, str]:
    try:
        named = {
            f.stem: f.read_text(encoding="utf-8") for f in path.glob("additional_chat_templates/*.jinja")
        }
        return {**named, "default": (path / "chat_template.jinja").read_text(encoding="utf-8")}
    except FileNotFoundError:
        pass
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"the chat template in {path} cannot be read: {error}") from None
    for name in ("tokenizer_config.json", "chat_template.json"):
        value = read_json_object(path / name).get("chat_template")
        if value is not None:
            return _named_templates(value, path / name)
    return {}


def _named_templates(value: Any, file: Path) -> dict[str, str]:
    """Returns the sources in `chat_template` of `file`: a string, an object of strings by name, or a list of objects
    with name and template."""
    try:
        if isinstance(value, str | Mapping):
            templates = {"default": value} if isinstance(value, str) else dict(value)
        else:
            templates = {t["name"]: t["template"] for t in value}
        if all(isinstance(source, str) for source in (templates["default"], *templates.values())):
            return templates
    except (TypeError, KeyError):
        pass
    raise CheckpointError(
        f"chat_template in {file} must be a string, an object of strings, or a list of objects with name and "
        "template, one named 'default'"
    )


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `message` without nulls, with content as a string and reasoning as `reasoning_content`."""
    plain = {key: value for key, value in message.items() if value is not None}
    reasoning = next((plain[key] for key in _REASONING_KEYS if key in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    plain["content"] = _plain_content(plain.get("content", ""))
    return plain


def _plain_content(content: Any) -> str:
    if isinstance(content, str):
        return content
    return "".join(_part_text(part) for part in (content if isinstance(content, list) else [content]))


def _part_text(part: Any) -> str:
    match part:
        case {"type": "text", "text": str(text)}:
            return text
        case {"type": kind}:
            found = f"a part of type {kind!r}"
        case _:
            found = f"a {type(part).__name__}"
    raise RequestError(f"message content must be a string or text parts, not {found}", param="messages")


class _Namespace(Namespace):
    """Jinja's `namespace()`, without names that begin with an underscore, which could fake Python protocols."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as in Jinja, `self` may be a keyword argument
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not set the namespace attribute {name!r}")
        super().__setitem__(name, value)


class _GenerationBlocks(Extension):
    """Renders the body of `{% generation %}`, which marks the assistant's tokens for training."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's own name and type

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlocks, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=lambda form: datetime.now().strftime(form),
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # exposing the type would allow a sandbox escape
        namespace=_Namespace,
    )
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Replaces Jinja's `tojson`, which escapes HTML and sorts keys, unlike the models' training data."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
