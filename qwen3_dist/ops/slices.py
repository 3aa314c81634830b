"""How many rows are worked on at once where each takes much memory."""

from __future__ import annotations

SORTED_ROWS = 32  # of logits that are sorted at once
# Pairs of a row and one of its experts that are computed at once. Spread over all of 128 experts they are 256 rows for
# each, for which a product is bound by arithmetic rather than by reading weights, whatever part of them is here.
SLICE_PAIRS = 32768


def rows_of_slice(choices: int, groups: int = 1) -> int:
    """Rows of each of `groups` dp groups whose pairs with `choices` experts each are computed at once."""
    return max(1, SLICE_PAIRS // (choices * groups))
