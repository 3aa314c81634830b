"""Moves experts among the ranks to balance their load: hot experts get copies, ranks get equal work.

Ranks count the rows of each expert that they host. To move a layer, every rank reads its new experts in a thread while
steps go on; when all ranks have them, all switch between the same two steps. If one rank cannot read its experts, all
ranks drop theirs and the layer stays as it is. The rank's side is `worker/expert_moves.py`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from qwen3_dist.engine.expert_load import ExpertLoad
from qwen3_dist.engine.rank_work import POLL_S, RankWork
from qwen3_dist.errors import CheckpointError, EngineDeadError, QwenDistError
from qwen3_dist.expert_placement import ExpertPlacement, Placements
from qwen3_dist.launch.base import Executor
from qwen3_dist.settings import EngineConfig

_log = logging.getLogger(__name__)
_WORTH_MOVING = 0.95  # a new placement must have less than this share of the old one's imbalance

Outcome = list[int] | QwenDistError  # the layers that changed, or why a layer could not be moved
Done = Callable[[Outcome], None]


@dataclass
class _Rebalance:
    """One pass over all layers: those still to be judged by `load`, and those that changed."""

    done: Done
    load: ExpertLoad
    to_judge: list[int]
    changed: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _Move:
    """A layer whose new experts the ranks are reading."""

    layer: int
    placement: ExpertPlacement
    reading: RankWork


class ExpertBalance:
    """Reads the experts' load from the ranks and moves experts among them. Called between steps."""

    def __init__(self, executor: Executor, config: EngineConfig, placements: Placements) -> None:
        self._executor = executor
        self._config = config
        self._placements = dict(placements)
        self._before: dict[int, tuple[int, ...]] = {}  # each layer's token counts when it was last judged
        self._period_s = config.rebalance_experts_s if placements else None
        self._next_s = time.monotonic() + (self._period_s or 0)
        self._rebalances: deque[_Rebalance] = deque()
        self._move: _Move | None = None

    def restart(self, config: EngineConfig, placements: Placements) -> None:
        """Tells that the ranks count from 0 again, in what layout and where experts lie, and that what was going on
        will not be finished."""
        self._config, self._placements = config, dict(placements)
        self._rebalances.clear()
        self._before.clear()

    @property
    def is_busy(self) -> bool:
        """Whether experts are being moved, so that `tick` must be called even if no step runs."""
        return bool(self._rebalances)

    @property
    def settled(self) -> Placements:
        """Where the experts lie. Raises EngineDeadError while a layer is moved: ranks may have switched or not."""
        if self._move is not None:
            raise EngineDeadError(f"a rank was lost while the experts of layer {self._move.layer} were moved")
        return self._placements

    @property
    def are_read(self) -> bool:
        """Whether ranks read experts of a layer."""
        return self._move is not None

    def tick(self, waits: bool = False) -> None:
        """Continues moves, and starts those due by `rebalance_experts_s`. Never waits for ranks that read. `waits`:
        ranks read adapters, for the experts where they are."""
        if waits:
            return
        if not self._rebalances:
            if self._period_s is not None and time.monotonic() >= self._next_s:
                self._next_s = time.monotonic() + self._period_s
                self.begin(_log_failure)
        elif self._move is None:
            self._judge_next(self._rebalances[0])
        else:
            self._go_on(self._move, self._rebalances[0])

    def begin(self, done: Done) -> None:
        """Makes `tick` move every layer's experts to balance the load since the last time.

        `done` gets the layers that changed, or the CheckpointError of a layer that could not be read and stays.
        """
        self._rebalances.append(_Rebalance(done, self.load(), sorted(self._placements)))

    def rebalance_all(self) -> list[int]:
        """Moves all experts at once, without steps in between; returns the layers that changed.

        Raises CheckpointError for a layer that cannot be read.
        """
        answers: list[Outcome] = []
        self.begin(answers.append)
        while not answers:
            self.tick()
            time.sleep(0.0 if self._move is None else POLL_S / 10)
        [answer] = answers
        if isinstance(answer, QwenDistError):
            raise answer
        return answer

    def load(self) -> ExpertLoad:
        """Tokens of each expert since the start."""
        totals = {layer: [0] * placement.num_experts for layer, placement in self._placements.items()}
        for rank, counts in enumerate(self._executor.call("expert_counts")):
            if self._config.layout.coords(rank).etp_rank:
                continue  # it holds other columns of experts that another rank has counted
            for layer, of_experts in counts.items():
                for expert, count in of_experts.items():
                    totals[layer][expert] += count
        return ExpertLoad({layer: tuple(tokens) for layer, tokens in totals.items()}, dict(self._placements))

    def _judge_next(self, rebalance: _Rebalance) -> None:
        """Starts to move the next layer if that is worth it. After the last layer, ends the rebalance."""
        if not rebalance.to_judge:
            self._rebalances.popleft().done(rebalance.changed)
            return
        layer = rebalance.to_judge.pop(0)
        placement = self._better_placement(layer, rebalance.load)
        if placement is not None:
            self._executor.call("prepare_experts", layer, placement)
            timeout_s = self._config.start_timeout_s

            def too_late(ranks: str) -> QwenDistError:
                return CheckpointError(
                    f"the experts of layer {layer} were not moved: {ranks} did not read them within {timeout_s:g} s"
                )

            self._move = _Move(
                layer, placement, RankWork(self._executor, "experts_arrived", timeout_s, too_late)
            )

    def _better_placement(self, layer: int, load: ExpertLoad) -> ExpertPlacement | None:
        """The best placement for the load since the layer was last judged; None if it is not worth a move."""
        old, tokens = self._placements[layer], load.tokens[layer]
        before = self._before.get(layer, (0,) * len(tokens))
        recent = [now - then for now, then in zip(tokens, before, strict=True)]
        self._before[layer] = tokens
        if not sum(recent):
            return None
        new = ExpertPlacement.balanced(recent, self._config.layout.ep, self._config.redundant_experts)
        new = new.keeping_places_of(old)
        if new == old or new.imbalance(recent) > _WORTH_MOVING * old.imbalance(recent):
            return None
        return new

    def _go_on(self, move: _Move, rebalance: _Rebalance) -> None:
        """Makes the ranks switch if all have read their experts, or drop them if one could not."""
        arrived = move.reading.poll()
        if isinstance(arrived, QwenDistError):
            self._move = None
            self._executor.call("drop_experts")
            self._rebalances.popleft().done(arrived)
        elif arrived:
            self._executor.call("move_experts")
            self._move = None
            self._placements[move.layer] = move.placement
            rebalance.changed.append(move.layer)


def _log_failure(answer: Outcome) -> None:
    if isinstance(answer, QwenDistError):
        _log.warning("%s; they stay where they are", answer)
