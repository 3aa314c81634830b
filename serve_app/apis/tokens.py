"""Bodies of /tokenize and /detokenize, and what they have in common with other questions about text.

A replica answers them, since it has the checkpoint's tokenizer already: the ingress, which all traffic passes,
loads nothing and tokenizes nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Annotated, Any

from qwen3_dist.errors import RequestError
from serve_app.apis.chat.request import ChatRequest, Variables, chat_fields
from serve_app.apis.shared.body import Body, Json, Must, Range, about, read_body
from serve_app.apis.shared.conversation import Messages, Tools
from serve_app.apis.shared.errors import error_object
from serve_app.apis.shared.prompts import Prompt, Texts

_OF_CHAT = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "add_special_tokens",
)
_Model = Annotated[str, about("The served model's name; absent, it is the model.")]


class TokenizeBody(Body):
    """A body of /tokenize. What is said of a conversation is read as /v1/chat/completions reads it."""

    model: _Model = ""
    prompt: Annotated[str, about("Text to tokenize; this or messages.")] | None = None
    messages: Annotated[Messages, about("A conversation, put into the chat template.")] | None = None
    tools: Annotated[Tools, about("Functions that the model may call.")] | None = None
    add_generation_prompt: Annotated[bool, about("Whether the assistant's next message is begun.")] | None = (
        None
    )
    continue_final_message: Annotated[bool, about("Goes on with the last message instead.")] | None = None
    chat_template_kwargs: Annotated[Variables, about("Variables for the chat template.")] | None = None
    add_special_tokens: (
        Annotated[
            bool,
            about(
                "Whether a text gets what the tokenizer puts around one; a prompt does unless this is false, as one "
                "of /v1/completions, and messages only if this is true, as those of /v1/chat/completions."
            ),
        ]
        | None
    ) = None
    return_token_strs: Annotated[bool, about("Gives each token's text as well.")] = False


class DetokenizeBody(Body):
    """A body of /detokenize."""

    model: _Model = ""
    tokens: Annotated[
        list[Annotated[int, Range(0, 2**31 - 1)]], Must("a list of token ids"), about("Token ids.")
    ]


@dataclass(frozen=True)
class TextRequest(ABC):
    """A question that a replica answers without its engine."""

    model: str
    stream = False
    num_sequences = 1  # its share of what a service holds

    @abstractmethod
    def respond(self, texts: Texts) -> Json:
        """The answer. Raises RequestError."""

    def error_body(self, error: Exception) -> dict[str, Any]:
        """What says that this request failed."""
        return error_object(error)


@dataclass(frozen=True)
class TokenizeRequest(TextRequest):
    """A body of /tokenize: text or a conversation."""

    wanted: str | ChatRequest
    with_texts: bool
    add_special_tokens: bool

    def respond(self, texts: Texts) -> Json:
        token_ids = self._prompt(texts).token_ids
        tokenizer = texts.tokenizer
        assert tokenizer is not None
        shown = [tokenizer.token_bytes(token).decode(errors="replace") for token in token_ids]
        return {
            "count": len(token_ids),
            "max_model_len": texts.max_model_len,
            "tokens": token_ids,
            "token_strs": shown if self.with_texts else None,
        }

    def _prompt(self, texts: Texts) -> Prompt:
        if isinstance(self.wanted, str):
            return texts.prompt(self.wanted, "prompt", self.add_special_tokens)
        return self.wanted.prompts(texts)[0]


@dataclass(frozen=True)
class DetokenizeRequest(TextRequest):
    """A body of /detokenize."""

    tokens: list[int]

    def respond(self, texts: Texts) -> Json:
        if texts.tokenizer is None:
            raise RequestError("this model has no tokenizer, so token ids are all it knows", param="tokens")
        if len(self.tokens) > texts.max_model_len:
            raise RequestError(
                f"tokens has {len(self.tokens)} ids, more than the context of {texts.max_model_len}; "
                "send them in parts",
                param="tokens",
            )
        return {"prompt": texts.tokenizer.decode(self.tokens, skip_special_tokens=False)}


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Reads a request to tokenize. Raises RequestError."""
    given = read_body(TokenizeBody, body)
    if (given.prompt is None) == (given.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    wanted = _conversation(given) if given.prompt is None else given.prompt
    return TokenizeRequest(
        given.model, wanted, given.return_token_strs, given.add_special_tokens is not False
    )


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Reads a request to detokenize. Raises RequestError."""
    given = read_body(DetokenizeBody, body)
    return DetokenizeRequest(given.model, given.tokens)


def _conversation(body: TokenizeBody) -> ChatRequest:
    return ChatRequest(**chat_fields({name: getattr(body, name) for name in _OF_CHAT}))
