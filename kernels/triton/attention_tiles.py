"""Device code of the attention kernels: SeqlenInfo, BlockRange, and loads and stores of tiles.

SeqlenInfo: where the rows and columns of a batch entry begin, and how many there are.
BlockRange: the column blocks that a row block visits, or the row blocks that a column block visits.

The arithmetic on scores is in attention_scores.py. `strides` are those of a (B, H, L, size) tensor over batch, head and
row; the last one is 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

# Arguments that may change from call to call without a new compilation. Triton specializes every integer of a tuple (to
# 1 and to multiples of 16), as it does other arguments: a mask with an odd number of columns has another kernel than a
# mask with 16 n columns, which is loaded in vectors. Arguments are plain tuples, because a NamedTuple takes the host
# about 1 microsecond more.
UNSPECIALIZED = [
    "Lq", "Lk", "left", "right", "split_columns", "splits", "folded_heads", "dropout_threshold",
]  # fmt: skip


# ---- positions ----


@triton.jit
def program_ids(folded_heads):
    """Return (block, blocks, head, heads, batch entry) of this program, in a grid made by `grid_of`."""
    if folded_heads is None:
        return (
            tl.program_id(0),
            tl.num_programs(0),
            tl.program_id(1),
            tl.num_programs(1),
            tl.program_id(2),
        )
    else:
        i = tl.program_id(0)
        return tl.program_id(1), tl.num_programs(1), i % folded_heads, folded_heads, i // folded_heads


class SeqlenInfo(NamedTuple):
    """Rows and columns of a batch entry.

    Attributes:
        q_begin: its first row in the tensors, int64; 0 unless documents are packed.
        k_begin: its first column, likewise.
        Lq: the number of its rows.
        Lk: the number of its columns.
        diagonal: row i is on the diagonal at column i + diagonal.
    """

    q_begin: Any
    k_begin: Any
    Lq: Any
    Lk: Any
    diagonal: Any


@triton.jit
def seqlen_info(cu_seqlens, i_b, Lq, Lk, LOWER_RIGHT: tl.constexpr):
    """Return the SeqlenInfo of batch entry i_b.

    Args:
        cu_seqlens: None, or pointers to cu_seqlens_q and cu_seqlens_k of packed documents.
        Lq: rows of the tensors. `Lk` likewise the columns.
    """
    q_begin = tl.cast(0, tl.int64)
    k_begin = tl.cast(0, tl.int64)
    if cu_seqlens is not None:
        q_begin, Lq = _clamp_document(cu_seqlens[0], i_b, Lq)
        k_begin, Lk = _clamp_document(cu_seqlens[1], i_b, Lk)
    diagonal = 0
    if LOWER_RIGHT:
        diagonal = Lk - Lq
    return SeqlenInfo(q_begin, k_begin, Lq, Lk, diagonal)


@triton.jit
def _clamp_document(p_cu_seqlens, i_b, total):
    """Return the begin and the length of a document, clamped to the tensor whatever cu_seqlens holds."""
    begin = tl.load(p_cu_seqlens + i_b)
    end = tl.load(p_cu_seqlens + i_b + 1)
    tl.device_assert(
        (begin >= 0) & (begin <= end) & (end <= total), "attention_varlen: cu_seqlens out of order"
    )
    begin = tl.minimum(tl.maximum(begin, 0), total)
    end = tl.minimum(tl.maximum(end, begin), total)
    return begin.to(tl.int64), (end - begin).to(tl.int32)


@triton.jit
def first_row(cu_seqlens, o_b, o_h, heads, length, begin):
    """Return the first row of a head in a contiguous (B, heads, length, ...) tensor.

    Packed documents share one such tensor with B = 1.
    """
    if cu_seqlens is not None:
        return o_h * length + begin
    else:
        return (o_b * heads + o_h) * length


class BlockRange(NamedTuple):
    """Blocks along one axis that a block of the other axis visits: the first element and the number of each kind.

    Attributes:
        full_begin: of the full blocks, in which nothing is hidden.
        lower_begin: of the blocks at the lower edge, which need masking.
        upper_begin: of the blocks at the upper edge, which need masking.
    """

    full_begin: Any
    full_count: Any
    lower_begin: Any
    lower_count: Any
    upper_begin: Any
    upper_count: Any


@triton.jit
def block_range(first, last, n, low, high, BLOCK: tl.constexpr, whole=True):
    """Return the BlockRange along an axis of n of the lines first..last of the other axis.

    Line i sees i + low .. i + high; low or high None: no bound. All blocks are edges unless `whole`: the lines are as
    many as a block has.
    """
    begin = 0
    full_begin = 0
    end = n
    full_end = n // BLOCK * BLOCK
    if low is not None:
        begin = tl.maximum(first + low, 0) // BLOCK * BLOCK
        full_begin = (tl.maximum(last + low, 0) + BLOCK - 1) // BLOCK * BLOCK
    if high is not None:
        end = tl.minimum(tl.maximum(last + high + 1, 0), n)
        full_end = tl.minimum(tl.maximum(first + high + 1, 0), n) // BLOCK * BLOCK
    upper_begin = tl.maximum(full_begin, tl.where(whole, full_end, 0))
    full_count = (upper_begin - full_begin) // BLOCK
    lower_count = (tl.maximum(tl.minimum(full_begin, end) - begin, 0) + BLOCK - 1) // BLOCK
    upper_count = (tl.maximum(end - upper_begin, 0) + BLOCK - 1) // BLOCK
    return BlockRange(full_begin, full_count, begin, lower_count, upper_begin, upper_count)


@triton.jit
def block_range_of_rows(seqlen, start_m, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the column blocks that a row block visits: row i sees i + diagonal - left .. i + diagonal + right."""
    low = None
    high = None
    if left is not None:
        low = seqlen.diagonal - left
    if right is not None:
        high = seqlen.diagonal + right
    last_m = tl.minimum(start_m + BLOCK_M, seqlen.Lq) - 1
    return block_range(start_m, last_m, seqlen.Lk, low, high, BLOCK_N)


