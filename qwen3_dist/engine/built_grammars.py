"""Which grammars all ranks have built, so that a sequence that needs one holds up no step."""

from __future__ import annotations

from qwen3_dist.errors import RequestError
from qwen3_dist.launch import Executor
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.structured.grammar import KEPT_GRAMMARS


class BuiltGrammars:
    """The grammars that the ranks of `executor` surely keep."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._built: dict[str, None] = {}  # the oldest first

    def has(self, setup: SamplingSetup | None) -> bool:
        """Whether ranks have the setup's grammar, if it has one; from any thread."""
        return setup is None or setup.grammar is None or setup.grammar in self._built

    def build(self, setup: SamplingSetup) -> bool:
        """Has ranks build the setup's grammar beside the steps; whether they have it. Ask until they have.

        Raises RequestError if a rank cannot follow it.
        """
        assert setup.grammar is not None
        problems = self._executor.call("build_grammar", setup.grammar, setup.eos_token_ids)
        if problem := next(filter(None, problems), None):
            raise RequestError(problem, param="structured_outputs")
        if None in problems:
            return False
        self._built[setup.grammar] = None
        if len(self._built) > KEPT_GRAMMARS // 2:  # ranks keep twice as many
            del self._built[next(iter(self._built))]
        return True
