"""The steady state of a replica whose requests come at random: its steps, and how long a request waits for them.

Requests come at rate r (Poisson). A step is a decode step of d seconds, or it has prompts too and takes m seconds.
Prompts that come during a step are computed in a later one, each in c steps, up to K at a time. So the steps with
prompts are the busy periods of a queue. One begins after a decode step with probability 1 - exp(-r d), and has
(1 / p - 1) / (1 - exp(-r m)) steps on average, where p is the probability that the queue is empty: exp(-x) with
x = r c m if K is large, and by Erlang's delay formula (1917) for any K. With dp groups, a step takes as long as that
of the group with the most prompts, so prompts that come together cost less than one after the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, exp, expm1, inf, isinf, sqrt

from cluster.planning.cost_model import CostModel, StepShape
from cluster.planning.dp_groups import GroupShapes, step_seconds
from cluster.planning.walk import StepRules, Workload

_EXACT = 1e-7  # of the rate
_REFINED = 4  # times that the number of prompts in a step and its time follow from each other
_MANY = 64
_TINY = 1e-12


@dataclass(frozen=True)
class Steady:
    """A steady state: requests/s, the mean step of those in which a sequence decodes, the wait until the first step of
    a request's prompt, and its steps; all in seconds."""

    rate: float
    step_s: float
    wait_s: float
    prompt_s: float
    together: float = 1.0  # chunks in a step with prompts


@dataclass(frozen=True)
class SeenSteps:
    """What a sequence sees while it decodes: a decode step, a step with prompts, and the share of those."""

    decode: GroupShapes
    prompt: GroupShapes
    prompt_share: float


