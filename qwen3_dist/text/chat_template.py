"""A checkpoint's own Jinja chat template, rendered in a sandbox as transformers renders it.

The template is code somebody else wrote and the messages are a stranger's: whatever goes wrong
inside a rendering is that request's error, never the service's.
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

_SENTINEL = "<|end of the final message|> "  # ends in a space, which shows whether a template strips
# A message's reasoning goes by several names; templates read the first.
_REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """Renders a conversation to the prompt text the model was trained on.

    `templates` are Jinja sources by name: "default", and "tool_use" where the checkpoint has a
    separate one for conversations with tools. Raises CheckpointError for a source that is no Jinja.
    """

    def __init__(self, templates: Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        environment = _environment()
        self._special_tokens = dict(special_tokens)
        self._sources = dict(templates)
        self._supported: dict[tuple[str, int], bool] = {}
        try:
            self._templates = {name: environment.from_string(source) for name, source in templates.items()}
        except jinja2.TemplateError as error:
            raise CheckpointError(f"the checkpoint's chat template is not valid Jinja: {error}") from None

    @classmethod
    def from_directory(cls, path: str | Path) -> ChatTemplate | None:
        """Reads chat_template.jinja, else tokenizer_config.json, else chat_template.json; None if none.

        Raises CheckpointError if a file is unreadable or names no "default" template.
        """
        templates = _read_templates(Path(path))
        return cls(templates, read_special_tokens(path)) if templates else None

    def source(self, with_tools: bool = False) -> str:
        """The Jinja source that renders a conversation, of which it tells how the model answers."""
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
        """The prompt for `messages` (OpenAI's form); `kwargs` such as `enable_thinking` reach the template.

        With `continue_final_message` the prompt ends where the last message's text does. A missing content is
        the empty string, and a list of text parts is their text. Where the template does not show a second or a late
        system message, all are one at the front; where it wants the arguments of calls as objects, others become the
        value of one. Raises RequestError (param "messages") where the template refuses the conversation or fails on
        it.
        """
        if not messages:
            raise RequestError("messages must hold at least one message", param="messages")
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
        """`messages` as template `name` takes them."""
        if history.has_late_system(messages) and not self._supports(name, history.SYSTEM_PROBE):
            messages = history.merge_system_messages(messages)
        if history.has_non_object_arguments(messages) and not self._supports(name, history.ARGUMENTS_PROBE):
            messages = [history.wrap_arguments(message) for message in messages]
        return messages

    def _supports(self, name: str, probe: list[dict[str, Any]]) -> bool:
        """Whether template `name` shows every mark in `probe`."""
        key = (name, id(probe))
        if key not in self._supported:
            variables = {**self._special_tokens, "messages": probe, "tools": None, "documents": None}
            try:
                shown = self._templates[name].render(variables)
            except Exception:  # noqa: BLE001 - untrusted code may raise anything
                shown = ""
            self._supported[key] = shown.count(history.SENTINEL) >= str(probe).count(history.SENTINEL)
        return self._supported[key]


def _cut_at_end(rendered: str) -> str:
    """`rendered` up to the mark; a template that strips the message strips what was before the mark, too."""
    text, mark, after = rendered.rpartition(_SENTINEL.strip())
    if not mark:
        raise RequestError(
            "the model's chat template does not show the last message, so it cannot be continued",
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
    """Reads `chat_template` of `file`: one source, or a list of `{"name": ..., "template": ...}`."""
    try:
        templates = (
            {"default": value} if isinstance(value, str) else {t["name"]: t["template"] for t in value}
        )
        if all(isinstance(source, str) for source in (templates["default"], *templates.values())):
            return templates
    except (TypeError, KeyError):
        pass
    raise CheckpointError(
        f"chat_template in {file} must be a string, or a list of name and template with a 'default'"
    )


def _plain_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """`message` as templates expect it: no nulls, content a string, reasoning under its first name."""
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
    """`namespace()` without underscored names, by which a template could pose as a Python protocol."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # `self` stays free as a keyword, as in Jinja's own
        self, *rest = args
        Namespace.__init__(self)
        for name, value in dict(*rest, **kwargs).items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"a template may not set the namespace attribute {name!r}")
        super().__setitem__(name, value)


class _GenerationBlocks(Extension):
    """Lets `{% generation %}` through: it marks the assistant's tokens for training, and renders its body."""

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
        dict=lambda *args, **kwargs: dict(*args, **kwargs),  # the type itself would be a way out
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
    """Jinja's own filter escapes HTML and sorts keys; models were trained on neither."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)
