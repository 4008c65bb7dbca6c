"""Device code of the attention kernels: from products q.k to probabilities.

Mask: the window, the lengths, a mask tensor and ALiBi, applied to scores.
online_softmax: the maximum and the sum of each row, over one tile after another.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import LOG2E, tanh

# ---- scale ----


@triton.jit
def deferred_scale(scale, softcap, DEFER_SCALE: tl.constexpr):
    """Return the factor that `scale_scores` leaves to the exponent; 1 unless DEFER_SCALE."""
    if not DEFER_SCALE:
        return tl.cast(1.0, tl.float32)
    elif softcap is not None:
        return tl.cast(softcap, tl.float32)
    else:
        return tl.cast(scale, tl.float32)


@triton.jit
def scale_scores(b_s, scale, softcap, DEFER_SCALE: tl.constexpr):
    """Turn products q.k into scores divided by `deferred_scale`, and return the derivative of the softcap, too.

    Args:
        softcap: None for none; the derivative is then not defined.
        DEFER_SCALE: leave out the last factor; nothing may be added to the scores.
    """
    b_softcap_grad = b_s
    if softcap is not None:
        b_t = tanh(b_s * (scale / softcap))
        b_softcap_grad = 1.0 - b_t * b_t
        b_s = b_t
    if not DEFER_SCALE:
        b_s *= softcap if softcap is not None else scale
    return b_s, b_softcap_grad


# ---- Mask ----


class Mask(NamedTuple):
    """The parameters that hide or shift scores of a head. Kernels make it: a function cannot return None in Triton 3.6.

    Attributes:
        tensor: from `mask_of_head`, or None.
        alibi_slope: from `alibi_slope_of_head`, or None.
        left: columns that a row sees before its diagonal; None for all. `right` likewise after it.
    """

    tensor: Any
    alibi_slope: Any
    left: Any
    right: Any


@triton.jit
def mask_of_head(attn_mask, o_b, o_h):
    """Return a pointer to a head's matrix of the mask tensor, and its strides over rows and columns.

    Args:
        attn_mask: a pointer to (B, H, Lq, Lk), bool or floating-point, and its four strides.
    """
    p_mask, s_b, s_h, s_row, s_column = attn_mask
    return p_mask + (o_b * s_b + o_h * s_h), s_row, s_column


@triton.jit
def alibi_slope_of_head(alibi_slopes, o_b, o_h):
    """Load the slope of a head.

    Args:
        alibi_slopes: a pointer to (B, H), fp32, and its two strides.
    """
    p_slopes, s_b, s_h = alibi_slopes
    return tl.load(p_slopes + o_b * s_b + o_h * s_h)


@triton.jit
def apply_mask(b_s, o_m, o_n, mask, seqlen, EDGE: tl.constexpr):
    """Subtract ALiBi's distances, add the mask tensor, and set hidden scores to -inf.

    Args:
        o_m: rows; o_m and o_n broadcast to b_s, which may have rows or columns first.
        EDGE: hide what is outside the window and beyond the last column, too.
    """
    if mask.alibi_slope is not None:
        b_s -= mask.alibi_slope * tl.abs(o_m + seqlen.diagonal - o_n).to(tl.float32)
    if mask.tensor is not None:
        p_mask, s_row, s_column = mask.tensor
        p_block = p_mask + o_m.to(tl.int64) * s_row + o_n.to(tl.int64) * s_column
        m = (o_m < seqlen.Lq) & (o_n < seqlen.Lk)
        if p_mask.dtype.element_ty.is_floating():
            b_s += tl.load(p_block, mask=m, other=0.0).to(tl.float32)
        else:
            b_s = tl.where(tl.load(p_block, mask=m, other=0) != 0, b_s, float("-inf"))
    if EDGE:
        m = o_n < seqlen.Lk
        if mask.left is not None:
            m = m & (o_n >= o_m + (seqlen.diagonal - mask.left))
        if mask.right is not None:
            m = m & (o_n <= o_m + (seqlen.diagonal + mask.right))
        b_s = tl.where(m, b_s, float("-inf"))
    return b_s


@triton.jit
def apply_window_by_columns(b_s, o_row, o_n, start_m, mask, seqlen, ROWS: tl.constexpr):
    """Set scores outside the window and beyond the last column to -inf, in a tile [columns, rows].

    The first and last row of each column are compared, not the columns of each row: two numbers a thread and not
    sixteen.

    Args:
        o_row: 0 .. ROWS - 1.
        start_m: the tile's first row.
    """
    diagonal = seqlen.diagonal + start_m  # of the first row
    first = o_n * 0
    if mask.right is not None:
        first = o_n - (diagonal + mask.right)
    m = o_row[None, :] >= tl.where(o_n < seqlen.Lk, first, ROWS)[:, None]
    if mask.left is not None:
        m = m & (o_row[None, :] <= (o_n - (diagonal - mask.left))[:, None])
    return tl.where(m, b_s, float("-inf"))


# ---- online softmax ----


@triton.jit
def online_softmax_rescale(b_s, b_row_max, b_row_sum, scale):
    """Add a tile of scores [M, N] to the maximum and the sum of each row.

    Args:
        scale: `deferred_scale`.

    Returns:
        exp(s - row_max), the factor of what was summed before, row_max and row_sum.
    """
    b_new = tl.maximum(b_row_max, tl.max(b_s, 1))  # [M]
    b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf would be NaN
    b_p = tl.exp2((b_s - b_safe[:, None]) * (scale * LOG2E))  # [M, N]
    b_rescale = tl.exp2((b_row_max - b_safe) * (scale * LOG2E))
    return b_p, b_rescale, b_new, b_row_sum * b_rescale + tl.sum(b_p, 1)


@triton.jit
def online_softmax_finish(b_row_max, b_row_sum, scale):
    """Return the divisor of the output, m and l; a row that sees no column has 1, -inf and 0."""
    b_divisor = tl.where(b_row_sum == 0.0, 1.0, b_row_sum)
    b_m = b_row_max * scale
    b_l = tl.where(b_row_sum == 0.0, 0.0, tl.fma(b_row_max, scale, -b_m) + tl.log(b_divisor))
    return b_divisor, b_m, b_l


@triton.jit
def online_softmax_merge(b_m, b_l):
    """Merge m and l of the parts of a row, [PARTS]; a part that sees no column has -inf and 0.

    Returns:
        row_m = max m, row_rest = max (m - row_m + l) and the sum of exp(m - row_m + l - row_rest) over the parts, by
        which these exponentials are divided to give the parts' weights. -inf is returned as 0 and the sum 0 as 1.
    """
    row_m = tl.max(b_m, 0)
    row_m = tl.where(row_m == float("-inf"), 0.0, row_m)
    b_rest = (b_m - row_m) + b_l
    row_rest = tl.max(b_rest, 0)
    row_rest = tl.where(row_rest == float("-inf"), 0.0, row_rest)
    row_sum = tl.sum(tl.exp2((b_rest - row_rest) * LOG2E), 0)
    return row_m, row_rest, tl.where(row_sum == 0.0, 1.0, row_sum)
