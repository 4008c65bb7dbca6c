"""What the attention kernels share: tile sizes, tile loads, which tiles are visited, and the scores of a
tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from fastgpt.kernels.common import capability, is_tf32, tanh
from fastgpt.kernels.tuned import chosen

# (BLOCK_M, BLOCK_N, warps, stages) for each kernel and (padded) head dimension: first for plain and causal
# attention, then with a mask, dropout, a softcap or slopes, which take registers from the tile. The largest tiles that
# compile without spills: `python -m bench resources` shows what each takes and what its inner loop is bound by.
# More columns a tile of the forward rescale the output less often: at 64, 128 columns instead of 64 take 4.25 instead
# of 5 fp32 instructions a score. In "bwd" (which holds dk and dv, and sends dq away) few rows leave room for both.
Tile = tuple[int, int, int, int]
Table = dict[str, dict[int, tuple[Tile, Tile]]]
HOPPER: Table = {  # 227 KiB of shared memory, products of 64 rows and more
    "fwd": {
        64: ((128, 128, 8, 3), (128, 64, 8, 3)),
        128: ((128, 128, 8, 3), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (64, 32, 8, 1)),
    },
    "dkv": {
        64: ((64, 128, 8, 3), (32, 64, 8, 1)),
        128: ((32, 128, 8, 2), (32, 64, 8, 1)),
        256: ((32, 64, 8, 2), (16, 64, 8, 1)),
    },
    "bwd": {
        64: ((64, 128, 8, 3), (32, 64, 8, 1)),
        128: ((32, 128, 8, 2), (16, 64, 8, 1)),
        256: ((16, 64, 8, 2), (16, 64, 8, 1)),
    },
    "dq": {
        64: ((128, 64, 8, 3), (128, 32, 8, 2)),
        128: ((128, 64, 8, 2), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (32, 32, 8, 1)),
    },
}
BLACKWELL: Table = HOPPER | {  # sums lie in tensor memory; options spill with eight warps
    "fwd": HOPPER["fwd"] | {128: ((128, 64, 8, 3), (128, 32, 8, 2))},
    "dkv": HOPPER["dkv"] | {256: ((32, 64, 4, 1), (32, 64, 4, 1))},
    "bwd": {
        64: ((32, 128, 8, 3), (16, 64, 4, 1)),
        128: ((32, 128, 8, 2), (16, 64, 4, 1)),
        256: ((32, 64, 8, 2), (16, 64, 4, 1)),
    },
}
AMPERE: Table = {  # and every other part: at most 99 KiB
    "fwd": {
        64: ((128, 64, 8, 3), (128, 32, 8, 2)),
        128: ((128, 32, 8, 3), (64, 32, 4, 2)),
        256: ((64, 32, 8, 1), (64, 16, 8, 1)),
    },
    "dkv": {
        64: ((32, 128, 8, 2), (32, 64, 8, 1)),
        128: ((64, 64, 8, 1), (32, 32, 8, 1)),
        256: ((16, 64, 8, 1), (16, 32, 8, 1)),
    },
    "bwd": {
        64: ((32, 128, 8, 2), (32, 64, 8, 1)),
        128: ((32, 64, 8, 1), (32, 32, 8, 1)),
        256: ((16, 64, 8, 1), (16, 32, 8, 1)),
    },
    "dq": {
        64: ((128, 32, 8, 2), (64, 32, 8, 1)),
        128: ((64, 32, 8, 2), (64, 32, 8, 1)),
        256: ((64, 16, 8, 1), (64, 16, 8, 1)),
    },
}
FP32: Table = {  # no tensor core has IEEE fp32: multiply-adds, whose operands stand in registers
    "fwd": {n: ((32, 32, 4, 1), (32, 16, 8, 1)) for n in (64, 128, 256)},
    "dkv": {n: ((16, 32, 4, 1), (16, 16, 8, 1)) for n in (64, 128, 256)},
    "bwd": {n: ((16, 32, 4, 1), (16, 16, 8, 1)) for n in (64, 128, 256)},
    "dq": {n: ((32, 16, 4, 1), (16, 16, 8, 1)) for n in (64, 128, 256)},
}
TF32: Table = {  # tensor cores for fp32 with the digits of fp16: half of AMPERE's tiles at twice the bytes
    "fwd": {
        64: ((64, 32, 4, 2), (64, 32, 4, 1)),
        128: ((64, 32, 4, 1), (32, 32, 4, 1)),
        256: ((32, 32, 8, 1), (32, 16, 8, 1)),
    },
    "dkv": {
        64: ((32, 64, 8, 1), (16, 64, 8, 1)),
        128: ((32, 32, 8, 1), (16, 32, 8, 1)),
        256: ((16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "bwd": {
        64: ((32, 64, 8, 1), (16, 64, 8, 1)),
        128: ((16, 32, 8, 1), (16, 32, 8, 1)),
        256: ((16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "dq": {
        64: ((64, 32, 8, 1), (32, 32, 8, 1)),
        128: ((32, 32, 8, 1), (32, 16, 8, 1)),
        256: ((32, 16, 8, 1), (16, 16, 8, 1)),
    },
}
# By tensor descriptors, whose addresses take no registers, plain attention has room for larger tiles, by (major
# capability, kernel, head dimension). Integer instructions a score of the backward: with 128 rows at 64 0.41, not 0.97;
# with 64 rows at 128 1.09, not 1.94, and 0.38 where dq is left out.
DESCRIBED: dict[tuple[int, str, int], Tile] = {
    (9, "bwd", 64): (128, 128, 8, 2),
    (9, "bwd", 128): (64, 128, 8, 2),
    (9, "dkv", 128): (64, 128, 8, 2),
    (10, "fwd", 128): (128, 128, 8, 2),
    (10, "bwd", 64): (64, 128, 8, 3),
}
# The forward of 16 rows and fewer, by head dimension: bound by the bytes of k and v, of which tiles are in flight.
DECODING: dict[int, Tile] = {64: (16, 128, 4, 3), 128: (16, 64, 8, 3), 256: (16, 32, 4, 2)}
# Triton 3.6 spills in the backward by descriptors (on sm_90a 111 registers at 64, 18 at 128), but not by pointers.
DESCRIBED_BWD = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
# The interpreter's time goes by the number of tiles, its use is in testing their edges.
INTERPRETED = {"fwd": (32, 16, 4, 1), "bwd": (16, 32, 4, 1), "dkv": (16, 32, 4, 1), "dq": (32, 16, 4, 1)}

SIZES = ["Lq", "Lk", "left", "right", "threshold"]  # a new length or window compiles nothing again


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
def place(p_cu_q, p_cu_k, i_b, Lq, Lk, LOWER_RIGHT: tl.constexpr):
    """(first row, first column, Lq, Lk, offset) of batch entry i_b: of packed documents each has its own."""
    begin_q = tl.cast(0, tl.int64)
    begin_k = tl.cast(0, tl.int64)
    if p_cu_q is not None:
        begin_q, Lq = _document(p_cu_q, i_b, Lq)
        begin_k, Lk = _document(p_cu_k, i_b, Lk)
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


def tile_sizes(kernel: str, q: Tensor, v: Tensor, plain: bool, described: bool) -> Tile:
    """(BLOCK_M, BLOCK_N, warps, stages) of one of the kernels "fwd", "bwd", "dkv" (that without dq), "dq".

    A padded head dimension, or another one of v, takes registers too, for the masks of the loads.
    """
    device = capability(q)
    if device is None:
        return chosen(f"attention_{kernel}", q, (0, 0), INTERPRETED[kernel])
    D, DV = q.shape[-1], v.shape[-1]
    size = max(64, triton.next_power_of_2(max(D, DV)))
    plain = plain and D == DV and triton.next_power_of_2(D) == D
    table = {9: HOPPER, 10: BLACKWELL}.get(device[0], AMPERE)
    if q.dtype == torch.float32:
        table = TF32 if is_tf32(q) else FP32
    row = table[kernel][size][0 if plain else 1]
    if plain and described:
        row = DESCRIBED.get((device[0], kernel, size), row)
    return chosen(f"attention_{kernel}", q, (size, int(plain), int(described), int(is_tf32(q))), row)


def keys_left(q: Tensor, described: bool) -> bool:
    """Whether few rows of dq are made as (k^T ds)^T: the head dimension then stands where Hopper's matrix instruction
    wants 64 rows, and that of sm_100 128. By pointers Hopper has registers for it only at 256, where all tiles are low.
    """
    device = capability(q)
    if device is None or device[0] not in (9, 10) or (q.dtype == torch.float32 and not is_tf32(q)):
        return described
    return described or device[0] == 10 or (q.shape[-1] > 128 and q.element_size() == 2)


def decoding_tile(q: Tensor, v: Tensor) -> Tile:
    """As `tile_sizes`, of the forward of few rows."""
    if capability(q) is None:
        return INTERPRETED["fwd"]
    if q.dtype == torch.float32:
        return (TF32 if is_tf32(q) else FP32)["fwd"][256][1]
    return DECODING[max(64, triton.next_power_of_2(max(q.shape[-1], v.shape[-1])))]


def constants(
    q: Tensor, k: Tensor, v: Tensor, lower_right: bool, left: int, right: int, softcap: float
) -> dict[str, int | bool | str]:
    """The compile-time arguments that every kernel takes."""
    D, DV = q.shape[-1], v.shape[-1]
    return {
        "GROUP": q.shape[1] // max(k.shape[1], 1),
        "LOWER_RIGHT": lower_right,
        "D": D,
        "DV": DV,
        "BLOCK_D": max(16, triton.next_power_of_2(D)),  # tl.dot's least
        "BLOCK_DV": max(16, triton.next_power_of_2(DV)),
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "SOFTCAP": softcap != 0.0,
        "PRECISION": "tf32" if is_tf32(q) else "ieee",
    }


def describable(documents: Documents | None, *tensors: Tensor) -> bool:
    """Whether the kernels get tensor descriptors, by which a unit for it copies tiles (TMA, sm_90 and 100) without a
    thread's instruction for an address; what lies past the end of a dimension comes as 0.

    Not of documents: past the end of one lies the next one, which may hold NaN.
    """
    device = capability(tensors[0])
    if device is None and not hasattr(InterpreterBuilder, "create_descriptor_reduce"):  # which add_rows needs
        return False
    if documents is not None or (device is not None and device[0] not in (9, 10)):
        return False
    return all(map(_describable, tensors))


def describe(by_descriptors: bool, *tiles: tuple[Tensor, int]) -> tuple[Tensor | TensorDescriptor, ...]:
    """Of (B, H, L, size) tensors in tiles of so many rows of a head; else the tensors themselves."""
    if not by_descriptors:
        return tuple(x for x, _ in tiles)
    blocks = ([1, 1, rows, max(16, triton.next_power_of_2(x.shape[3]))] for x, rows in tiles)
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


def bounds(documents: Documents | None) -> tuple[Tensor | None, Tensor | None]:
    return (None, None) if documents is None else (documents.cu_seqlens_q, documents.cu_seqlens_k)


def sizes(q: Tensor, k: Tensor, left: int, right: int) -> tuple[int, int, int, int]:
    """SIZES; a bound beyond every column is cut to one, so that sums stay within int32."""
    Lq, Lk = q.shape[2], k.shape[2]
    return Lq, Lk, min(left, Lq + Lk), min(right, Lq + Lk)


def strides(x: Tensor | None, dims: int) -> tuple[int, ...]:
    return (0,) * dims if x is None else x.stride()[:dims]


def slope_strides(slopes: Tensor | None) -> tuple[int, int]:
    """Of (batch, head); slopes of shape (H,) serve every batch entry."""
    if slopes is None:
        return 0, 0
    return (0, slopes.stride(0)) if slopes.dim() == 1 else (slopes.stride(0), slopes.stride(1))


def head_major(like: Tensor, heads: int, length: int, size: int) -> Tensor:
    """(B, heads, length, size), laid out as (B, length, heads, size): what the layers around it want."""
    return like.new_empty(like.shape[0], length, heads, size).transpose(1, 2)
