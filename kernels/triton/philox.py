"""The dropout mask, the same in every backend: a pure function of (seed, batch, head, row, column).

Philox 4x32-10 (Salmon et al., 2011) with the key (low, high 32 bits of the seed) and the counter
(column // 4, row, head, batch). The four words of one call serve four neighbouring columns: column j is kept
if word j % 4 is at least min(round(p * 2^32), 2^32 - 1), as unsigned numbers.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def keep_tile(seed, threshold, i_batch, i_head, o_row, start_col, COLS: tl.constexpr):
    """Return which elements dropout keeps: [ROWS, COLS], bool.

    Args:
        seed: int64 scalar.
        threshold: from `dropout_threshold`.
        o_row: int32 [ROWS].
        start_col: the tile's first column, a multiple of 4.
    """
    o_quad = start_col // 4 + tl.arange(0, COLS // 4)
    b_0, b_1, b_2, b_3 = tl.philox(seed, o_quad[None, :], o_row[:, None], i_head, i_batch)
    # Each join appends a dimension of size 2, so that [..., i, k] is word 2i + k.
    b_word = tl.join(tl.join(b_0, b_2), tl.join(b_1, b_3))  # [ROWS, COLS // 4, 2, 2]
    return tl.reshape(b_word, (o_row.shape[0], COLS)) >= tl.cast(threshold, tl.uint32)


def dropout_threshold(dropout_p: float) -> int:
    """Return the bound below which a 32-bit word is dropped, both unsigned.

    The bound is returned as a signed number, which is a 32-bit kernel argument for every dropout_p.
    """
    threshold = min(round(dropout_p * 2**32), 2**32 - 1)
    return threshold - 2**32 if threshold >= 2**31 else threshold


def dropout_scale(dropout_p: float) -> float:
    """Return the factor of the probabilities that dropout keeps."""
    return 1.0 / (1.0 - dropout_p) if dropout_p < 1.0 else 0.0
