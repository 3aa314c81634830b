"""Records the token times of simulated requests."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.simulation.group import SimulatedSequence

_MICROSECOND = 1e-6


class Recorder:
    """One entry for each finished request, in order of finishing, and a histogram of inter-token latencies in
    microseconds."""

    def __init__(self) -> None:
        self.arrivals_s = array("d")
        self.first_tokens_s = array("d")
        self.last_tokens_s = array("d")
        self.input_lens = array("q")
        self.output_lens = array("q")
        self.itl_us: dict[int, int] = defaultdict(int)

    def token(self, sequence: SimulatedSequence, now_s: float) -> None:
        """Records a token of `sequence`; for the last token, also the request."""
        if sequence.first_token_s is None:
            sequence.first_token_s = now_s
        else:
            self.itl_us[round((now_s - sequence.last_token_s) / _MICROSECOND)] += 1
        sequence.last_token_s = now_s
        if sequence.finish_reason is None:
            return
        request = sequence.request
        assert request is not None
        self.arrivals_s.append(request.arrival_s)
        self.first_tokens_s.append(sequence.first_token_s)
        self.last_tokens_s.append(now_s)
        self.input_lens.append(request.input_len)
        self.output_lens.append(sequence.num_output)

    def decodes(self, start_s: float, ends_s: Iterable[float], num_decodes: int) -> None:
        """Records decode steps that end at `ends_s`, with `num_decodes` sequences each. Their previous token came
        when the step before ended; for the first step, at `start_s`."""
        itl_us, before_s = self.itl_us, start_s
        for end_s in ends_s:
            itl_us[round((end_s - before_s) / _MICROSECOND)] += num_decodes
            before_s = end_s
