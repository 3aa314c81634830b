"""What crosses on the connections that carry requests from ingresses to replicas, and their answers back.

The replica listens. An ingress opens one connection to each replica, sends the replica's secret, then commands of
COMMAND's form. The replica sends frames: LENGTH, then a pickled list of pairs of a request's number and an item. So
what a turn of the event loop makes for many streams crosses as one message. Through Serve a request takes milliseconds
of CPU time, and each item is a message of its own (`benchmarks/stream_latency.py`).

An item is the fields of a `Counted`, which is pickled in half the time as a plain tuple, or an `Item`.
"""

from __future__ import annotations

import asyncio
import socket
from struct import Struct
from typing import Any, NamedTuple

SECRET_BYTES = 16
COMMAND = Struct("!BQQ")  # a command, a number that the ingress gives the request, bytes that follow
LENGTH = Struct("!I")  # bytes of the pickled list that follows
# START is followed by the pickled arguments, positional and by name, of the replica's `answer`. Between a HOLD and the
# next SEND an answer sends nothing.
START, CANCEL, HOLD, SEND = 1, 2, 3, 4


class ReplicaAddress(NamedTuple):
    """Where a replica takes requests."""

    host: str
    port: int
    secret: bytes


class Item(NamedTuple):
    """An item of an answer that is no `Counted`; END after the last."""

    value: Any


END = Item(None)


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
