"""The grammars that all ranks have built, so that no step waits for a grammar."""

from __future__ import annotations

from qwen3_dist.errors import RequestError
from qwen3_dist.launch import Executor
from qwen3_dist.protocol.sampling_setup import SamplingSetup
from qwen3_dist.structured.grammar import KEPT_GRAMMARS


class BuiltGrammars:
    """The grammars that all ranks of `executor` certainly hold."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._built: dict[str, None] = {}  # oldest first

    def has(self, setup: SamplingSetup | None) -> bool:
        """Whether the ranks have the grammar of `setup`, if it has one. May be called from any thread."""
        return setup is None or setup.grammar is None or setup.grammar in self._built

    def build(self, setup: SamplingSetup) -> bool:
        """Makes the ranks build the setup's grammar while steps go on. Returns whether all have it; call it until they
        do.

        Raises RequestError if a rank cannot use the grammar.
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
