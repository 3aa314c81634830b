"""The engine for asyncio callers. A thread of its own runs the steps, so no event loop ever waits for one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import TypeVar

from qwen3_dist.engine.engine import PROMPT_ONLY, Engine, Outputs, Resumed
from qwen3_dist.engine.rank_questions import Answered, RankQuestions
from qwen3_dist.engine.regrouping import Absence, Recovery
from qwen3_dist.engine.request_stream import TAKE_S, RequestStream, call_soon, send_due
from qwen3_dist.errors import EngineDeadError, QueueTimeoutError, QwenDistError, RequestError
from qwen3_dist.launch.base import RankPlace
from qwen3_dist.log_file import log_file
from qwen3_dist.pooling_params import PoolingParams
from qwen3_dist.protocol.outputs import EngineLoad, EngineStats, TokenDelta
from qwen3_dist.request_terms import DEFAULT_TERMS, RequestTerms
from qwen3_dist.sampling_params import SamplingParams
from qwen3_dist.settings import EngineConfig

T = TypeVar("T")
_log = logging.getLogger(__name__)
_IDLE_CHECK_S = 0.5  # the longest time until an idle engine notices a dead rank
_TELL_WAIT_S = 0.1  # after which a caller is told that its request waits
_BUSY_CHECK_S = 0.005  # between two checks on a move of experts while the engine is idle, or on a recovery


class AsyncEngine(RankQuestions):
    """An engine whose constructor blocks until the model is loaded on all ranks. Raises what `Engine` raises.

    All callers together get about `parts_per_s` parts a second at most, beside the first and last of each request;
    above that rate a part holds the tokens of several steps.

    If a rank is lost, all requests fail with EngineDeadError and so do new ones, until another has taken its place or
    the engine runs without it, for which `recovered` waits; so it is when absent ranks come back. If neither works,
    the engine dies: its thread calls `on_death` after it has ended its ranks, but not after `shutdown`.
    """

    def __init__(
        self,
        config: EngineConfig,
        show_progress: bool = False,
        parts_per_s: float = math.inf,
        on_death: Callable[[], None] | None = None,
    ) -> None:
        self._engine = Engine(config, show_progress, grammars_ahead=True, recovers=True)
        self._on_death = on_death
        self._parts_per_s = parts_per_s
        self.backends, self.collectives = self._engine.backends, self._engine.collectives
        self.model_path = self._engine.model_path
        self.model_config = self._engine.model_config
        self.kv_cache_dtype = config.cache_dtype(self.model_config)
        self.tokenizer = self._engine.tokenizer
        self.chat_template = self._engine.chat_template
        self.max_model_len = self._engine.max_model_len
        self._adapters_lock = asyncio.Lock()
        self._streams: dict[str, RequestStream] = {}
        self._inbox: deque[Callable[[], object]] = deque()
        self._wake = threading.Condition()
        self._taken = threading.Event()  # whether an event loop has what was delivered
        self._replies: set[Callable[[QwenDistError], None]] = set()  # to what `_ask` waits for
        self._stopping = False
        self._death: QwenDistError | None = None
        self.recovers = False  # whether the ranks change
        self.recoveries: list[Recovery] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt_token_ids: list[int],
        params: SamplingParams,
        request_id: str,
        terms: RequestTerms = DEFAULT_TERMS,
        lora: str | None = None,
        pooling: PoolingParams | None = None,
        announce: bool = False,
        resume: Resumed | None = None,
        on_wait: Callable[[bool], object] = lambda waits: None,
    ) -> AsyncGenerator[list[TokenDelta], None]:
        """Yields the deltas of each step until all choices of the request are finished; with `announce` an empty list
        first, as soon as the request is accepted.

        With `resume` the choices that it names go on after the output tokens that another engine generated for them,
        and have deltas of what follows alone; other choices are not run. All that decides a token is rebuilt from
        these tokens, so with a seed in `params` the output is that of one engine.

        `on_wait` tells what a lost engine cannot have died of. It is called with True if no step has held the request
        after a while, or until the engine dies, and with False when it begins after that. One that was preempted has
        begun, and so have all if the engine fails by itself.

        It runs on `terms`, with the adapter `lora`. Raises RequestError if the request is refused or its structured
        output fails, QueueTimeoutError if it has waited too long, and EngineDeadError if the engine dies. Leaving the
        iterator early (aclose, cancellation) aborts the request within a step.
        """
        unfinished = params.n if resume is None else len(resume)
        stream = RequestStream(asyncio.get_running_loop(), unfinished, on_wait)
        if self._death is not None:
            stream.tell_wait()
        self.check_health()
        self._engine.check(prompt_token_ids, params, lora, pooling, resume)
        prepare = self._engine.prepare
        setup = prepare(params) if params.is_plain else await asyncio.to_thread(prepare, params)
        if setup is not None:
            await self._await_grammar(setup)

        def add() -> None:
            self._streams[request_id] = stream
            arguments = (request_id, prompt_token_ids, params, terms, lora, setup, pooling, resume)
            try:
                if ended := self._engine.add_request(*arguments, stream.begin):
                    stream.send(ended)
            except RequestError as error:  # its adapter has left since it was checked
                stream.send(error)

        def refuse() -> None:
            waits = self._streams.get(request_id) is stream and not stream.begun
            if waits and self._engine.abort(request_id):
                stream.send(QueueTimeoutError(terms.queue_timeout_s))

        if death := self._post(add):
            stream.tell_wait()
            raise EngineDeadError(str(death))
        if terms.queue_timeout_s and resume is None:
            stream.call_later(terms.queue_timeout_s, lambda: self._post(refuse))
        stream.call_later(0.0 if terms.suspect else _TELL_WAIT_S, stream.tell_wait)
        try:
            if announce:
                yield []
            while stream.unfinished:
                yield await stream.next_deltas()
        finally:
            stream.cancel_calls()
            self._post(lambda: self._forget(request_id, stream))

    def _forget(self, request_id: str, stream: RequestStream) -> None:
        """Ends a request whose caller is done with it, unless its id has come again, as it may after a recovery."""
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            if stream.unfinished:
                self._engine.abort(request_id)

    async def pool(
        self,
        prompt_token_ids: list[int],
        pooling: PoolingParams,
        request_id: str,
        terms: RequestTerms = DEFAULT_TERMS,
        lora: str | None = None,
        on_wait: Callable[[bool], object] = lambda waits: None,
    ) -> TokenDelta:
        """Runs a pooling request and returns its only delta. Raises what `generate` does; cancelling aborts it."""
        steps = self.generate(
            prompt_token_ids, PROMPT_ONLY, request_id, terms, lora, pooling, on_wait=on_wait
        )
        async with contextlib.aclosing(steps):
            [delta] = await anext(steps)
            return delta

    def abort(self, request_id: str, index: int) -> None:
        """Ends one choice of a request; its stream is told with finish_reason "abort"."""

        def end() -> None:
            stream = self._streams.get(request_id)
            if self._engine.abort(request_id, index) and stream is not None:
                stream.send([TokenDelta(index, (), (), "abort")])

        self._post(end)

    @property
    def config(self) -> EngineConfig:
        """With the layout and the adapters of now."""
        return self._engine.config

    @property
    def ranks(self) -> tuple[RankPlace, ...]:
        """Where each rank runs."""
        return self._engine.ranks

    @property
    def absence(self) -> Absence | None:
        """The ranks without which the engine runs; None if it has all."""
        return self._engine.regrouping.absence

    async def recovered(self) -> None:
        """Waits while the engine `recovers`. Raises EngineDeadError if it cannot serve requests any more."""
        while self.recovers:
            await asyncio.sleep(_BUSY_CHECK_S)
        self.check_health()

    @property
    def has_died(self) -> bool:
        """Whether the engine cannot serve requests any more."""
        return self._death is not None and not self.recovers

    def check_health(self) -> None:
        """Raises EngineDeadError if the engine cannot serve requests, any more or while it `recovers`."""
        if self._death is not None:
            raise EngineDeadError(str(self._death))

    def stats(self) -> EngineStats:
        return self._engine.stats()

    @property
    def step_age_s(self) -> float:
        """Seconds for which the oldest step in flight has run; 0 if none is."""
        return self._engine.step_age_s

    def stalled(self) -> str:
        """Why a step in flight seems to hang: it has run far longer than those before it; "" if none does."""
        return self._engine.stalled()

    def adapters_in_use(self) -> tuple[list[str], list[str]]:
        """Names of the adapters of running and of waiting sequences."""
        return self._engine.adapters_in_use()

    def load(self) -> EngineLoad:
        """What waits and runs now."""
        return self._engine.load()

    def shutdown(self) -> None:
        """Fails the requests in flight and ends the ranks. May be called more than once."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._engine.shutdown()

    def _post(self, action: Callable[[], object]) -> QwenDistError | None:
        """Makes the engine's thread run `action` between two steps. If the engine has died, returns why instead."""
        with self._wake:
            if self._death is None:
                self._inbox.append(action)
                self._wake.notify()
            return self._death

    async def _ask(self, question: Callable[[Answered[T]], object]) -> T:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T | QwenDistError] = loop.create_future()

        def tell(value: T | QwenDistError) -> None:
            if not answer.done():  # else its caller was cancelled
                answer.set_result(value)

        def reply(value: T | QwenDistError) -> None:
            self._replies.discard(reply)
            call_soon(loop, tell, value)

        def ask() -> None:
            self._replies.add(reply)
            question(reply)

        if death := self._post(ask):
            raise EngineDeadError(str(death))
        value = await answer
        if isinstance(value, QwenDistError):
            raise value
        return value

    def _run(self) -> None:
        while True:
            steps = self._engine.collected_steps
            error, self.recovers = self._run_until_death()
            self._fail_requests(error)
            # Ranks that are lost before the first step after a recovery would be lost after the next one too.
            replaces = not self.recoveries or self._engine.collected_steps > steps
            if not self.recovers or not self._recover(error, replaces):
                break
        self._engine.shutdown()
        if self._on_death is not None and not self._stopping:
            self._on_death()

    def _run_until_death(self) -> tuple[QwenDistError, bool]:
        """Runs steps until the engine dies, ends or takes ranks back. Returns why, and whether it may `_recover`."""
        try:
            while not self._stopping:
                self._do_inbox()
                changes = self._engine.changes
                if not changes.is_busy:  # else nobody knows what the ranks have
                    self._engine.regrouping.tick()
                if self._engine.has_work:
                    self._deliver(self._engine.step())
                elif changes.is_busy:
                    changes.tick(idle=True)
                else:
                    self._engine.check_health()
            return EngineDeadError("the engine was shut down"), False
        except QwenDistError as error:
            return error, True
        except Exception as error:
            _log.exception("the engine failed as it ran %s", ", ".join(self._streams) or "no request")
            for stream in self._streams.values():
                stream.begin()  # any may be the cause, such as one that fails when it is scheduled
            place = log_file(_log) or "standard error"
            failure = f"the engine failed: {type(error).__name__}: {error}; {place} has the traceback"
            return EngineDeadError(failure), False

    def _recover(self, error: QwenDistError, replaces: bool) -> bool:
        """Changes the ranks. Returns whether the engine serves again."""
        try:
            recovery = self._engine.recover(str(error), replaces)
        except Exception as failure:  # noqa: BLE001 - whatever it is, the engine dies
            _log.error("the engine ends: %s", failure, exc_info=not isinstance(failure, QwenDistError))
            return False
        else:
            self.recoveries.append(recovery)
            _log.warning("%s", recovery)
            self.max_model_len = self._engine.max_model_len
            with self._wake:
                self._death = None
            return True
        finally:
            self.recovers = False

    def _do_inbox(self) -> None:
        with self._wake:
            if not self._inbox and not self._engine.has_work and not self._stopping:
                self._wake.wait(_BUSY_CHECK_S if self._engine.changes.is_busy else _IDLE_CHECK_S)
        for _ in range(len(self._inbox)):  # one by one: `_die` runs those after an action that fails
            self._inbox.popleft()()

    def _deliver(self, outputs: Outputs) -> None:
        for request_id, deltas in outputs.items():
            if stream := self._streams.get(request_id):
                stream.held += deltas
        has_first = send_due(self._streams.values(), self._parts_per_s, self._taken)
        if self._engine.in_long_step:  # the event loop may have the GIL before the next step is planned
            self._taken.wait(TAKE_S) if has_first else time.sleep(0)

    def _fail_requests(self, error: QwenDistError) -> None:
        """Tells all who wait for the engine that it has died."""
        with self._wake:
            self._death = error
        while self._inbox:  # new requests among them get a stream, which is failed below
            with contextlib.suppress(Exception):
                self._inbox.popleft()()
        for stream in self._streams.values():
            if stream.held:
                stream.send(stream.held)
            stream.send(error)
        self._streams.clear()
        for reply in list(self._replies):
            reply(EngineDeadError(str(error)))
