"""Reads the log files of a service on all nodes of a Ray cluster."""

from __future__ import annotations

import os
import re
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster import ray_private
from serve_app.settings import INGRESS, REPLICA

_TIME = re.compile(r'(?:\{"time":")?(\d{4}-\d\d-\d\dT[\d:.]+Z)')
_FILE = re.compile(rf"replica_(?P<application>.+)_(?:{INGRESS}|{REPLICA})_[^_./]+\.log(?:\.(?P<age>\d+))?")
_ANSWER_S = 30.0


@dataclass(frozen=True)
class Entry:
    """One log record: its time in ISO 8601, empty if unknown, and its lines."""

    time: str
    text: str


@dataclass
class Reading:
    """What a node told: new entries, how many bytes of each file, by inode, are known now, and which services have
    files there."""

    entries: list[Entry] = field(default_factory=list)
    known: dict[int, int] = field(default_factory=dict)
    services: set[str] = field(default_factory=set)


class ServiceLogs:
    """The log of the service called `name`, merged from all nodes of the cluster that this process is connected to."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._known: dict[str, dict[int, int]] = {}
        self._services: set[str] = set()

    def missing(self) -> str:
        """Why nothing was found, once `new_entries` was called; "" if the service has a log."""
        if self._name in self._services:
            return ""
        others = ", ".join(sorted(self._services)) or "none"
        return f"no node of this Ray cluster has a log of a service called {self._name!r}; those with logs: {others}"

    def new_entries(self, most: int | None = None) -> list[Entry]:
        """The entries since the last call by time, of each file at first only the last `most`.

        A node that does not answer is asked again by the next call.
        """
        asked = {}
        for node in ray.nodes():
            if node["Alive"]:
                id_ = node["NodeID"]
                task = ray.remote(read_logs).options(
                    num_cpus=0, scheduling_strategy=NodeAffinitySchedulingStrategy(id_, soft=False)
                )
                asked[task.remote(self._name, self._known.get(id_, {}), most)] = id_
        done, _ = ray.wait(list(asked), num_returns=len(asked), timeout=_ANSWER_S)
        entries: list[Entry] = []
        for answer in done:
            try:
                reading: Reading = ray.get(answer)
            except ray.exceptions.RayError:  # the node left
                continue
            self._known[asked[answer]] = reading.known
            self._services |= reading.services
            entries += reading.entries
        return sorted(entries, key=lambda entry: entry.time)


def read_logs(name: str, known: Mapping[int, int], most: int | None) -> Reading:
    """What this node's log files of a service hold beyond the bytes that are `known`."""
    return read_files(Path(ray_private.logs_directory()) / "serve", name, known, most)


def read_files(directory: Path, name: str, known: Mapping[int, int], most: int | None) -> Reading:
    """What the files of a service in `directory`, rotated ones too, hold beyond the bytes that are `known`."""
    reading = Reading()
    found = []
    for path in directory.glob("replica_*"):
        if match := _FILE.fullmatch(path.name):
            service, _, _ = match["application"].partition("--")
            reading.services.add(service)
            if service == name:
                found.append((int(match["age"] or 0), path))
    for _, path in sorted(found, key=lambda each: -each[0]):
        with path.open("rb") as file:
            status = os.fstat(file.fileno())
            inode, start = status.st_ino, known.get(status.st_ino, 0)
            if start > status.st_size:  # another file, which got the inode of one that was removed
                start = 0
            file.seek(start)
            new = file.read()
        new = new[: new.rfind(b"\n") + 1]  # a line that is being written comes next time
        reading.known[inode] = start + len(new)
        entries = _entries(new.decode(errors="replace"))
        reading.entries += entries if most is None or start else deque(entries, maxlen=most)
    return reading


def _entries(text: str) -> Iterator[Entry]:
    """The entries of a file's text. A line without a time belongs to the one before: it is part of a traceback."""
    time = ""
    lines: list[str] = []
    for line in text.splitlines():
        match = _TIME.match(line)
        if match and lines:
            yield Entry(time, "\n".join(lines))
            lines = []
        time = match[1] if match else time
        lines.append(line)
    if lines:
        yield Entry(time, "\n".join(lines))
