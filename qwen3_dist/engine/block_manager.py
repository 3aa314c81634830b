"""Which KV-cache blocks are free and who holds the others. Counts only: it never touches memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from qwen3_dist.engine.sequence import Sequence


class BlockManager:
    """Hands out `num_blocks` blocks of `block_size` tokens, the same ones on every rank of a dp group."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free = deque(range(num_blocks))

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def blocks_needed(self, sequence: Sequence, num_new: int) -> int:
        """Blocks that `sequence` still lacks to compute its next `num_new` tokens."""
        tokens = sequence.num_computed + num_new
        return max(0, -(-tokens // self.block_size) - len(sequence.block_table))

    def reserve(self, sequence: Sequence, num_new: int) -> bool:
        """Gives `sequence` room for its next `num_new` tokens; False, changing nothing, if there is none."""
        needed = self.blocks_needed(sequence, num_new)
        if needed > len(self._free):
            return False
        sequence.block_table.extend(self._free.popleft() for _ in range(needed))
        return True

    def release(self, sequence: Sequence) -> None:
        """Takes back all blocks of `sequence`."""
        self._free.extend(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_computed = 0

    def check_integrity(self, holders: Iterable[Sequence]) -> None:
        """Asserts that every block is either free or held by exactly one of `holders`."""
        held = [block for sequence in holders for block in sequence.block_table]
        everything = sorted([*held, *self._free])
        assert everything == list(range(self.num_blocks)), "blocks leaked or are shared wrongly"