class SteadySteps:
    """Steps of a replica in a steady state with `batch` requests in it on average."""

    def __init__(self, model: CostModel, rules: StepRules, load: Workload, batch: int) -> None:
        seconds = step_seconds(model, load.drafted)
        self._groups = groups = rules.groups
        self._batch, self._decode_steps, self._drafted = batch, load.decode_steps, load.drafted
        tokens, known = load.input_len - load.cached_len, load.cached_len
        steps = 1 + load.decode_steps
        # Beyond so many, prompts fill every step, and others wait.
        running = min(batch, max(1, groups * steps * rules.max_num_batched_tokens // (tokens + steps)))
        budget = max(1, rules.max_num_batched_tokens - ceil(running / groups))
        self.chunks = ceil(tokens / budget)
        self._tokens = tokens / self.chunks
        self._pairs = (tokens * known + tokens * (tokens + 1) / 2) / self.chunks
        self._most = groups * budget / self._tokens  # chunks in a step
        decoding = running * load.decode_steps / (load.decode_steps + self.chunks)
        self._decodes = round(decoding)
        self._context = int(decoding * (load.input_len + load.output_len / 2))
        self.decode = StepShape(max(1, self._decodes), self._context, 0, 0, max(1, self._decodes))
        self.decode_s = seconds(self.decode)
        alone_s, all_s, twice_s = (seconds(self.prompts(chunks)) for chunks in (1, groups, 2 * groups))
        self.alone_s = alone_s
        # For another chunk in a group that has none, and for one more in the group with the most.
        self._each_s = (all_s - alone_s) / (groups - 1) if groups > 1 else 0.0
        self._more_s = twice_s - all_s - groups * self._each_s

    def state(self) -> Steady:
        """The state, in which the requests in the replica are those that come while one is there (Little's law)."""
        fastest = self.chunks * self.alone_s + self._decode_steps * self.decode_s
        if self._batch == 1:  # finds nothing that runs
            return Steady(1 / fastest, self.decode_s, 0.0, self.chunks * self.alone_s)
        low, high = 0.0, self._batch / fastest
        missing, surplus, last = -1.0, self._surplus(high), 0.0
        while high - low > _EXACT * high:
            middle = (
                (low + high) / 2 if isinf(surplus) else low - missing * (high - low) / (surplus - missing)
            )
            found = self._surplus(middle)
            if abs(found) < _EXACT:
                low = middle
                break
            # A side that stays twice counts half (the Illinois method of Dowell and Jarratt, BIT 11, 1971).
            if found > 0:
                high, surplus, missing = middle, found, missing / 2 if last > 0 else missing
            else:
                low, missing, surplus = middle, found, surplus / 2 if last < 0 else surplus
            last = found
        state = self.at(low)
        assert state is not None
        return state

    def _surplus(self, rate: float) -> float:
        """Requests in the replica at `rate` beyond the given number, as a share of it."""
        found = self.at(rate)
        if found is None:
            return inf
        return rate * (found.wait_s + found.prompt_s + self._decode_steps * found.step_s) / self._batch - 1

    def at(self, rate: float) -> Steady | None:
        """The state at `rate`; None if the replica cannot read so many prompts."""
        prompt_s = self.alone_s
        for _ in range(_REFINED):
            offered = self.chunks * rate * prompt_s
            if offered >= self._most:
                return None
            empty, waits = _erlang(offered, self._most)
            in_a_row = (1 / empty - 1) / max(_TINY, -expm1(-rate * prompt_s))
            odds = in_a_row * -expm1(-rate * self.decode_s)
            share = odds / (1 + odds)
            step_s = share * prompt_s + (1 - share) * self.decode_s
            chunks = max(1.0, rate * self.chunks * step_s / max(_TINY, share))
            prompt_s = self._seconds(chunks)
        # A request comes in a long step rather than in a short one, and others with it.
        seen_s = (share * prompt_s**2 + (1 - share) * self.decode_s**2) / step_s
        # Half of what Erlang's formula gives, since prompts take equal times (Pollaczek and Khinchine for one server).
        queue_s = waits * self.chunks * prompt_s / (2 * (self._most - offered))
        own_s = self._seconds(1 + rate * seen_s) if self.chunks == 1 else self.chunks * prompt_s
        # So many more prompts than in the mean step come while a prompt is computed. Its decodes wait for them.
        longer_s = self.chunks * (self.alone_s - self.decode_s) * (1 - share + share / self._groups)
        more_s = rate * self.chunks * max(0.0, prompt_s - step_s) * longer_s / max(0.1, 1 - rate * longer_s)
        decoding_s = step_s + more_s / max(1, self._decode_steps)
        return Steady(rate, decoding_s, seen_s / 2 + step_s + queue_s, own_s, chunks)

    def seen(self) -> SeenSteps:
        """The steps of the state."""
        found = self.state()
        chunks = found.together
        share = (found.step_s - self.decode_s) / (self._seconds(chunks) - self.decode_s)
        prompt = GroupShapes.of(self.prompts(chunks), self._groups, self._drafted)
        tokens = round(self._in_largest(chunks) * self._tokens)
        largest = replace(
            prompt.largest,
            prefill_tokens=tokens,
            prefill_pairs=int(tokens * self._pairs / self._tokens),
        )
        decode = GroupShapes.of(self.decode, self._groups, self._drafted)
        return SeenSteps(decode, replace(prompt, largest=largest), min(1.0, max(0.0, share)))

    def prompts(self, chunks: float) -> StepShape:
        """A step with so many chunks of prompts beside the decodes."""
        tokens, pairs = round(chunks * self._tokens), int(chunks * self._pairs)
        return StepShape(self._decodes, self._context, tokens, pairs, self._decodes + max(1, round(chunks)))

    def _seconds(self, chunks: float) -> float:
        """Seconds of a step with so many chunks on average, of which a group has one at least."""
        return self.alone_s + (chunks - 1) * self._each_s + (self._in_largest(chunks) - 1) * self._more_s

    def _in_largest(self, chunks: float) -> float:
        """Chunks of the group with the most: 1, or of many half a chunk more than the mean."""
        in_largest = max(1.0, (chunks - 0.5) / self._groups + 0.5)
        return min(in_largest, max(1.0, self._most / self._groups))


def _erlang(offered: float, servers: float) -> tuple[float, float]:
    """Probabilities that nothing is served, and that who comes must wait (Erlang's delay formula)."""
    if servers > min(_MANY, offered + 6 * sqrt(offered) + 8):  # as if there were always a free one
        return max(_TINY, exp(-offered)), 0.0
    whole = max(1, int(servers))
    load = offered * whole / servers
    term = total = 1.0
    for number in range(1, whole):
        term *= load / number
        total += term
    waiting = term * load / whole / (1 - load / whole)
    return 1 / (total + waiting), waiting / (total + waiting)
