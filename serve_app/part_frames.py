"""What crosses on the connection that carries the parts of all streams from a replica to an ingress.

The replica listens. An ingress opens one connection to each replica, sends the replica's secret, then commands of
COMMAND's form. The replica sends frames: LENGTH, then a pickled list of pairs of a stream's number and a part. So what
a turn of the event loop makes for many streams crosses as one message. Through Serve each part is a message of its
own, which costs several times as much (`benchmarks/stream_latency.py`).
"""

from __future__ import annotations

import asyncio
import socket
from struct import Struct
from typing import NamedTuple

SECRET_BYTES = 16
COMMAND = Struct("!BQ")  # SEND or HOLD, and the stream's number
LENGTH = Struct("!I")  # bytes of the pickled list that follows
SEND, HOLD = 1, 2  # a stream sends nothing before its first SEND, nor between a HOLD and the next SEND


class PartsAt(NamedTuple):
    """Where an ingress gets the parts of a stream that a replica has accepted."""

    host: str
    port: int
    secret: bytes
    stream: int


class PartsSent(NamedTuple):
    """The end of a stream: the number of parts that were sent for it."""

    num_parts: int


# So a peer whose machine is gone, or a connection that a firewall has forgotten, is noticed within a minute.
_DEAD_AFTER_S, _IDLE_S, _PROBE_PERIOD_S = 60, 20, 10


def end_if_dead(transport: asyncio.Transport) -> None:
    """Has the system end a connection whose peer no longer acknowledges anything, also while nothing is sent."""
    connection = transport.get_extra_info("socket")
    for level, name, value in (
        (socket.SOL_SOCKET, "SO_KEEPALIVE", 1),
        (socket.IPPROTO_TCP, "TCP_KEEPIDLE", _IDLE_S),
        (socket.IPPROTO_TCP, "TCP_KEEPINTVL", _PROBE_PERIOD_S),
        (socket.IPPROTO_TCP, "TCP_KEEPCNT", (_DEAD_AFTER_S - _IDLE_S) // _PROBE_PERIOD_S),
        (socket.IPPROTO_TCP, "TCP_USER_TIMEOUT", _DEAD_AFTER_S * 1000),
    ):
        if hasattr(socket, name):  # some are Linux's
            connection.setsockopt(level, getattr(socket, name), value)
