"""An OpenAI-compatible service as the load generator sees it: its models, its tokenizer, timed streams."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from http import HTTPStatus
from types import TracebackType
from typing import Any, Protocol, Self

import aiohttp

from qwen3_dist.errors import ConfigError, ResourceError
from serve_app.load_client.datasets import Sample
from serve_app.load_client.prompts import TextRefused

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
_TIMEOUT_S = 6 * 3600  # of one request
_TOKENIZING = 16  # questions to /tokenize at a time
_SHOWN = 300  # characters of an answer that is not JSON


@dataclass
class Outcome:
    """What became of one request. Times are in seconds, `started` of the client's clock.

    `ttft` is the time to the first part of the stream with a choice, `itl` the times between such parts, `latency`
    the time to the last. `output_tokens` and, where the service tells it, `input_tokens` are those of the stream's
    `usage`. `error` is "" for a request that succeeded.
    """

    started: float
    input_tokens: int
    output_tokens: int = 0
    ttft: float = 0.0
    itl: list[float] = field(default_factory=list)
    latency: float = 0.0
    queued: float = 0.0
    error: str = ""


class Service:
    """The service at `url`, whose paths begin there; a final /v1 is left out. Use with `async with`."""

    def __init__(self, url: str, api_key: str = "", clock: Callable[[], float] = time.perf_counter) -> None:
        if not url.startswith(("http://", "https://")):
            raise ConfigError(f"URL must begin with http:// or https://, not {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.clock = clock
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._tokenizing = asyncio.Semaphore(_TOKENIZING)

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(total=_TIMEOUT_S),
        )
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def model(self, wanted: str | None) -> tuple[str, int | None]:
        """The model to ask, `wanted` or the first that is served, and its context in tokens if the service tells.

        Raises ResourceError if nothing answers, and ConfigError for a key or model that is refused.
        """
        status, body = await self._ask("GET", "/v1/models")
        if status in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
            raise ConfigError(f"{self.url} refuses the API key; give --api-key or set OPENAI_API_KEY")
        served = body.get("data") if status == HTTPStatus.OK and isinstance(body, Mapping) else None
        if not isinstance(served, list) or not served:
            if wanted:
                return wanted, None
            raise ConfigError(f"{self.url}/v1/models lists no model (HTTP {status}); name it with --model")
        lengths = {each["id"]: each.get("max_model_len") for each in served}
        if wanted and wanted not in lengths:
            raise ConfigError(f"model {wanted!r} is not served at {self.url}; it has {', '.join(lengths)}")
        name = wanted or served[0]["id"]
        return name, lengths[name]

    async def stream(self, path: str, body: Mapping[str, Any], sample: Sample) -> Outcome:
        """Sends one streamed request for `sample` and times what comes back. What goes wrong is in the outcome."""
        outcome = Outcome(self.clock(), sample.input_len)
        try:
            async with self._session.post(self.url + path, json=body) as response:
                if response.status == HTTPStatus.OK:
                    await read_stream(response.content, outcome, self.clock)
                else:
                    said = _reason(await response.read())
                    outcome.error = f"HTTP {response.status}: {said or response.reason}"
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError) as error:
            outcome.error = f"{type(error).__name__}: {error}"
        return outcome

    async def _ask(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> tuple[int, Any]:
        """Status and JSON of a short answer; None if it is not JSON. Raises ResourceError if nothing answers."""
        try:
            async with self._session.request(method, self.url + path, json=body) as response:
                text = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ResourceError(
                f"nothing answers at {self.url} ({reason}); start the service or correct the URL"
            ) from None
        try:
            return response.status, json.loads(text)
        except ValueError:
            return response.status, None

    async def ask_tokenizer(self, path: str, body: Mapping[str, Any]) -> Any:
        """The answer of /tokenize or /detokenize. Raises ConfigError if it has neither, TextRefused if it refuses.

        At most 16 of these questions are asked at a time.
        """
        async with self._tokenizing:
            status, answer = await self._ask("POST", path, body)
        if status == HTTPStatus.OK and isinstance(answer, Mapping):
            return answer
        if status in (HTTPStatus.NOT_FOUND, HTTPStatus.METHOD_NOT_ALLOWED):
            raise ConfigError(
                f"{self.url} has no {path}, which makes prompts of exact lengths; "
                "give --tokenizer DIR with the model's tokenizer.json"
            )
        said = _reason(json.dumps(answer).encode())
        raise TextRefused(f"{self.url}{path} refuses a prompt (HTTP {status}: {said})")


class ServiceTokens:
    """The served model's tokens, by /tokenize and /detokenize."""

    def __init__(self, service: Service, model: str) -> None:
        self._service = service
        self._model = model

    async def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        body = {"model": self._model, "prompt": text, "add_special_tokens": add_special_tokens}
        tokens: list[int] = (await self._service.ask_tokenizer("/tokenize", body))["tokens"]
        return tokens

    async def decode(self, ids: Sequence[int]) -> str:
        body = {"model": self._model, "tokens": list(ids)}
        return str((await self._service.ask_tokenizer("/detokenize", body))["prompt"])


class Content(Protocol):
    """A body that is being received, as aiohttp's StreamReader."""

    def iter_any(self) -> AsyncIterator[bytes]: ...


async def read_stream(content: Content, outcome: Outcome, clock: Callable[[], float]) -> None:
    """Fills `outcome` with the times and tokens of a stream of completions or chat completions."""
    usage: Mapping[str, Any] | None = None
    last: float | None = None
    async for at, data in _events(content, clock):
        if data == b"[DONE]":
            continue
        part = json.loads(data)
        if error := part.get("error"):
            message = error.get("message") if isinstance(error, Mapping) else error
            outcome.error = str(message or "the stream ended with an error")
            return
        usage = part.get("usage") or usage
        if not _holds_output(part):
            continue
        if last is None:
            outcome.ttft = at - outcome.started
        else:
            outcome.itl.append(at - last)
        last = at
    if last is None:
        outcome.error = "the stream ended without output"
    elif usage is None:
        outcome.error = "the stream ended without usage, so its tokens cannot be counted"
    else:
        outcome.latency = last - outcome.started
        outcome.output_tokens = usage["completion_tokens"]
        outcome.input_tokens = usage.get("prompt_tokens", outcome.input_tokens)


async def _events(content: Content, clock: Callable[[], float]) -> AsyncIterator[tuple[float, bytes]]:
    """The data of server-sent events, each with the time at which its last byte was read."""
    rest = b""
    async for piece in content.iter_any():
        at = clock()
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                yield at, line.removeprefix(b"data:").strip()


def _holds_output(part: Mapping[str, Any]) -> bool:
    """Whether a part of a stream belongs to the answer: it has a choice that says more than who speaks."""
    choices = part.get("choices")
    if not choices:
        return False
    delta = choices[0].get("delta") or {}
    only_role = "role" in delta and not any(value for name, value in delta.items() if name != "role")
    return not only_role or choices[0].get("finish_reason") is not None


def _reason(body: bytes) -> str:
    """The message of an error's body in OpenAI's form, else its beginning."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, KeyError, TypeError):
        return body[:_SHOWN].decode(errors="replace")
    return str(message)
