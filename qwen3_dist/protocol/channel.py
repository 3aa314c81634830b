"""Messages between the engine and its ranks: length-prefixed pickles over TCP.

The same channel serves ranks on this host and on others. A round trip on one host takes tens of microseconds. A
reader sleeps in the kernel while it waits, since a spinning engine would take a core from the ranks. The death of a
peer is noticed at once, as end of file. A peer must send the group's secret before its messages are unpickled.
"""

from __future__ import annotations

import contextlib
import hmac
import pickle
import select
import socket
import struct
import time
from collections import deque
from typing import Any

_HEADER = struct.Struct("!Q")
_SECRET_BYTES = 32


class ChannelClosedError(EOFError):
    """The peer is gone."""


class Channel:
    """One end of a connection. Methods raise ChannelClosedError if the peer is gone, TimeoutError if it is silent."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        self._socket = sock
        self._unsent: deque[memoryview] = deque()

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def local_host(self) -> str:
        """The address of this host in the network of the peer."""
        return str(self._socket.getsockname()[0])

    def send(self, message: Any) -> None:
        self.send_packed(pack(message))

    def send_packed(self, packed: bytes) -> None:
        try:
            self._socket.sendall(packed)
        except OSError as error:
            raise ChannelClosedError(f"the peer closed the connection ({error})") from None

    def post(self, packed: bytes) -> bool:
        """Sends as much as the socket accepts without waiting and keeps the rest for `flush`. Returns whether all was
        sent."""
        self._unsent.append(memoryview(packed))
        return self.flush()

    def flush(self) -> bool:
        """Sends more of the posted data without waiting. Returns whether all was sent."""
        while self._unsent:
            try:
                sent = self._socket.send(self._unsent[0], socket.MSG_DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as error:
                self._unsent.clear()
                raise ChannelClosedError(f"the peer closed the connection ({error})") from None
            self._unsent[0] = self._unsent[0][sent:]
            if not self._unsent[0]:
                self._unsent.popleft()
        return True

    @property
    def has_unsent(self) -> bool:
        return bool(self._unsent)

    def readable(self) -> bool:
        """Whether a message, or the end of the connection, has begun to arrive."""
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def wait_until_closed(self, timeout_s: float) -> None:
        """Discards incoming data until the peer closes the connection, for at most `timeout_s`.

        Closing a socket with unread data would lose the last message sent.
        """
        deadline = time.monotonic() + timeout_s
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                self._socket.settimeout(left)
                if not self._socket.recv(1 << 16):
                    return

    def receive(self, timeout_s: float | None = None) -> Any:
        """Returns the next message. `timeout_s` applies to its first byte, and again to each later part."""
        self._socket.settimeout(timeout_s)
        try:
            (length,) = _HEADER.unpack(self._read(_HEADER.size))
            return pickle.loads(self._read(length))
        finally:
            if self._socket.fileno() >= 0:
                self._socket.settimeout(None)

    def close(self) -> None:
        self._socket.close()

    def _read(self, length: int) -> bytearray:
        data = bytearray(length)
        view, at = memoryview(data), 0
        while at < length:
            try:
                count = self._socket.recv_into(view[at:])
            except TimeoutError:
                raise TimeoutError("the peer did not answer in time") from None
            except OSError as error:
                raise ChannelClosedError(f"the connection broke ({error})") from None
            if count == 0:
                raise ChannelClosedError("the peer closed the connection")
            at += count
        return data


def pack(message: Any) -> bytes:
    """Pickles a message once for `send_packed` to many ranks."""
    payload = pickle.dumps(message, protocol=pickle.HIGHEST_PROTOCOL)
    return _HEADER.pack(len(payload)) + payload


class ChannelListener:
    """Accepts the connections of ranks. `address` is `(host, port)` with a free port of `host`."""

    def __init__(self, host: str, secret: bytes) -> None:
        assert len(secret) == _SECRET_BYTES
        self.secret = secret
        self._socket = socket.create_server((host, 0), family=_family(host))
        self.address: tuple[str, int] = self._socket.getsockname()[:2]

    def fileno(self) -> int:
        return self._socket.fileno()

    def accept(self, timeout_s: float) -> Channel | None:
        """Returns the channel of the next peer; None if the peer does not know the secret, or none connects in
        time."""
        self._socket.settimeout(timeout_s)
        try:
            sock, _ = self._socket.accept()
        except TimeoutError:
            return None
        sock.settimeout(5.0)
        try:
            offered = sock.recv(_SECRET_BYTES, socket.MSG_WAITALL)
        except OSError:
            offered = b""
        if not hmac.compare_digest(offered, self.secret):
            sock.close()
            return None
        sock.settimeout(None)
        return Channel(sock)

    def close(self) -> None:
        self._socket.close()


def connect(address: tuple[str, int], secret: bytes, timeout_s: float = 30.0) -> Channel:
    """Connects to a `ChannelListener`. Raises OSError if none answers within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            sock = socket.create_connection(address, timeout=max(0.1, deadline - time.monotonic()))
            break
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)
    sock.settimeout(None)
    sock.sendall(secret)
    return Channel(sock)


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
