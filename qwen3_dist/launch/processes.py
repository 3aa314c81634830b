"""Ranks as processes of this host, without Ray: for one machine and for tests."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from multiprocessing.connection import Connection, Pipe
from typing import Any, TypeVar

import torch

from qwen3_dist.errors import ResourceError
from qwen3_dist.gc_utils import freeze_gc_heap
from qwen3_dist.launch.launcher import Launcher
from qwen3_dist.protocol.messages import RankSpec
from qwen3_dist.rank_env import openmp_environment
from qwen3_dist.settings import EngineConfig
from qwen3_dist.worker.cards import local_device

_ANSWER_S = 120.0  # a new interpreter may import torch from a cold disk
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_MOST_WORDS = 1 << 12  # bytes; a pipe accepts so many without blocking
_NURSERY = """
import sys
from multiprocessing.connection import Connection

pipe = Connection(int(sys.argv[1]))
try:
    import qwen3_dist.worker.rank
    from qwen3_dist.launch.processes import serve_nursery
except BaseException as error:
    pipe.send((False, f"{type(error).__name__}: {error}"))
    raise
serve_nursery(pipe)
"""

T = TypeVar("T")
_shared: Nursery | None = None


class Nursery:
    """A new Python interpreter that imports everything ranks need once, and forks the ranks.

    Importing torch takes seconds of CPU time, which every rank would spend otherwise. `multiprocessing` does not do
    this: its spawn imports the caller's `__main__` again in every rank. Ranks die with their nursery, and the nursery
    dies with the process that made it.
    """

    def __init__(self) -> None:
        self._pipe, theirs = Pipe()
        command = [sys.executable, "-c", _NURSERY, str(theirs.fileno())]
        self._process = subprocess.Popen(
            command,
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            env={**os.environ, **openmp_environment()},
        )
        theirs.close()
        self._asking = threading.Lock()

    def launch(self, function: Callable[[T], None], arguments: list[T]) -> list[int]:
        """Forks a process for each argument, which calls a module-level function with it. Returns the process ids."""
        return self._ask("launch", [(function, argument) for argument in arguments])

    def last_words(self, pids: list[int]) -> list[str]:
        """The exception that ended each process, in one line; "" if there was none."""
        return self._ask("last_words", pids)

    def exit_codes(self, pids: list[int]) -> list[int | None]:
        """The exit code of each process: negative for a signal, None while the process runs."""
        return self._ask("exit_codes", pids)

    def end(self, pids: list[int]) -> None:
        """Kills these processes, waits for their end and forgets their ids."""
        self._ask("end", pids)

    def close(self) -> None:
        self._pipe.close()
        self._process.kill()
        self._process.wait()

    def _ask(self, what: str, about: list[Any]) -> Any:
        try:
            with self._asking:
                with contextlib.suppress(BrokenPipeError):  # its last message may still be readable
                    self._pipe.send((what, about))
                answered, answer = self._pipe.recv() if self._pipe.poll(_ANSWER_S) else (False, "it hangs")
        except (EOFError, OSError):
            answered, answer = False, "it has ended"
        if not answered:
            raise ResourceError(f"the process that starts ranks cannot: {answer}")
        return answer


class ProcessLauncher(Launcher):
    """Starts ranks in the nursery of `shared_nursery` if there is one, else in a new one."""

    def __init__(self, config: EngineConfig) -> None:
        self.host = "127.0.0.1"
        self.device = local_device(config.device)
        self._num_cards = _count_cards(config) if self.device == "cuda" else 0
        self._nursery: Nursery | None = None
        self._pids: dict[int, int] = {}  # by seat

    def launch(self, specs: list[RankSpec]) -> None:
        self._nursery = _shared or Nursery()
        pids = self._nursery.launch(self.main, [self._on_card(spec, spec.rank) for spec in specs])
        self._pids = dict(zip((spec.rank for spec in specs), pids, strict=True))

    def replace(self, spec: RankSpec, seat: int) -> None:
        assert self._nursery is not None
        self.end([seat])
        [self._pids[seat]] = self._nursery.launch(self.main, [self._on_card(spec, seat)])

    def end(self, seats: Iterable[int]) -> None:
        assert self._nursery is not None
        self._nursery.end([self._pids.pop(seat) for seat in seats if seat in self._pids])

    def _on_card(self, spec: RankSpec, seat: int) -> RankSpec:
        return replace(spec, card=seat % self._num_cards) if self._num_cards else spec

    def exit_reason(self, seats: Mapping[int, int]) -> str | None:
        assert self._nursery is not None
        pids = {rank: self._pids[seat] for rank, seat in seats.items() if seat in self._pids}
        try:
            codes = self._nursery.exit_codes([*pids.values()])
            words = self._nursery.last_words([*pids.values()])
        except ResourceError as error:
            return str(error)
        for rank, code, word in zip(pids, codes, words, strict=True):
            if code:
                how = f"by {signal.Signals(-code).name}" if code < 0 else f"with code {code}"
                return f"rank {rank}: {word or f'its process ended {how}'}"
        return None

    def stop(self) -> None:
        nursery, self._nursery = self._nursery, None
        if nursery is None:
            return
        if nursery is _shared:
            nursery.end([*self._pids.values()])
        else:
            nursery.close()


@contextlib.contextmanager
def shared_nursery() -> Iterator[None]:
    """A context whose engines start their ranks from one nursery, so that only the first waits for imports."""
    global _shared
    assert _shared is None
    _shared = Nursery()
    try:
        yield
    finally:
        _shared.close()
        _shared = None


def _count_cards(config: EngineConfig) -> int:
    """The number of GPUs of this host. Raises ResourceError if there are more ranks, which may not share them."""
    world, cards = config.layout.world, torch.cuda.device_count()
    if cards < world and not config.share_gpus:
        raise ResourceError(
            f"{world} ranks need {world} GPUs and this host has {cards}; set share_gpus=true, use a smaller layout or "
            "device=cpu"
        )
    return cards


class _Nurse:
    """The side of a nursery that runs in its process and owns the ranks' processes."""

    def __init__(self) -> None:
        self._codes: dict[int, int | None] = {}
        self._pipes: dict[int, int] = {}  # from which the exception of each running process is read
        self._words: dict[int, str] = {}

    def serve(self, pipe: Connection) -> None:
        """Answers `Nursery` until its owner is gone."""
        while True:
            try:
                what, about = pipe.recv()
                answer = True, getattr(self, what)(about)
            except EOFError:
                return
            except Exception as error:  # noqa: BLE001 - as of a module that cannot be imported here
                answer = False, _in_a_line(error)
            pipe.send(answer)

    def launch(self, calls: list[tuple[Callable[[Any], None], Any]]) -> list[int]:
        children = dict(_fork(*call) for call in calls)
        self._codes.update(dict.fromkeys(children))
        self._pipes.update(children)
        return list(children)

    def last_words(self, pids: list[int]) -> list[str]:
        return [self._words.get(pid, "") for pid in pids]

    def exit_codes(self, pids: list[int]) -> list[int | None]:
        for pid in pids:
            if self._codes[pid] is None:
                ended, status = os.waitpid(pid, os.WNOHANG)
                if ended:
                    self._bury(pid, status)
        return [self._codes[pid] for pid in pids]

    def end(self, pids: list[int]) -> None:
        for pid in pids:
            if self._codes[pid] is None:
                os.kill(pid, signal.SIGKILL)
                self._bury(pid, os.waitpid(pid, 0)[1])
            del self._codes[pid]
            self._words.pop(pid, None)

    def _bury(self, pid: int, status: int) -> None:
        """Records how a process ended."""
        self._codes[pid] = os.waitstatus_to_exitcode(status)
        pipe = self._pipes.pop(pid)
        with contextlib.suppress(BlockingIOError):  # a child of that process may hold the other end
            self._words[pid] = os.read(pipe, _MOST_WORDS).decode(errors="replace")
        os.close(pipe)


def _fork(function: Callable[[Any], None], argument: Any) -> tuple[int, int]:
    """Forks a process that calls `function`. Returns its id and the pipe from which its exception can be read."""
    nurse = os.getpid()
    words, leave = os.pipe()
    pid = os.fork()
    if pid:
        os.close(leave)
        os.set_blocking(words, False)
        return pid, words
    code = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == nurse:
            function(argument)
            code = 0
    except BaseException as error:
        traceback.print_exc()
        os.write(leave, _in_a_line(error).encode()[:_MOST_WORDS])
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _in_a_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def serve_nursery(pipe: Connection) -> None:
    """The main function of a nursery's process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the engine handles Ctrl-C
    freeze_gc_heap()  # or each rank's collections would visit, and so copy, what was imported before the fork
    with contextlib.suppress(OSError):
        _Nurse().serve(pipe)
