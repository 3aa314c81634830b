"""How many rows are processed at once by operations that need much memory per row."""

from __future__ import annotations

SORTED_ROWS = 32  # rows of logits that are sorted at once
# Pairs of a row and one of its experts that are computed at once. Spread over 128 experts these are 256 rows for each
# expert, enough for a product to be limited by arithmetic and not by reading weights.
SLICE_PAIRS = 32768


def rows_of_slice(choices: int, groups: int = 1) -> int:
    """Rows of each of `groups` dp groups that are computed at once, with `choices` experts per row."""
    return max(1, SLICE_PAIRS // (choices * groups))
