"""A walk through the steps in which the dp groups of a replica serve a load, formed by the scheduler's rules.

A step takes decodes first, then prompts in order within the token budget, while the KV cache has room. If the cache is
full, the youngest sequence is preempted and computed again. A run of equal decode steps is taken at once, each as long
as the one in its middle.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import ceil, floor
from typing import NamedTuple

from cluster.planning.cost_model import StepShape


@dataclass(frozen=True)
class StepRules:
    """How steps are formed, by `groups` dp groups that take steps together. max_num_batched_tokens is of a group; the
    other counts are of all groups.

    capacity_tokens: of the KV cache. max_prompts: most prompts in a step. Other engines' rules: prompts_first: prompts
    run in steps of their own, before any decode; reserves: a request is admitted only if its whole output fits too.
    """

    max_num_batched_tokens: int
    max_num_seqs: int
    capacity_tokens: int
    max_prompts: int | None = None
    groups: int = 1
    prompts_first: bool = False
    reserves: bool = False


def prompts_at_once(clients: int, output_len: int) -> int:
    """Most prompts in a step of a closed loop: one, or twice as many as a steady state needs.

    Answers end, and requests come, one by one. The measured TTFT of other engines does not depend on how many prompts
    the tokens of a step would hold, as it would if the requests that began together stayed together.
    """
    return max(1, -(-2 * clients // output_len))


class Request(NamedTuple):
    """Lengths in tokens, seconds until it is sent, and the number of equal requests that its client sends after it,
    each when the last is answered. `cached_len` tokens of the prompt are in the cache already."""

    input_len: int
    output_len: int
    arrival_s: float = 0.0
    followers: int = 0
    cached_len: int = 0


@dataclass(frozen=True)
class Workload:
    """Equal requests. `cached_len` tokens of a prompt are found in the prefix cache. A decode step drafts `drafted`
    tokens for each sequence, of which `accepted` are accepted on average."""

    input_len: int
    output_len: int
    cached_len: int = 0
    drafted: int = 0
    accepted: float = 0.0

    @property
    def decode_steps(self) -> int:
        """Decode steps of a sequence."""
        return ceil((self.output_len - 1) / (1 + self.accepted))

    @property
    def request(self) -> Request:
        """A request to walk with: one token for each step. Its context is right on average: the tokens that have no
        step of their own are there from the beginning, by half."""
        added = (self.output_len - 1 - self.decode_steps) // 2
        return Request(self.input_len + added, 1 + self.decode_steps, cached_len=self.cached_len + added)


@dataclass(eq=False, slots=True)
class Served:
    """A request, and when it was sent, got its first and its last token: seconds from the start."""

    request: Request
    sent_s: float
    first_s: float = 0.0
    last_s: float = 0.0
    prompt_left: int = 0  # tokens still to prefill
    made: int = 0  # tokens of output, while it does not decode
    ends: int = 0  # number of the decode step that gives its last token

    @property
    def ttft_s(self) -> float:
        """Seconds until the first token."""
        return self.first_s - self.sent_s

    @property
    def itl_s(self) -> float:
        """Mean seconds of each later token; 0 if there is none."""
        return (self.last_s - self.first_s) / max(1, self.request.output_len - 1)


@dataclass
class Walk:
    """Serves requests in steps that take `step_seconds`. `turnaround_s`: the mean time between an answer and its
    client's next request. `depth`: steps in flight; with 2, who arrives during a step waits for the next one too.
    `steps` get every run of equal steps if it is a list: their shape, their number, and when they begin."""

    step_seconds: Callable[[StepShape], float]
    rules: StepRules
    turnaround_s: float = 2e-3
    depth: int = 2
    steps: list[tuple[StepShape, int, float]] | None = None
    now: float = 0.0
    _planned_s: float = 0.0  # when the next step is planned
    _done: list[Served] = field(default_factory=list)
    _arriving: list[tuple[float, int, Request]] = field(default_factory=list)
    _waiting: deque[Served] = field(default_factory=deque)
    _prompts: deque[Served] = field(default_factory=deque)  # admitted, and not all of the prompt computed
    _decoding: list[tuple[int, int, Served]] = field(default_factory=list)  # a heap by `Served.ends`
    _order: int = 0
    _context: int = 0  # tokens of the decoding sequences
    _cached: int = 0  # tokens of the other admitted ones
    _admitted: int = 0
    _decode_steps: int = 0
    _random: random.Random = field(default_factory=lambda: random.Random(0))

    def serve(self, requests: Iterable[Request]) -> list[Served]:
        """All requests with their followers, in the order in which they end."""
        for request in requests:
            self._arrive(request, request.arrival_s)
        while self._arriving or self._waiting or self._prompts or self._decoding:
            planned_s = self._planned_s if self.depth > 1 else self.now
            while self._arriving and self._arriving[0][0] <= planned_s:
                sent_s, _, request = heapq.heappop(self._arriving)
                self._waiting.append(
                    Served(request, sent_s, prompt_left=request.input_len - request.cached_len)
                )
            if not (self._waiting or self._prompts or self._decoding):
                self.now = self._planned_s = max(self.now, self._arriving[0][0])
                continue
            self._step()
        return self._done

    def _arrive(self, request: Request, at_s: float) -> None:
        self._order += 1
        heapq.heappush(self._arriving, (at_s, self._order, request))

    def _step(self) -> None:
        self._make_room()
        decodes = len(self._decoding)
        budget = self.rules.max_num_batched_tokens * self.rules.groups
        tokens, pairs, partial, finished = self._prefill(
            budget if self.rules.prompts_first else budget - decodes
        )
        if tokens and self.rules.prompts_first:
            decodes = 0
        if not tokens:
            self._decode_run()
            return
        context = self._context + decodes if decodes else 0
        self._planned_s = self.now
        # What step_seconds takes for the number of prompts: with dp groups, those too that go on in a later step.
        prompts = len(finished) + (partial if self.rules.groups > 1 else 0)
        shape = StepShape(decodes, context, tokens, pairs, decodes + prompts)
        self._note(shape, 1)
        self.now += self.step_seconds(shape)
        if decodes:
            self._advance(1)
        for each in finished:
            self._start_decoding(each)

    def _prefill(self, budget: int) -> tuple[int, int, int, list[Served]]:
        """Chunks of prompts within `budget` tokens: their tokens, their query-key pairs, the number of prompts that go
        on in a later step, and the prompts that they end."""
        tokens = pairs = 0
        finished: list[Served] = []
        most, chunk_limit = self.rules.max_prompts, max(1, budget // self.rules.groups)
        partial = 0  # prompts that go on in a later step: at most one of each group
        while budget > 0 and partial < self.rules.groups and len(finished) + partial != most:
            if partial == len(self._prompts) and not self._admit():
                break
            each = self._prompts[partial]
            chunk = min(budget, chunk_limit, each.prompt_left)
            before = each.request.input_len + each.made - each.prompt_left
            pairs += chunk * before + chunk * (chunk + 1) // 2
            tokens, budget = tokens + chunk, budget - chunk
            each.prompt_left -= chunk
            if each.prompt_left:
                partial += 1
            else:
                finished.append(each)
                del self._prompts[partial]
        return tokens, pairs, partial, finished

    def _admit(self) -> bool:
        if not self._waiting:
            return False
        first = self._waiting[0]
        prompt = first.request.input_len + first.made
        if self.rules.reserves:
            length = first.request.input_len + first.request.output_len
            fits = (self._admitted + 1) * length <= self.rules.capacity_tokens
        else:
            fits = self._context + self._cached + prompt < self.rules.capacity_tokens
        if self._admitted and (not fits or self._admitted >= self.rules.max_num_seqs):
            return False
        self._admitted += 1
        self._cached += prompt
        self._prompts.append(self._waiting.popleft())
        return True

    def _start_decoding(self, each: Served) -> None:
        self._cached -= each.request.input_len + each.made
        each.first_s = each.first_s or self.now
        each.made += 1
        if each.made >= each.request.output_len:
            self._end(each)
            return
        self._order += 1
        each.ends = self._decode_steps + each.request.output_len - each.made
        self._context += each.request.input_len + each.made - 1
        heapq.heappush(self._decoding, (each.ends, self._order, each))

    def _decode_run(self) -> None:
        """Decode steps until a sequence ends, a request arrives, or the cache is full."""
        decodes = len(self._decoding)
        steps = self._decoding[0][0] - self._decode_steps
        room = (self.rules.capacity_tokens - self._context - self._cached) // decodes
        steps = max(1, min(steps, room))
        if self._arriving:
            until_s = self._arriving[0][0] - self.now
            one_s = self.step_seconds(StepShape(decodes, self._context + decodes, 0, 0, decodes))
            steps = min(steps, max(1, floor(until_s / one_s) + self.depth))
        shape = StepShape(decodes, self._context + decodes * (steps + 1) // 2, 0, 0, decodes)
        self._note(shape, steps)
        one_s = self.step_seconds(shape)
        self._planned_s = self.now + (steps - 1) * one_s
        self.now += steps * one_s
        self._advance(steps)

    def _note(self, shape: StepShape, number: int) -> None:
        if self.steps is not None:
            self.steps.append((shape, number, self.now))

    def _advance(self, steps: int) -> None:
        self._decode_steps += steps
        self._context += steps * len(self._decoding)
        while self._decoding and self._decoding[0][0] <= self._decode_steps:
            each = heapq.heappop(self._decoding)[2]
            self._context -= each.request.input_len + each.request.output_len - 1
            self._end(each)

    def _make_room(self) -> None:
        """Preempts the youngest sequences until each of the others can take one more token."""
        while (
            len(self._decoding) > 1
            and self._context + self._cached + len(self._decoding) > self.rules.capacity_tokens
        ):
            youngest = max(self._decoding, key=lambda entry: entry[1])
            self._decoding.remove(youngest)
            heapq.heapify(self._decoding)
            each = youngest[2]
            each.made = each.request.output_len - (each.ends - self._decode_steps)
            each.prompt_left = each.request.input_len + each.made
            self._context -= each.prompt_left - 1
            self._admitted -= 1
            self._waiting.appendleft(each)

    def _end(self, each: Served) -> None:
        each.last_s = self.now
        self._admitted -= 1
        self._done.append(each)
        if each.request.followers:
            later = each.request._replace(followers=each.request.followers - 1)
            self._arrive(later, self.now + self._random.uniform(0, 2 * self.turnaround_s))
