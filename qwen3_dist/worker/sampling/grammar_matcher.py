"""Matches grammars on the rank that samples: masks of the tokens that a grammar allows next.

Legend: V the model's vocab_size, which may be larger than the tokenizer's.
"""

from __future__ import annotations

import importlib.util
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from qwen3_dist.structured.grammar import KEPT_GRAMMARS
from qwen3_dist.structured.grammar_tokenizer import grammar_tokenizer
from qwen3_dist.structured.grammar_trial import parser_limits
from qwen3_dist.text.tokenizer_files import has_tokenizer, tokenizer_json

if TYPE_CHECKING:
    from llguidance import LLMatcher

_log = logging.getLogger(__name__)
_SECONDS_PER_TOKEN = 0.005  # CPU time that masks of one sequence may take per token, on average
_SECONDS_AHEAD = 0.2  # CPU time by which a sequence may exceed that average


class Grammars:
    """Builds grammars over the vocabulary of the checkpoint at `path` and keeps the most recent ones.

    A grammar is built in a thread, in milliseconds. All grammars share a trie of the tokenizer, which takes a second
    to build for 151k tokens and holds the GIL: call `prepare` before steps run.
    """

    def __init__(self, path: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._path = Path(path)
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._builder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        self._tokenizer: Any = None
        self._built: OrderedDict[str, Future[LLMatcher]] = (
            OrderedDict()
        )  # matchers at the start of their grammar

    def prepare(self) -> None:
        """Builds the trie now, if the tokenizer and llguidance exist. Logs a failure; each matcher reports it
        again."""
        if has_tokenizer(self._path) and importlib.util.find_spec("llguidance") is not None:
            problem = self._builder.submit(self._build_tokenizer).exception()
            if problem is not None:
                _log.warning("structured_outputs will fail: %s", problem)

    def build(self, grammar: str) -> Future[LLMatcher]:
        """A matcher at the start of `grammar` (from `compile_grammar`); built in a thread unless it was kept."""
        building = self._built.pop(grammar, None) or self._builder.submit(self._build, grammar)
        self._built[grammar] = building
        if len(self._built) > KEPT_GRAMMARS:
            self._built.popitem(last=False)
        return building

    def problem(self, grammar: str) -> str | None:
        """The reason why `grammar` cannot be used, "" if it can; None while it is being built."""
        building = self.build(grammar)
        return Matcher(building, self._eos_token_ids).problem() if building.done() else None

    def matcher(self, grammar: str) -> Matcher:
        """A new matcher at the start of `grammar`."""
        return Matcher(self.build(grammar), self._eos_token_ids)

    def _build_tokenizer(self) -> None:
        from llguidance import LLTokenizer

        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                grammar_tokenizer(tokenizer_json(self._path)),
                n_vocab=self._vocab_size,
                eos_token=self._eos_token_ids,
            )

    def _build(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher

        self._build_tokenizer()
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=parser_limits())
        matcher.compute_bitmask()  # finds errors of the first mask before a sequence begins
        return matcher


class Matcher:
    """The position of one sequence in its grammar. No method raises; `error` is the reason of a failure.

    After an error only EOS is allowed, as at the grammar's end. The first call waits until the grammar is built. Masks
    that take too long are an error too, since all sequences of a step wait for them.
    """

    def __init__(self, building: Future[LLMatcher], eos_token_ids: Sequence[int]) -> None:
        self._building = building
        self._matcher: LLMatcher | None = None
        self._eos_token_ids = eos_token_ids
        self._ahead_s = 0.0
        self.error: str | None = None

    def fill_mask(self, row: Tensor) -> None:
        """Writes the mask of the next token to `row`, int32 [ceil(V / 32)] on the CPU: bit i % 32 of word i // 32."""
        started = time.thread_time()
        size = row.numel() * row.element_size()
        self._call(lambda matcher: matcher.unsafe_compute_mask_ptr(row.data_ptr(), size))
        self._ahead_s = max(0.0, self._ahead_s + time.thread_time() - started - _SECONDS_PER_TOKEN)
        if self._ahead_s > _SECONDS_AHEAD:
            self.error = "structured_outputs take too long to compute; use a simpler schema or grammar"
        if self.error is not None:
            row.zero_()
            for token_id in self._eos_token_ids:
                bit = 1 << token_id % 32
                row[token_id // 32] |= bit if bit < 1 << 31 else bit - (1 << 32)

    def accept(self, token_id: int) -> None:
        """Advances by the sampled token."""
        self._call(lambda matcher: matcher.consume_token(token_id))

    def problem(self) -> str:
        """The reason why the grammar cannot be followed from here, "" if it can."""
        self._call(lambda matcher: None)
        return self.error or ""

    @property
    def is_finished(self) -> bool:
        """Whether only EOS is allowed next."""
        return bool(self._call(lambda matcher: matcher.is_stopped())) or self.error is not None

    def _call(self, do: Callable[[LLMatcher], Any]) -> Any:
        if self.error is not None:
            return None
        try:
            matcher = self._matcher = self._matcher or self._building.result().deep_copy()
            done = do(matcher)
            if matcher.is_error():
                self.error = str(matcher.get_error()).partition("\n")[0]
            return done
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # noqa: BLE001 - the library's panics are no Exception
            self.error = f"structured_outputs could not be followed ({error})"
            return None