@triton.jit
def block_range_of_columns(seqlen, start_n, left, right, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Return the row blocks that a column block visits.

    Column j is seen by the rows j - diagonal - right .. j - diagonal + left.
    """
    low = None
    high = None
    if right is not None:
        low = -seqlen.diagonal - right
    if left is not None:
        high = left - seqlen.diagonal
    last_n = tl.minimum(start_n + BLOCK_N, seqlen.Lk) - 1
    whole = start_n + BLOCK_N <= seqlen.Lk  # beyond the last column exp2(0 - lse) may overflow
    return block_range(start_n, last_n, seqlen.Lq, low, high, BLOCK_M, whole)


@triton.jit
def block_range_within(blocks, first, end, BLOCK: tl.constexpr):
    """Return the part of a BlockRange that is in first .. end, a range of whole blocks."""
    full_begin, full_count = _within(blocks.full_begin, blocks.full_count, first, end, BLOCK)
    lower_begin, lower_count = _within(blocks.lower_begin, blocks.lower_count, first, end, BLOCK)
    upper_begin, upper_count = _within(blocks.upper_begin, blocks.upper_count, first, end, BLOCK)
    return BlockRange(full_begin, full_count, lower_begin, lower_count, upper_begin, upper_count)


@triton.jit
def _within(start, count, first, end, BLOCK: tl.constexpr):
    begin = tl.maximum(start, first)
    return begin, tl.maximum(tl.minimum(start + count * BLOCK, end) - begin, 0) // BLOCK


@triton.jit
def block_count(blocks, EDGE: tl.constexpr):
    """Return the number of blocks at the edges (EDGE), or of the full ones."""
    if EDGE:
        return blocks.lower_count + blocks.upper_count
    else:
        return blocks.full_count


@triton.jit
def edge_begin(blocks, i, BLOCK: tl.constexpr):
    """Return the start of block i at the edges."""
    lower = blocks.lower_begin + i * BLOCK
    return tl.where(i < blocks.lower_count, lower, blocks.upper_begin + (i - blocks.lower_count) * BLOCK)


# ---- memory ----


@triton.jit
def head_pointer(p, o_b, o_h, begin, strides, DESCRIPTORS: tl.constexpr):
    """Return a pointer to row `begin` of a head of a (B, H, L, size) tensor; a descriptor stays as it is."""
    if DESCRIPTORS:
        return p
    else:
        return p + o_b * strides[0] + o_h * strides[1] + begin * strides[2]


@triton.jit
def load_rows(
    p_head, i_b, i_h, start, o_row, o_d, strides, n_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Load the rows of a head from `start` on; 0 in rows from n_rows on and columns from D on.  # [ROWS, BLOCK_D]

    Args:
        p_head: from `head_pointer`.
        o_row: 0 .. ROWS - 1.
        EDGE: there may be rows from n_rows on.
    """
    if DESCRIPTORS:
        return tl.reshape(p_head.load([i_b, i_h, start, 0]), (o_row.shape[0], BLOCK_D))
    else:
        p_tile = p_head + tl.cast(start, tl.int64) * strides[2]
        p_block = p_tile + o_row[:, None] * tl.cast(strides[2], tl.int64) + o_d[None, :]
        m_row = o_row[:, None] < n_rows - start
        if EDGE and D < BLOCK_D:
            return tl.load(p_block, mask=m_row & (o_d[None, :] < D), other=0.0)
        elif EDGE:
            return tl.load(p_block, mask=m_row, other=0.0)
        elif D < BLOCK_D:
            return tl.load(p_block, mask=o_d[None, :] < D, other=0.0)
        else:
            return tl.load(p_block)


@triton.jit
def store_rows(p_tile, b, o_row, o_d, strides, n_rows, D: tl.constexpr):
    """Store the rows of a tile below n_rows, rounded to the tensor's dtype."""
    p_block = p_tile + o_row[:, None] * tl.cast(strides[2], tl.int64) + o_d[None, :]
    tl.store(p_block, b.to(p_tile.dtype.element_ty), mask=(o_row[:, None] < n_rows) & (o_d[None, :] < D))


@triton.jit
def add_rows(
    p_head, i_b, i_h, start, b, o_row, o_d, n_rows,
    BLOCK_D: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Add a tile to fp32 rows of BLOCK_D elements in memory, atomically: other programs add to them as well."""
    if DESCRIPTORS:
        p_head.atomic_add([i_b, i_h, start, 0], tl.reshape(b, (1, 1, o_row.shape[0], BLOCK_D)))
    else:
        p_block = p_head + tl.cast(start, tl.int64) * BLOCK_D + (o_row[:, None] * BLOCK_D + o_d[None, :])
        if EDGE:
            tl.atomic_add(p_block, b, mask=o_row[:, None] < n_rows - start, sem="relaxed")
        else:
            tl.atomic_add(p_block, b, sem="relaxed")
