"""Prompts: the fields that hold them, and the tokenizer and chat template that turn them into token ids."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, cast

from qwen3_dist.errors import ContextLengthError, RequestError
from qwen3_dist.text.chat_template import ChatTemplate
from qwen3_dist.text.tokenizer import Tokenizer
from qwen3_dist.text.tool_calls.tags import ToolCallForm
from serve_app.apis.shared.body import ByType, Filled, Must, Range

_EXPECTED = "text, a list of token ids, or a list of either, none of them empty"
_TokenIds = Annotated[list[Annotated[int, Range(0)]], Must("a list of token ids", min_items=1)]
_Several = Annotated[
    list[Annotated[Filled | _TokenIds, ByType(_EXPECTED)]],
    Must(_EXPECTED, min_items=1),
]
# One prompt or several, each text or token ids.
Prompts = Annotated[Filled | _TokenIds | _Several, ByType(_EXPECTED)]

# Unicode normalization (NFC) composes at most this many characters into one.
_MAX_COMPOSED = 4


def as_prompts(given: str | list[int] | list[str | list[int]]) -> list[str | list[int]]:
    """Returns the prompts that a `Prompts` field holds: `given` itself if it is a list of prompts."""
    is_one = isinstance(given, str) or isinstance(given[0], int)
    return cast(list[str | list[int]], [given] if is_one else given)


@dataclass(frozen=True)
class Prompt:
    """A prompt's token ids, and its text if it was given or rendered as text."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True)
class PromptRenderer:
    """Turns text into prompts with the checkpoint's tokenizer and chat template, None where it has none.

    `max_model_len` is the context length in tokens, of prompt and output together. `template_kwargs` are the service's
    default template variables. `tool_calls` overrides the tool-call format that the template shows. `has_score` is
    whether the model has a score head.
    """

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    max_model_len: int
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tool_calls: ToolCallForm | None = None
    has_score: bool = False

    def tokenize(self, text: str, param: str, add_special_tokens: bool = False) -> Prompt:
        """Tokenizes `text`, with the tokenizer's special tokens around it if `add_special_tokens`.

        Raises RequestError with `param` if there is no tokenizer or the text is too long. A text with more characters
        than the longest tokens could cover within the context is refused without tokenizing it.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer; send the prompt as token ids", param=param)
        longest = self.tokenizer.longest_token * _MAX_COMPOSED
        if len(text) > self.max_model_len * longest:
            raise ContextLengthError(
                f"the {param} has {len(text)} characters, which cannot fit the context of "
                f"{self.max_model_len} tokens; shorten it",
                param,
                -(-len(text) // longest),
                self.max_model_len,
                at_least=True,
            )
        return Prompt(self.tokenizer.encode(text, add_special_tokens), text)

    def truncate(self, text: str, max_tokens: int) -> str:
        """Returns the start of `text` that its first `max_tokens` tokens cover, in whole characters; 0 is no limit."""
        if not max_tokens or self.tokenizer is None:
            return text
        text = text[: max_tokens * self.tokenizer.longest_token * _MAX_COMPOSED]
        token_ids = self.tokenizer.encode(text)
        if len(token_ids) <= max_tokens:
            return text
        return self.tokenizer.decode(token_ids[:max_tokens], skip_special_tokens=False).rstrip("\ufffd")
