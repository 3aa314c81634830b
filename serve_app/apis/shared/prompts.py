"""From a request's words to token ids, with what a checkpoint has for that."""

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
_TokenIds = Annotated[list[Annotated[int, Range(0)]], Must("a list of token ids", least=1)]
_Several = Annotated[
    list[Annotated[Filled | _TokenIds, ByType(_EXPECTED)]],
    Must(_EXPECTED, least=1),
]
# One prompt or several, each of which is text or token ids.
Prompts = Annotated[Filled | _TokenIds | _Several, ByType(_EXPECTED)]

# Normalisation makes at most one character of so many.
_COMPOSED = 4


def as_prompts(given: str | list[int] | list[str | list[int]]) -> list[str | list[int]]:
    """The prompts of a field; the same list if it was one of prompts."""
    is_one = isinstance(given, str) or isinstance(given[0], int)
    return cast(list[str | list[int]], [given] if is_one else given)


@dataclass(frozen=True)
class Prompt:
    """A prompt as the engine takes it, and its text where there was one."""

    token_ids: list[int]
    text: str | None = None


@dataclass(frozen=True)
class Texts:
    """What makes prompts of words: the checkpoint's tokenizer and template, if it has them.

    `template_kwargs` are the service's defaults; `max_model_len` tokens are the most of prompt and output.
    `tool_calls` is the form in which the model calls tools, where that is not to be seen from the template.
    """

    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    max_model_len: int
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    tool_calls: ToolCallForm | None = None

    def prompt(self, text: str, name: str, add_special_tokens: bool = False) -> Prompt:
        """`text` as token ids, `add_special_tokens` with those that the checkpoint puts around one.

        Raises RequestError (param `name`) where it cannot be tokenized. A text that no tokenization makes short
        enough is refused without trying.
        """
        if self.tokenizer is None:
            raise RequestError("this model has no tokenizer; send the prompt as token ids", param=name)
        longest = self.tokenizer.longest_token * _COMPOSED
        if len(text) > self.max_model_len * longest:
            raise ContextLengthError(
                f"the {name} has {len(text)} characters, which cannot fit the context of "
                f"{self.max_model_len} tokens; shorten it",
                name,
                -(-len(text) // longest),
                self.max_model_len,
                at_least=True,
            )
        return Prompt(self.tokenizer.encode(text, add_special_tokens), text)

    def cut(self, text: str, most_tokens: int) -> str:
        """The beginning of `text` that has so many tokens; 0 cuts nothing. A character is not cut in two."""
        if not most_tokens or self.tokenizer is None:
            return text
        text = text[: most_tokens * self.tokenizer.longest_token * _COMPOSED]
        token_ids = self.tokenizer.encode(text)
        if len(token_ids) <= most_tokens:
            return text
        return self.tokenizer.decode(token_ids[:most_tokens], skip_special_tokens=False).rstrip("\ufffd")
