"""/tokenize and /detokenize, and the base class of requests that a replica answers without its engine.

A replica answers them since it has the tokenizer. The ingress, which all traffic passes, loads and tokenizes nothing.
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
from serve_app.apis.shared.prompts import Prompt, PromptRenderer

_CHAT_FIELDS = (
    "messages",
    "tools",
    "add_generation_prompt",
    "continue_final_message",
    "chat_template_kwargs",
    "add_special_tokens",
)
_Model = Annotated[str, about("Name of the served model; optional.")]


class TokenizeBody(Body):
    """A body of /tokenize. The fields of a conversation mean what they mean in /v1/chat/completions."""

    model: _Model = ""
    prompt: Annotated[str, about("Text to tokenize; either this or messages.")] | None = None
    messages: Annotated[Messages, about("A conversation, rendered by the chat template.")] | None = None
    tools: Annotated[Tools, about("Functions that the model may call.")] | None = None
    add_generation_prompt: (
        Annotated[bool, about("Whether the prompt begins the assistant's next message.")] | None
    ) = None
    continue_final_message: Annotated[bool, about("Continues the last message instead.")] | None = None
    chat_template_kwargs: Annotated[Variables, about("Variables for the chat template.")] | None = None
    add_special_tokens: (
        Annotated[
            bool,
            about(
                "Whether the tokenizer adds its special tokens; true by default for a prompt, false for messages."
            ),
        ]
        | None
    ) = None
    return_token_strs: Annotated[bool, about("Returns each token's text as well.")] = False


class DetokenizeBody(Body):
    """A body of /detokenize."""

    model: _Model = ""
    tokens: Annotated[
        list[Annotated[int, Range(0, 2**31 - 1)]], Must("a list of token ids"), about("Token ids.")
    ]


@dataclass(frozen=True)
class TextRequest(ABC):
    """A parsed request that a replica answers without its engine."""

    model: str
    stream = False
    num_sequences = 1  # counted by admission

    @abstractmethod
    def respond(self, renderer: PromptRenderer) -> Json:
        """Returns the response body. Raises RequestError."""

    def error_body(self, error: Exception) -> dict[str, Any]:
        """Returns the JSON body for `error`."""
        return error_object(error)


@dataclass(frozen=True)
class TokenizeRequest(TextRequest):
    """A parsed request to /tokenize; `source` is a text or a conversation."""

    source: str | ChatRequest
    return_token_strs: bool
    add_special_tokens: bool

    def respond(self, renderer: PromptRenderer) -> Json:
        token_ids = self._prompt(renderer).token_ids
        tokenizer = renderer.tokenizer
        assert tokenizer is not None
        texts = [tokenizer.token_bytes(token).decode(errors="replace") for token in token_ids]
        return {
            "count": len(token_ids),
            "max_model_len": renderer.max_model_len,
            "tokens": token_ids,
            "token_strs": texts if self.return_token_strs else None,
        }

    def _prompt(self, renderer: PromptRenderer) -> Prompt:
        if isinstance(self.source, str):
            return renderer.tokenize(self.source, "prompt", self.add_special_tokens)
        return self.source.prompts(renderer)[0]


@dataclass(frozen=True)
class DetokenizeRequest(TextRequest):
    """A parsed request to /detokenize."""

    tokens: list[int]

    def respond(self, renderer: PromptRenderer) -> Json:
        if renderer.tokenizer is None:
            raise RequestError(
                "this model has no tokenizer, so it cannot detokenize; serve a checkpoint with tokenizer.json",
                param="tokens",
            )
        if len(self.tokens) > renderer.max_model_len:
            raise RequestError(
                f"tokens has {len(self.tokens)} ids, more than the context length of {renderer.max_model_len}; "
                "send them in parts",
                param="tokens",
            )
        return {"prompt": renderer.tokenizer.decode(self.tokens, skip_special_tokens=False)}


def parse_tokenize(body: bytes) -> TokenizeRequest:
    """Parses a body of /tokenize. Raises RequestError."""
    given = read_body(TokenizeBody, body)
    if (given.prompt is None) == (given.messages is None):
        raise RequestError("give either prompt or messages", param="prompt")
    source = _conversation(given) if given.prompt is None else given.prompt
    return TokenizeRequest(
        given.model, source, given.return_token_strs, given.add_special_tokens is not False
    )


def parse_detokenize(body: bytes) -> DetokenizeRequest:
    """Parses a body of /detokenize. Raises RequestError."""
    given = read_body(DetokenizeBody, body)
    return DetokenizeRequest(given.model, given.tokens)


def _conversation(body: TokenizeBody) -> ChatRequest:
    return ChatRequest(**chat_fields({name: getattr(body, name) for name in _CHAT_FIELDS}))
