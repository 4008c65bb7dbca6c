"""What the attention kernels share: tile loads, which tiles are visited, the scores of a tile, and arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels.common import capability, is_tf32, next_power_of_2, tanh
from fastgpt.kernels.philox import dropout_scale, dropout_threshold

# What may change from call to call and compiles nothing again. Of tuples Triton specializes every number: a mask of an
# odd number of columns is another kernel than one of 16 n, which is loaded in vectors.
UNSPECIALIZED = ["Lq", "Lk", "left", "right", "columns", "splits", "heads", "threshold"]
# Multiply-adds of q k^T from which on tensor descriptors are made. On the host each takes some microseconds, three in
# the forward and five in the backward; on the device they save about a tenth of attention's time. Below this limit,
# which is 3,000 tokens of GPT-2 124M in rows of 1,024, the host is the slower one. Estimates: no GPU has measured them.
LEAST_DESCRIBED = 2**31
MOST = 65_535  # programs along the second and third axis of a grid


@triton.jit
def program(heads):
    """(tile, tiles, head, heads, batch entry) of this program, in a grid made by `grid_of`."""
    if heads is None:
        return tl.program_id(0), tl.num_programs(0), tl.program_id(1), tl.num_programs(1), tl.program_id(2)
    else:
        i = tl.program_id(0)
        return tl.program_id(1), tl.num_programs(1), i % heads, heads, i // heads


def grid_of(tiles: int, heads: int, batch: int) -> tuple[tuple[int, ...], int | None]:
    """The grid, and the kernel's argument `heads`: None, or where an axis would be too long, by how many heads x batch
    are folded into the first axis, which may have 2**31 - 1 programs. Tiles of a head are neighbours else.
    """
    if heads <= MOST and batch <= MOST:
        return (tiles, heads, batch), None
    return (heads * batch, tiles), heads


@triton.jit
def first_line(documents, o_b, o_h, heads, length, begin):
    """Of a contiguous (B, heads, length, ...) tensor, that all documents share, the first row of a head."""
    if documents is not None:
        return o_h * length + begin
    else:
        return (o_b * heads + o_h) * length


@triton.jit
def _document(p_cu, i_b, total):
    """Where a document begins and how long it is; whatever the bounds say, it lies within the tensor."""
    begin = tl.load(p_cu + i_b)
    end = tl.load(p_cu + i_b + 1)
    tl.device_assert(
        (begin >= 0) & (begin <= end) & (end <= total), "attention_varlen: documents out of order"
    )
    begin = tl.minimum(tl.maximum(begin, 0), total)
    end = tl.minimum(tl.maximum(end, begin), total)
    return begin.to(tl.int64), (end - begin).to(tl.int32)


@triton.jit
def place(documents, i_b, Lq, Lk, LOWER_RIGHT: tl.constexpr):
    """(first row, first column, Lq, Lk, offset) of batch entry i_b: of packed documents each has its own.

    documents: None, or pointers to the bounds of their rows and of their columns.
    """
    begin_q = tl.cast(0, tl.int64)
    begin_k = tl.cast(0, tl.int64)
    if documents is not None:
        begin_q, Lq = _document(documents[0], i_b, Lq)
        begin_k, Lk = _document(documents[1], i_b, Lk)
    offset = 0
    if LOWER_RIGHT:
        offset = Lk - Lq
    return begin_q, begin_k, Lq, Lk, offset


@triton.jit
def head(p, o_b, o_h, begin, s_b, s_h, s_row, DESCRIPTORS: tl.constexpr):
    """Of a (B, H, L, size) tensor the first row of a head's matrix; a descriptor finds it by itself."""
    if DESCRIPTORS:
        return p
    else:
        return p + o_b * s_b + o_h * s_h + begin * s_row


