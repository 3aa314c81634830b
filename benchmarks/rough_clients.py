"""Clients of `benchmarks.load` that behave badly. Each goes on until a time of the monotonic clock, and counts what
became of its connections."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections import Counter
from typing import Any
from urllib.parse import urlparse

from benchmarks.chaos_answers import COMPLETIONS, MODEL

WRITE_TIMEOUT_S, BODY_TIMEOUT_S = 5.0, 5.0  # of the service
_LONG = {"model": MODEL, "prompt": "the sea", "stream": True, "ignore_eos": True, "temperature": 0}
_SMALL_BUFFER = 4096
_ANSWER_S = 120.0


class Rough:
    """The clients of one service, and what they counted by kind."""

    def __init__(self, url: str, until: float) -> None:
        address = urlparse(url)
        self._place = (str(address.hostname), int(address.port or 80))
        self._first_lines = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {address.netloc}\r\n"
        self._until = until
        self.seen: dict[str, Counter[str]] = {}

    async def cancel(self) -> None:
        """Closes streams that have begun, some after a while."""
        while time.monotonic() < self._until:
            async with self._connection() as (reader, writer):
                writer.write(self._request({**_LONG, "max_tokens": 500}))
                head = await self._head(reader)
                await asyncio.sleep(random.choice((0.0, 0.1, 0.5)))
                self._count("cancelled", head)

    async def read_slowly(self) -> None:
        """Reads streams of much text slowly, and to their ends."""
        while time.monotonic() < self._until:
            async with self._connection(_SMALL_BUFFER) as (reader, writer):
                writer.write(self._request({**_LONG, "max_tokens": 150, "logprobs": 5}))
                tail, head = b"", await self._head(reader)
                while part := await asyncio.wait_for(reader.read(_SMALL_BUFFER), _ANSWER_S):
                    tail = (tail + part)[-200:]
                    await asyncio.sleep(0.05)
                self._count("slow readers", f"{head}, {'to its end' if b'[DONE]' in tail else 'cut'}")

    async def never_read(self) -> None:
        """Asks for more than buffers hold and reads nothing; the service ends it, or the client does in the end."""
        while time.monotonic() < self._until:
            async with self._connection(_SMALL_BUFFER) as (_, writer):
                writer.write(self._request({**_LONG, "max_tokens": 1900, "logprobs": 20}))
                await self._sleep(4 * WRITE_TIMEOUT_S)
                self._count("read nothing", "closed")

    async def send_slowly(self, body: bool) -> None:
        """Sends the headers of a request byte by byte, or a part of a body and no more."""
        kind = "slow bodies" if body else "slow headers"
        while time.monotonic() < self._until:
            async with self._connection() as (reader, writer):
                if body:
                    writer.write(self._request({**_LONG, "max_tokens": 1})[:-20])
                    self._count(kind, await self._head(reader, BODY_TIMEOUT_S + _ANSWER_S))
                    continue
                writer.write(f"{self._first_lines}X-Slow: ".encode())
                while time.monotonic() < self._until:
                    writer.write(b"a")
                    await self._sleep(1.0)
                self._count(kind, "held to the end")

    async def idle(self) -> None:
        """Opens a connection and sends nothing."""
        async with self._connection() as (reader, _):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(), max(0.0, self._until - time.monotonic()))
                self._count("idle", "closed by the service")
                return
            self._count("idle", "held to the end")

    async def babble(self) -> None:
        """Sends random bytes."""
        while time.monotonic() < self._until:
            async with self._connection() as (reader, writer):
                writer.write(random.randbytes(random.randrange(1, 4096)) + b"\r\n\r\n")
                self._count("random bytes", await self._head(reader, 1.0))
                await self._sleep(0.1)

    @contextlib.asynccontextmanager
    async def _connection(self, buffer: int = 0) -> Any:
        """A connection whose errors are counted, with a receive buffer of so many bytes."""
        client = socket.socket()
        client.setblocking(False)
        if buffer:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
        try:
            await asyncio.get_running_loop().sock_connect(client, self._place)
            reader, writer = await asyncio.open_connection(sock=client, limit=buffer or 2**16)
            try:
                yield reader, writer
            finally:
                writer.transport.abort()
        except (OSError, EOFError, TimeoutError) as error:
            self._count("errors", type(error).__name__)
            await self._sleep(1.0)
        finally:
            client.close()

    async def _head(self, reader: asyncio.StreamReader, timeout_s: float = _ANSWER_S) -> str:
        """The status of the answer, once its head has come."""
        try:
            head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), timeout_s)
        except TimeoutError:
            return "no answer"
        except asyncio.IncompleteReadError:
            return "closed"
        return head.split(b" ", 2)[1].decode(errors="replace")

    async def _sleep(self, seconds: float) -> None:
        await asyncio.sleep(max(0.0, min(seconds, self._until - time.monotonic())))

    def _count(self, kind: str, outcome: str) -> None:
        self.seen.setdefault(kind, Counter())[outcome] += 1

    def _request(self, body: dict[str, Any]) -> bytes:
        payload = json.dumps(body).encode()
        head = f"{self._first_lines}Content-Type: application/json\r\n"
        return f"{head}Content-Length: {len(payload)}\r\nConnection: close\r\n\r\n".encode() + payload
