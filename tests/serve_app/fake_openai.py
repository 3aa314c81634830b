"""A service with OpenAI's streams whose tokens are words, in a thread of this process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Iterator
from typing import Any

from aiohttp import web

MODEL, KEY, CONTEXT = "words", "open sesame", 4000
BEGIN = "<begin>"  # a special token that goes before a prompt
TOKENS_A_PART = 2
FIRST_PART_S = 0.02


class FakeOpenAI:
    """What it was asked and how it answers: the requests numbered in `failing` with 500, those in `breaking` with an
    error in the stream. The first `together` requests are answered when all of them have come. Requests are numbered
    from 0 in the order in which they come. Without `has_tokenizer` it has no /tokenize; with `needs_key` it refuses
    requests without `KEY`.
    """

    def __init__(self) -> None:
        self.url = ""
        self.bodies: list[dict[str, Any]] = []
        self.most_running = 0
        self.failing: set[int] = set()
        self.breaking: set[int] = set()
        self.together = 1
        self.has_tokenizer = True
        self.needs_key = False
        self._running = 0
        self._words: dict[str, int] = {}
        self._enough = asyncio.Event()

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/v1/models", self.models),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
            web.post("/v1/completions", self.answer),
            web.post("/v1/chat/completions", self.answer),
        ]

    async def models(self, request: web.Request) -> web.Response:
        self._check_key(request)
        return web.json_response({"data": [{"id": MODEL, "max_model_len": CONTEXT}, {"id": "other"}]})

    async def tokenize(self, request: web.Request) -> web.Response:
        if not self.has_tokenizer:
            raise web.HTTPNotFound
        body = await request.json()
        if len(body["prompt"].split()) > CONTEXT:
            return web.json_response({"error": {"message": "the prompt is too long"}}, status=400)
        words = ([BEGIN] if body["add_special_tokens"] else []) + body["prompt"].split()
        return web.json_response(
            {"tokens": [self._words.setdefault(word, len(self._words)) for word in words]}
        )

    async def detokenize(self, request: web.Request) -> web.Response:
        body = await request.json()
        words = list(self._words)
        return web.json_response({"prompt": " ".join(words[token] for token in body["tokens"])})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        self._check_key(request)
        number, body = len(self.bodies), await request.json()
        self.bodies.append(body)
        self._running += 1
        self.most_running = max(self.most_running, self._running)
        try:
            if len(self.bodies) >= self.together:
                self._enough.set()
            await self._enough.wait()
            if number in self.failing:
                return web.json_response({"error": {"message": f"no luck with {number}"}}, status=500)
            return await self._stream(request, body, number in self.breaking)
        finally:
            self._running -= 1

    async def _stream(self, request: web.Request, body: dict[str, Any], breaks: bool) -> web.StreamResponse:
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        count = body["max_completion_tokens"] if chat else body["max_tokens"]
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def send(**part: Any) -> None:
            await response.write(b"data: " + json.dumps(part).encode() + b"\n\n")

        await asyncio.sleep(FIRST_PART_S)
        for _ in range(0, count, TOKENS_A_PART):
            text = "word " * TOKENS_A_PART
            await send(choices=[{"index": 0, **({"delta": {"content": text}} if chat else {"text": text})}])
            if breaks:
                await send(error={"message": "the stream broke"})
                return response
        usage = {"prompt_tokens": 1 + len(prompt.split()), "completion_tokens": count}
        await send(choices=[], usage=usage)
        await response.write(b"data: [DONE]\n\n")
        return response

    def _check_key(self, request: web.Request) -> None:
        if self.needs_key and request.headers.get("authorization") != f"Bearer {KEY}":
            raise web.HTTPUnauthorized


@contextlib.contextmanager
def fake_openai() -> Iterator[FakeOpenAI]:
    """Serves on a free port until the block ends."""
    fake, started, ended = FakeOpenAI(), threading.Event(), asyncio.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        app = web.Application()
        app.add_routes(fake.routes())
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        fake.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        started.set()
        await ended.wait()
        await runner.cleanup()

    thread = threading.Thread(target=loop.run_until_complete, args=(serve(),))
    thread.start()
    try:
        assert started.wait(30)
        yield fake
    finally:
        loop.call_soon_threadsafe(ended.set)
        thread.join(30)
        loop.close()
