"""The start of a rank: sets its card, meets the other ranks and joins the process groups."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from qwen3_dist.errors import ResourceError
from qwen3_dist.parallel.context import ParallelContext
from qwen3_dist.parallel.dispatch import DispatchOptions
from qwen3_dist.protocol.card import Card
from qwen3_dist.protocol.channel import Channel
from qwen3_dist.protocol.messages import Hello, RankSpec, Rejoin, Start
from qwen3_dist.settings import EngineConfig
from qwen3_dist.worker import cards
from qwen3_dist.worker.shard import MemoryShare, set_threads

_NCCL_MARGIN_S = 30.0
# The engine finds ranks that are lost or hang, and the others stay. torch's watchdog of NCCL and the monitor of that
# would end their processes. After an error of the network, groups are left only when both have slept for a dump: one
# minute, and eight.
_NO_NCCL_WATCHDOG = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
}
_SIOCGIFADDR = 0x8915  # linux/sockios.h: the IPv4 address of an interface


@dataclass(frozen=True)
class Joined:
    """The groups that the rank of `spec` has joined."""

    spec: RankSpec
    parallel: ParallelContext
    device: torch.device
    memory: MemoryShare
    card: Card | None = None


def join(spec: RankSpec, channel: Channel, card: Card | None = None) -> Joined | Rejoin:
    """Sends Hello with this rank's host and card, waits for Start, and joins the process groups. Returns what comes in
    place of Start, if that is Rejoin.

    `card` is that of an earlier call, before this process took memory of it. Rank 0 hosts the rendezvous store, at the
    address of its connection to the engine. Raises ResourceError if the GPU or NCCL cannot be used.
    """
    host, config = channel.local_host, spec.config
    os.environ.update(config.rank_env)
    device = torch.device("cpu")
    if spec.device == "cuda":
        device, found = cards.set_card(spec.card or 0)
        card = card or found
    timeout = timedelta(seconds=config.start_timeout_s)
    world = config.layout.world
    store: dist.TCPStore | None = None
    if spec.rank == 0:
        store = dist.TCPStore(host, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
    port = store.port if store else None
    channel.send(
        Hello(spec.rank, os.getpid(), host, socket.gethostname(), host_id(), card, port, spec.attempt)
    )
    start: Start | Rejoin = channel.receive()
    if isinstance(start, Rejoin):
        return start
    set_threads(config, start.ranks_on_host)
    if device.type == "cuda" and world > 1 and not start.over_host and not dist.is_nccl_available():
        raise ResourceError(
            f"torch {torch.__version__} is built without NCCL, which ranks on several GPUs need; install a torch with "
            "NCCL or use a layout of one rank"
        )
    if store is None:
        store = dist.TCPStore(*start.store_address, world, is_master=False, timeout=timeout)
    use_interface_of(host)
    for name, value in _NO_NCCL_WATCHDOG.items():
        os.environ.setdefault(name, value)
    parallel = _connect(config, spec.rank, store, device, start.over_host)
    if card is None:
        return Joined(spec, parallel, device, MemoryShare(start.ranks_on_host))
    return Joined(spec, parallel, device, MemoryShare(start.ranks_on_card, start.card_free_bytes), card)


def host_id() -> str:
    """An id that is equal for processes that share a machine, its shared memory and its process ids. Containers on one
    machine differ, and so do machines with the same name."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    parts = [socket.gethostname(), boot.read_text().strip() if boot.exists() else ""]
    for path in ("/dev/shm", "/proc/self/ns/pid"):  # the device and inode tell namespaces apart
        with contextlib.suppress(OSError):
            found = os.stat(path)
            parts.append(f"{found.st_dev}:{found.st_ino}")
    return " ".join(parts)


def _connect(
    config: EngineConfig, rank: int, store: dist.Store, device: torch.device, over_host: bool
) -> ParallelContext:
    return ParallelContext.connect(
        config.layout,
        rank,
        store,
        device,
        # NCCL's watchdog kills a rank that waits too long. The engine's own timeout comes first: it names the late
        # rank.
        timeout_s=config.step_timeout_s + (0 if device.type == "cpu" or over_host else _NCCL_MARGIN_S),
        staged=over_host,
        dispatch=DispatchOptions(config.dispatch_dtype == "fp8", config.overlap_dispatch_from),
        deterministic=config.deterministic,
    )


def use_interface_of(host: str) -> None:
    """Makes gloo listen on the interface with the address `host`, which other hosts can reach. By default gloo uses
    the address of the hostname, which may be a loopback address.

    GLOO_SOCKET_IFNAME is kept if it is set. Raises ResourceError if this host has no interface of that name.
    """
    present = [name for _, name in socket.if_nameindex()]
    if chosen := os.environ.get("GLOO_SOCKET_IFNAME"):
        if missing := [name for name in chosen.split(",") if name not in present]:
            raise ResourceError(
                f"GLOO_SOCKET_IFNAME names {missing[0]!r} and the interfaces of {socket.gethostname()} are "
                f"{', '.join(present)}; name one of them, or unset it"
            )
        return
    for name in present:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
                if socket.inet_ntoa(answer[20:24]) == host:
                    os.environ["GLOO_SOCKET_IFNAME"] = name
                    return
