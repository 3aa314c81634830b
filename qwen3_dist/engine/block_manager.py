"""The block manager knows which KV-cache blocks are free, who holds the others, and which prefixes are cached.

Automatic prefix caching: a full block is indexed by a hash of its tokens and of all tokens before it. A free block
keeps its contents and its index entry until it is reused; the least recently used block is reused first. A block is
indexed as soon as the step that fills it is planned: ranks run steps in order, and within a step every layer writes
all keys and values before it reads any.

The block manager only counts. It never touches memory and imports no torch.
"""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable
from hashlib import blake2b

from qwen3_dist.engine.sequence import Sequence

_FORMER = b"of former weights"  # in the salt of sequences that keep their KV


class BlockManager:
    """Allocates `num_blocks` blocks of `block_size` tokens. Block ids are the same on every rank of a dp group."""

    def __init__(self, num_blocks: int, block_size: int, prefix_caching: bool = True) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._prefix_caching = prefix_caching
        self._holders = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        # Free blocks: those without contents, of which the last is used next, and then the cached ones from the first.
        self._empty = list(range(num_blocks - 1, -1, -1))
        self._cached = OrderedDict[int, None]()
        self._resting: dict[int, int] = {}  # blocks that become free once this step is settled
        self.num_cached = 0
        """Free blocks whose contents can still be found."""

    @property
    def num_free(self) -> int:
        """Blocks that no sequence holds, cached ones included."""
        return self._num_ready + len(self._resting)

    @property
    def _num_ready(self) -> int:
        """Blocks that a sequence can be given now."""
        return len(self._empty) + len(self._cached)

    @property
    def capacity_tokens(self) -> int:
        return self.num_blocks * self.block_size

    def admit(self, sequence: Sequence, keep_free: int) -> bool:
        """Gives a new sequence the cached blocks of its prefix, leaving at least one token to compute.

        Returns False and changes nothing unless the rest of its tokens fits too and leaves `keep_free` blocks.
        """
        cached = self._find_prefix(sequence)
        revived = sum(block in self._cached for block in cached)
        fresh = -(-len(sequence.token_ids) // self.block_size) - len(cached)
        if revived + fresh + keep_free > self._num_ready:
            return False
        for block in cached:
            self._share(block)
        sequence.block_table = cached
        sequence.num_registered = len(cached)
        sequence.num_computed = len(cached) * self.block_size
        return True

    def cached_tokens(self, sequence: Sequence) -> int:
        """Tokens of a sequence's prefix that `admit` would find."""
        return len(self._find_prefix(sequence)) * self.block_size

    def reserve(self, sequence: Sequence, num_new: int) -> bool:
        """Allocates blocks for the next `num_new` tokens; returns False and changes nothing if too few are free."""
        tokens = sequence.num_computed + num_new
        needed = -(-tokens // self.block_size) - len(sequence.block_table)
        if needed > self._num_ready:
            return False
        for _ in range(needed):
            block = self._empty.pop() if self._empty else self._forget_oldest()
            self._holders[block] = 1
            sequence.block_table.append(block)
        return True

    def register(self, sequence: Sequence) -> None:
        """Adds the blocks that planned steps fill with known tokens to the prefix cache's index."""
        if not self._prefix_caching:
            return
        full = min(sequence.num_computed, len(sequence.token_ids)) // self.block_size
        if full <= sequence.num_registered:
            return
        self._extend_hashes(sequence, full)
        for index in range(sequence.num_registered, full):
            digest, block = sequence.block_hashes[index], sequence.block_table[index]
            if digest not in self._block_of:
                self._block_of[digest] = block
                self._hash_of[block] = digest
        sequence.num_registered = full

    def release(self, sequence: Sequence, rest_until: int = 0) -> None:
        """Frees all blocks of `sequence`. The last blocks of a prefix are reused before the first ones.

        With `rest_until` the blocks become free only when that step is settled, since it may have to be run again.
        """
        for block in reversed(sequence.block_table):
            self._holders[block] -= 1
            if self._holders[block]:
                continue
            self.num_cached += self._hash_of[block] is not None
            if rest_until:
                self._resting[block] = rest_until
            else:
                self._set_free(block)
        sequence.block_table = []
        sequence.num_sent_blocks = 0
        sequence.num_registered = 0
        sequence.num_computed = 0

    def settle(self, step: int) -> None:
        """Frees the blocks that wait for `step` or an earlier one."""
        if self._resting:
            for block in [block for block, until in self._resting.items() if until <= step]:
                del self._resting[block]
                self._set_free(block)

    def forget_contents(self, running: Iterable[Sequence]) -> None:
        """Empties the index: nobody finds what blocks hold now, nor what `running` sequences add to theirs."""
        self._empty += reversed(self._cached)
        self._cached.clear()
        self._block_of.clear()
        self._hash_of = [None] * self.num_blocks
        self.num_cached = 0
        for sequence in running:
            sequence.cache_salt += _FORMER
            sequence.block_hashes.clear()

    def check_integrity(self, sequences: Iterable[Sequence]) -> None:
        """Asserts that each block is free or held by exactly the `sequences` that list it, and that every
        block in the index is found under the hash of the tokens that its holders have there."""
        sequences = list(sequences)
        held = Counter(block for sequence in sequences for block in sequence.block_table)
        empty = set(self._empty)
        assert len(empty) == len(self._empty) and all(self._hash_of[block] is None for block in empty)
        for block in range(self.num_blocks):
            assert self._holders[block] == held[block], f"block {block} is leaked or shared wrongly"
            unheld = (block in empty) + (block in self._cached) + (block in self._resting)
            assert unheld == (held[block] == 0), f"block {block} is both free and held"
        indexed = {block: digest for block, digest in enumerate(self._hash_of) if digest is not None}
        assert {digest: block for block, digest in indexed.items()} == self._block_of
        assert self.num_cached == sum(held[block] == 0 for block in indexed)
        for sequence in sequences:
            known = min(len(sequence.block_table), len(sequence.token_ids) // self.block_size)
            self._extend_hashes(sequence, known)
            for block, digest in zip(sequence.block_table, sequence.block_hashes, strict=False):
                assert indexed.get(block, digest) == digest, f"block {block} is indexed under other tokens"

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        if not self._prefix_caching:
            return []
        most = min(len(sequence.token_ids) - 1, sequence.num_cacheable) // self.block_size
        found: list[int] = []
        for index in range(most):
            self._extend_hashes(sequence, index + 1)
            block = self._block_of.get(sequence.block_hashes[index])
            if block is None:
                break
            found.append(block)
        return found

    def _extend_hashes(self, sequence: Sequence, count: int) -> None:
        """Hashes the first `count` blocks of a sequence. A hash covers the cache salt and all tokens so far."""
        hashes, size = sequence.block_hashes, self.block_size
        for index in range(len(hashes), count):
            tokens = array("q", sequence.token_ids[index * size : (index + 1) * size])
            before = hashes[-1] if hashes else sequence.cache_salt
            hashes.append(blake2b(before + tokens.tobytes(), digest_size=16).digest())

    def _share(self, block: int) -> None:
        """Adds a holder to a block of a prefix, which may be free."""
        if self._holders[block] == 0:
            if self._resting.pop(block, None) is None:
                del self._cached[block]
            self.num_cached -= 1
        self._holders[block] += 1

    def _set_free(self, block: int) -> None:
        if self._hash_of[block] is None:
            self._empty.append(block)
        else:
            self._cached[block] = None

    def _forget_oldest(self) -> int:
        """The cached block that has been free for longest, without its contents."""
        block, _ = self._cached.popitem(last=False)
        digest = self._hash_of[block]
        assert digest is not None
        del self._block_of[digest]
        self._hash_of[block] = None
        self.num_cached -= 1
        return block
