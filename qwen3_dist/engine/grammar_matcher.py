"""Which tokens a grammar allows next: what a rank that samples keeps for each sequence with a grammar.

Legend: V the model's vocab_size, which may be padded past the tokenizer's.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from llguidance import LLMatcher


class Grammars:
    """Makes matchers over the vocabulary of the checkpoint at `path`.

    The tokenizer's trie takes half a second to build for 151k tokens, so that and everything else
    happens in a thread: neither constructor nor `matcher` waits.
    """

    def __init__(self, path: str | Path, vocab_size: int, eos_token_ids: Sequence[int]) -> None:
        self._file = Path(path) / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_token_ids = list(eos_token_ids)
        self._builder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammars")
        self._tokenizer: Any = None

    def matcher(self, grammar: str) -> Matcher:
        """Follows `grammar`, which `compile_grammar` made, from its start."""
        return Matcher(self._builder.submit(self._build, grammar), self._eos_token_ids)

    def _build(self, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLTokenizer

        if self._tokenizer is None:
            self._tokenizer = LLTokenizer(
                str(self._file), n_vocab=self._vocab_size, eos_token=self._eos_token_ids
            )
        return LLMatcher(self._tokenizer, grammar, log_level=0)


class Matcher:
    """One sequence's place in its grammar. No method raises: what went wrong is in `error`.

    After an error, as at the grammar's end, EOS alone is allowed. The first call waits until the matcher is built.
    """

    def __init__(self, building: Future[LLMatcher], eos_token_ids: Sequence[int]) -> None:
        self._building = building
        self._eos_token_ids = eos_token_ids
        self.error: str | None = None

    def fill_mask(self, row: Tensor) -> None:
        """Writes the tokens allowed next to `row`, int32 [ceil(V / 32)] on the CPU: bit i % 32 of number i // 32."""
        matcher = self._matcher()
        if matcher is not None:
            matcher.unsafe_compute_mask_ptr(row.data_ptr(), row.numel() * row.element_size())
            self._note(matcher)
        if self.error is not None:
            row.zero_()
            for token_id in self._eos_token_ids:
                bit = 1 << token_id % 32
                row[token_id // 32] |= bit if bit < 1 << 31 else bit - (1 << 32)

    def accept(self, token_id: int) -> None:
        """Steps over the token that was chosen."""
        matcher = self._matcher()
        if matcher is not None and self.error is None:
            matcher.consume_token(token_id)
            self._note(matcher)

    @property
    def is_finished(self) -> bool:
        """Whether nothing but EOS can follow."""
        matcher = self._matcher()
        return matcher is None or bool(matcher.is_stopped())

    def _matcher(self) -> LLMatcher | None:
        try:
            return self._building.result()
        except Exception as error:  # noqa: BLE001 - whatever it was, it must end this sequence alone
            self.error = f"the grammar could not be used ({error})"
            return None

    def _note(self, matcher: LLMatcher) -> None:
        if matcher.is_error():
            self.error = str(matcher.get_error()).partition("\n")[0]