@triton.jit
def load_rows(
    p_head, i_b, i_h, start, o_row, o_d, stride, n_rows,
    D: tl.constexpr, BLOCK_D: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Rows of a head's matrix from start on, those below n_rows; zeros elsewhere.  # [ROWS, BLOCK_D]"""
    if DESCRIPTORS:
        return tl.reshape(p_head.load([i_b, i_h, start, 0]), (o_row.shape[0], BLOCK_D))
    else:
        p_tile = p_head + tl.cast(start, tl.int64) * stride
        p_block = p_tile + o_row[:, None] * tl.cast(stride, tl.int64) + o_d[None, :]
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
def store_rows(p_tile, b, o_row, o_d, stride, n_rows, D: tl.constexpr):
    p_block = p_tile + o_row[:, None] * tl.cast(stride, tl.int64) + o_d[None, :]
    tl.store(p_block, b.to(p_tile.dtype.element_ty), mask=(o_row[:, None] < n_rows) & (o_d[None, :] < D))


@triton.jit
def add_rows(
    p_head, i_b, i_h, start, b, o_row, o_d, n_rows,
    BLOCK_D: tl.constexpr, EDGE: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """Adds to rows of BLOCK_D fp32 numbers, to which other programs add as well."""
    if DESCRIPTORS:
        p_head.atomic_add([i_b, i_h, start, 0], tl.reshape(b, (1, 1, o_row.shape[0], BLOCK_D)))
    else:
        p_block = p_head + tl.cast(start, tl.int64) * BLOCK_D + (o_row[:, None] * BLOCK_D + o_d[None, :])
        if EDGE:
            tl.atomic_add(p_block, b, mask=o_row[:, None] < n_rows - start, sem="relaxed")
        else:
            tl.atomic_add(p_block, b, sem="relaxed")


@triton.jit
def visited_tiles(
    first, last, n, low, high, BLOCK: tl.constexpr, HAS_LOW: tl.constexpr, HAS_HIGH: tl.constexpr, whole=True
):
    """The tiles along an axis of n that lines first..last of the other see; line i sees i + low .. i + high.

    Returns (start, count) of the tiles that every line sees whole, then (start, count, start, count) of the
    edges before and behind them. All are edges where the lines are not a whole tile.
    """
    begin = 0
    full_begin = 0
    end = n
    full_end = n // BLOCK * BLOCK
    if HAS_LOW:
        begin = tl.maximum(first + low, 0) // BLOCK * BLOCK
        full_begin = (tl.maximum(last + low, 0) + BLOCK - 1) // BLOCK * BLOCK
    if HAS_HIGH:
        end = tl.minimum(tl.maximum(last + high + 1, 0), n)
        full_end = tl.minimum(tl.maximum(first + high + 1, 0), n) // BLOCK * BLOCK
    behind = tl.maximum(full_begin, tl.where(whole, full_end, 0))
    full_count = (behind - full_begin) // BLOCK
    before_count = (tl.maximum(tl.minimum(full_begin, end) - begin, 0) + BLOCK - 1) // BLOCK
    behind_count = (tl.maximum(end - behind, 0) + BLOCK - 1) // BLOCK
    return full_begin, full_count, begin, before_count, behind, behind_count


@triton.jit
def unit_of(scale, softcap, SOFTCAP: tl.constexpr, RAW: tl.constexpr):
    """What `scores` leaves has to be multiplied by this. RAW: a single product, with nothing added to it."""
    if not RAW:
        return tl.cast(1.0, tl.float32)
    elif SOFTCAP:
        return tl.cast(softcap, tl.float32)
    else:
        return tl.cast(scale, tl.float32)


@triton.jit
def scores(
    b_s,
    o_m,
    o_n,
    p_mask,
    stride_mm,
    stride_mn,
    slope,
    Lq,
    Lk,
    offset,
    left,
    right,
    scale,
    softcap,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    RAW: tl.constexpr,
    EDGE: tl.constexpr,
):
    """From products q.k to scores in units of `unit_of`, -inf where nothing is seen.

    Also returns the softcap's derivative. o_m and o_n broadcast to b_s, whichever way round it is.
    """
    b_cap_slope = b_s
    if SOFTCAP:
        b_t = tanh(b_s * (scale / softcap))
        b_cap_slope = 1.0 - b_t * b_t
        b_s = b_t
    if not RAW:
        b_s *= softcap if SOFTCAP else scale
    if slope is not None:
        b_s -= slope * tl.abs(o_m + offset - o_n).to(tl.float32)
    if p_mask is not None:
        p_block = p_mask + o_m.to(tl.int64) * stride_mm + o_n.to(tl.int64) * stride_mn
        m = (o_m < Lq) & (o_n < Lk)
        if p_mask.dtype.element_ty.is_floating():
            b_s += tl.load(p_block, mask=m, other=0.0).to(tl.float32)
        else:
            b_s = tl.where(tl.load(p_block, mask=m, other=0) != 0, b_s, float("-inf"))
    if EDGE:
        m = o_n < Lk
        if HAS_LEFT:
            m = m & (o_n >= o_m + (offset - left))
        if HAS_RIGHT:
            m = m & (o_n <= o_m + (offset + right))
        b_s = tl.where(m, b_s, float("-inf"))
    return b_s, b_cap_slope


def constants(
    q: Tensor, k: Tensor, v: Tensor, lower_right: bool, left: int, right: int, softcap: float
) -> dict[str, int | bool | str]:
    """The compile-time arguments that every kernel takes."""
    group = q.shape[1] // max(k.shape[1], 1)
    sizes = group, q.shape[-1], v.shape[-1]
    return _constants(*sizes, lower_right, left >= 0, right >= 0, softcap != 0.0, is_tf32(q))


@functools.cache
def _constants(
    group: int, D: int, DV: int, lower_right: bool, has_left: bool, has_right: bool, softcap: bool, tf32: bool
) -> dict[str, int | bool | str]:
    return {
        "GROUP": group,
        "LOWER_RIGHT": lower_right,
        "D": D,
        "DV": DV,
        "BLOCK_D": max(16, next_power_of_2(D)),  # tl.dot's least
        "BLOCK_DV": max(16, next_power_of_2(DV)),
        "HAS_LEFT": has_left,
        "HAS_RIGHT": has_right,
        "SOFTCAP": softcap,
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def describable(documents: Documents | None, *tensors: Tensor) -> bool:
    """Whether the kernels get tensor descriptors, by which a unit for it copies tiles (TMA, sm_90 and 100) without a
    thread's instruction for an address; what lies past the end of a dimension comes as 0.

    Not of documents: past the end of one lies the next one, which may hold NaN. Not of small problems.

    Args:
        tensors: q, k and others of their shapes.
    """
    if documents is not None:
        return False
    device = capability(tensors[0])
    if device is None:
        if not hasattr(InterpreterBuilder, "create_descriptor_reduce"):  # which add_rows needs
            return False
    elif device[0] not in (9, 10) or tensors[0].numel() * tensors[1].shape[2] < LEAST_DESCRIBED:
        return False
    return all(map(_describable, tensors))


def describe(by_descriptors: bool, *tiles: tuple[Tensor, int]) -> tuple[Tensor | TensorDescriptor, ...]:
    """Of (B, H, L, size) tensors in tiles of so many rows of a head; else the tensors themselves."""
    if not by_descriptors:
        return tuple(x for x, _ in tiles)
    blocks = ([1, 1, rows, max(16, next_power_of_2(x.shape[3]))] for x, rows in tiles)
    return tuple(
        TensorDescriptor(x, [*x.shape], [*x.stride()], block)
        for (x, _), block in zip(tiles, blocks, strict=True)
    )


def _describable(x: Tensor) -> bool:
    """16-bit elements (fp32 operands come from registers), and lines and heads that begin at multiples of 16 bytes."""
    return (
        x.element_size() == 2
        and x.shape[3] <= 128  # of 256, the backward spills by descriptors and does not by pointers
        and x.data_ptr() % 16 == 0
        and x.stride(3) == 1
        and all(n > 0 for n in x.shape)
        and all(s > 0 and s % 8 == 0 for s in x.stride()[:3])
    )


@dataclass(frozen=True)
class Documents:
    """Packed documents as a batch: entry n is the rows cu_seqlens_q[n] .. cu_seqlens_q[n + 1]."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def views(self, *tensors: Tensor) -> Iterator[Tensor]:
        """(total, heads, size) as (documents, heads, total, size): every entry is all of the memory, in which a kernel
        goes to its document's rows."""
        for x in tensors:
            yield self.share(x.transpose(0, 1))

    def share(self, x: Tensor) -> Tensor:
        """(heads, total, size) as (documents, heads, total, size)."""
        return x.expand(self.cu_seqlens_q.shape[0] - 1, *x.shape)


def longest(q: Tensor, k: Tensor, documents: Documents | None) -> tuple[int, int]:
    """The most rows and columns that a batch entry has."""
    if documents is None:
        return q.shape[2], k.shape[2]
    return min(documents.max_seqlen_q, q.shape[2]), min(documents.max_seqlen_k, k.shape[2])


def bounds(documents: Documents | None) -> tuple[Tensor, Tensor] | None:
    return None if documents is None else (documents.cu_seqlens_q, documents.cu_seqlens_k)


def sizes(q: Tensor, k: Tensor, left: int, right: int) -> tuple[int, int, int, int]:
    """SIZES; a bound beyond every column is cut to one, so that sums stay within int32."""
    Lq, Lk = q.shape[2], k.shape[2]
    return Lq, Lk, min(left, Lq + Lk), min(right, Lq + Lk)


def extras(
    attn_mask: Tensor | None, slopes: Tensor | None, seed: Tensor | None, dropout_p: float
) -> tuple[Any, ...]:
    """The arguments mask, slopes, dropout: a tensor with its numbers, or None, which costs a launch little; threshold.

    Slopes of shape (H,) serve every batch entry.
    """
    mask = None if attn_mask is None else (attn_mask, *attn_mask.stride())
    by_head = (
        None if slopes is None else (slopes, 0 if slopes.dim() == 1 else slopes.stride(0), slopes.stride(-1))
    )
    if dropout_p == 0:
        return mask, by_head, None, None
    return mask, by_head, (seed, dropout_scale(dropout_p)), dropout_threshold(dropout_p)


def head_major(like: Tensor, heads: int, length: int, size: int) -> Tensor:
    """(B, heads, length, size), laid out as (B, length, heads, size): what the layers around it want."""
    return like.new_empty(like.shape[0], length, heads, size).transpose(1, 2)
