"""Scaled dot-product attention, tiled: the (Lq, Lk) scores never leave the chip.

    s_ij = scale q_i.k_j;  softcap: s = c tanh(s / c);  + alibi: -slope |i + offset - j|;  + mask
    m_i = max_j s_ij,   l_i = log sum_j exp(s_ij - m_i),   p_ij = exp((s_ij - m_i) - l_i),   out_i = sum_j r_ij p_ij v_j

over the columns i + offset - left <= j <= i + offset + right (-1: no bound), offset = Lk - Lq if lower_right
else 0. r is 1, or dropout's mask / (1 - dropout_p) from philox.py. A row that sees no column has out 0, m
-inf and l 0.

    delta_i = sum_d out_id dout_id - dlse_i      (= sum_j p_ij dp_ij - dlse_i)
    dv_j = sum_i r_ij p_ij dout_i,   dp_ij = r_ij dout_i.v_j,   ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale sum_j ds_ij k_j,    dk_j = scale sum_i ds_ij q_i   (a softcap: ds times 1 - (s / c)^2)

Shapes: q (B, H, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, DV); query head h reads kv head h // GROUP, GROUP = H
/ Hk; the last stride is 1. out, m and l are all that the backward keeps; the scores are recomputed from q and
k. m and l are two numbers: in their sum lse, l would be lost beside large scores. A score that is a product x u, with a
scale or a softcap for u, is never subtracted from a rounded product: s - m is (x - max x) u, or fma(x, u, -m) with what
rounding left of m in l. So large scores keep their digits, however the compiler contracts.

Forward: one program per BLOCK_M rows walks over the columns with a running maximum and sum (online softmax).
Tiles wholly outside the band are never
visited, those wholly inside do no mask arithmetic. Packed documents (attention_varlen.py) are batch entries whose
first row, first column and lengths are read from p_cu_q and p_cu_k. The backward is in attention_bwd.py.

Few rows and many columns, as in decoding: a program takes a part of the columns (SPLIT) and writes its own out_c,
m_c and l_c, which a second kernel joins:  m = max_c m_c,  l = log sum_c exp(m_c - m + l_c),
out = sum_c exp(m_c - m + l_c - l) out_c.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_bwd import attention_bwd
from fastgpt.kernels.attention_tile_sizes import decoding_tile, tile_sizes
from fastgpt.kernels.attention_tiles import (
    UNSPECIALIZED,
    Documents,
    bounds,
    constants,
    describable,
    describe,
    extras,
    first_line,
    grid_of,
    head,
    head_major,
    load_rows,
    longest,
    place,
    program,
    scores,
    sizes,
    store_rows,
    unit_of,
    visited_tiles,
)
from fastgpt.kernels.checks import rows_contiguous
from fastgpt.kernels.common import LOG2E, cdiv, multiprocessors, next_power_of_2, on_device_of
from fastgpt.kernels.philox import keep_tile

__all__ = ["attention_bwd", "attention_fwd"]


ROWS = 16  # the most whose columns are split: tl.dot's least


@triton.jit
def _within(start, count, first, end, BLOCK: tl.constexpr):
    """(start, count) of those tiles that lie in first .. end, a range of whole tiles."""
    begin = tl.maximum(start, first)
    return begin, tl.maximum(tl.minimum(start + count * BLOCK, end) - begin, 0) // BLOCK


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_fwd(
    p_q, p_k, p_v, p_out,
    p_stats,  # (B, H, Lq, 2), contiguous
    documents, mask, slopes, dropout,  # None, or a tuple of pointers and numbers
    threshold,  # of dropout
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_ob, s_oh, s_om,
    Lq, Lk, left, right, columns, heads, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,  # of products of fp32
    DESCRIPTORS: tl.constexpr,  # p_q, p_k, p_v are tensor descriptors
    SPLIT: tl.constexpr,  # a program takes so many columns, a multiple of BLOCK_N, and all rows
    RAW: tl.constexpr,  # the scores are a product, of q.k and a positive scale or of a tanh and a softcap
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    i_tile, tiles, i_h, H, i_b = program(heads)
    start_m = (tiles - 1 - i_tile) * BLOCK_M  # causal: the longest rows first
    i_split = 0
    lines = Lq
    if SPLIT:
        start_m = 0
        i_split = i_tile
        lines = Lq * tiles
    begin_q, begin_k, Lq, Lk, offset = place(documents, i_b, Lq, Lk, LOWER_RIGHT)
    if documents is not None:  # noqa: SIM102  (a constant, and a value)
        if start_m >= Lq:
            return
    o_b = i_b.to(tl.int64)
    o_h = i_h.to(tl.int64)
    i_hk = i_h // GROUP
    o_hk = i_hk.to(tl.int64)
    o_start = begin_q + start_m
    p_k = head(p_k, o_b, o_hk, begin_k, s_kb, s_kh, s_kn, DESCRIPTORS)
    p_v = head(p_v, o_b, o_hk, begin_k, s_vb, s_vh, s_vn, DESCRIPTORS)
    slope = None
    if slopes is not None:
        slope = tl.load(slopes[0] + o_b * slopes[1] + o_h * slopes[2])
    p_mask = None
    s_mm = 0
    s_mn = 0
    if mask is not None:
        p_mask = mask[0] + o_b * mask[1] + o_h * mask[2]
        s_mm = mask[3]
        s_mn = mask[4]
    keep_scale = 1.0
    if dropout is not None:
        seed = tl.load(dropout[0])
        keep_scale = dropout[1]

    o_row = tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_m = start_m + o_row
    p_q = head(p_q, o_b, o_h, begin_q, s_qb, s_qh, s_qm, DESCRIPTORS)
    b_q = load_rows(p_q, i_b, i_h, start_m, o_row, o_d, s_qm, Lq, D, BLOCK_D, True, DESCRIPTORS)
    b_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_out = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    unit = unit_of(scale, softcap, SOFTCAP, RAW)

    last_m = tl.minimum(start_m + BLOCK_M, Lq) - 1
    full, full_count, before, before_count, behind, behind_count = visited_tiles(
        start_m, last_m, Lk, offset - left, offset + right, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
    if SPLIT:
        first = i_split * columns
        full, full_count = _within(full, full_count, first, first + columns, BLOCK_N)
        before, before_count = _within(before, before_count, first, first + columns, BLOCK_N)
        behind, behind_count = _within(behind, behind_count, first, first + columns, BLOCK_N)
    for EDGE in tl.static_range(2):
        count = full_count
        if EDGE:
            count = before_count + behind_count
        for i in range(0, count):
            start_n = full + i * BLOCK_N
            if EDGE:
                start_n = tl.where(
                    i < before_count, before + i * BLOCK_N, behind + (i - before_count) * BLOCK_N
                )
            o_n = start_n + o_col
            b_k = load_rows(p_k, i_b, i_hk, start_n, o_col, o_d, s_kn, Lk, D, BLOCK_D, EDGE, DESCRIPTORS)
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            b_s, _ = scores(
                b_s, o_m[:, None], o_n[None, :], p_mask, s_mm, s_mn, slope, Lq, Lk, offset, left, right,
                scale, softcap, HAS_LEFT, HAS_RIGHT, SOFTCAP, RAW, EDGE,
            )  # fmt: skip
            b_new = tl.maximum(b_max, tl.max(b_s, 1))  # [BLOCK_M]
            b_safe = tl.where(b_new == float("-inf"), 0.0, b_new)  # -inf - -inf would be NaN
            b_p = tl.exp2((b_s - b_safe[:, None]) * (unit * LOG2E))  # [BLOCK_M, BLOCK_N]
            b_shrink = tl.exp2((b_max - b_safe) * (unit * LOG2E))
            b_max = b_new
            b_sum = b_sum * b_shrink + tl.sum(b_p, 1)
            if dropout is not None:
                b_keep = keep_tile(seed, threshold, i_b, i_h, o_m, start_n, BLOCK_N)
                b_p = tl.where(b_keep, b_p, 0.0)
            b_v = load_rows(p_v, i_b, i_hk, start_n, o_col, o_dv, s_vn, Lk, DV, BLOCK_DV, EDGE, DESCRIPTORS)
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_shrink[:, None], input_precision=PRECISION)

    b_divisor = tl.where(b_sum == 0.0, 1.0, b_sum)
    b_high = b_max * unit
    b_low = tl.where(b_sum == 0.0, 0.0, tl.fma(b_max, unit, -b_high) + tl.log(b_divisor))
    b_out = b_out * (keep_scale / b_divisor)[:, None]
    p_out += o_b * s_ob + o_h * s_oh + (o_start + i_split * Lq) * s_om
    store_rows(p_out, b_out, o_row, o_dv, s_om, Lq - start_m, DV)
    p_stats += 2 * (first_line(documents, o_b, o_h, H, lines, begin_q) + i_split * Lq)
    tl.store(p_stats + 2 * o_m, b_high, mask=o_m < Lq)
    tl.store(p_stats + 2 * o_m + 1, b_low, mask=o_m < Lq)


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_combine_fwd(
    p_part, p_part_stats,  # (B, H, splits * Lq, DV) and (B, H, splits * Lq, 2), contiguous
    p_out, p_stats, s_ob, s_oh, s_om,
    Lq, splits, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):
    # fmt: on
    i_m, _, i_h, H, i_b = program(heads)
    o_b = i_b.to(tl.int64)
    o_h = i_h.to(tl.int64)
    o_bh = o_b * H + o_h
    o_first = o_bh * splits * Lq + i_m  # this row of the first part
    o_split = tl.arange(0, BLOCK_SPLITS)
    b_high, b_low = _part_statistics(p_part_stats, o_first, o_split, splits, Lq)  # [BLOCK_SPLITS]
    high = tl.max(b_high, 0)
    safe = tl.where(high == float("-inf"), 0.0, high)
    b_rest = (b_high - safe) + b_low  # of the part's lse beyond `high`
    rest = tl.max(b_rest, 0)
    safe_rest = tl.where(rest == float("-inf"), 0.0, rest)
    total = tl.sum(tl.exp2((b_rest - safe_rest) * LOG2E), 0)  # no part sees anything: 0
    divisor = tl.where(total == 0.0, 1.0, total)
    o_dv = tl.arange(0, BLOCK_DV)
    b_out = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, splits, CHUNK):  # all at once, 256 parts of one head do not fit into registers
        o_chunk = start + tl.arange(0, CHUNK)
        b_m, b_l = _part_statistics(p_part_stats, o_first, o_chunk, splits, Lq)  # [CHUNK]
        b_weight = tl.exp2(((b_m - safe) + b_l - safe_rest) * LOG2E) / divisor
        m_part = (o_chunk < splits)[:, None] & (o_dv[None, :] < DV)
        p_rows = p_part + (o_first + o_chunk * Lq)[:, None] * DV
        b_part = tl.load(p_rows + o_dv[None, :], mask=m_part, other=0.0)  # [CHUNK, BLOCK_DV]
        b_out += tl.sum(b_part * b_weight[:, None], 0)
    p_out += o_b * s_ob + o_h * s_oh + i_m.to(tl.int64) * s_om
    tl.store(p_out + o_dv, b_out.to(p_out.dtype.element_ty), mask=o_dv < DV)
    p_stats += 2 * (o_bh * Lq + i_m)
    tl.store(p_stats, high)
    tl.store(p_stats + 1, tl.where(high == float("-inf"), 0.0, rest + tl.log(divisor)))


@triton.jit
def _part_statistics(p_part_stats, o_first, o_split, splits, Lq):
    """m and l of a row in some of the parts; -inf and 0 beyond the last part."""
    p = p_part_stats + 2 * (o_first + o_split * Lq)
    m = o_split < splits
    return tl.load(p, mask=m, other=float("-inf")), tl.load(p + 1, mask=m, other=0.0)


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    lower_right: bool,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> tuple[Tensor, Tensor]:
    B, H, Lq, _ = q.shape
    out = head_major(q, H, Lq, v.shape[3])
    stats = q.new_empty(B, H, Lq, 2, dtype=torch.float32)
    options = (scale, lower_right, left, right, softcap, dropout_p)
    launch_fwd(out, stats, q, k, v, None, attn_mask, alibi_slopes, seed, *options)
    return out, stats


def launch_fwd(
    out: Tensor,
    stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | None,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    lower_right: bool,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
) -> None:
    """Writes out and (m, l) of each row; tensors of documents are the views that `Documents.views` makes."""
    rows_contiguous("attention_fwd_triton", q=q, k=k, v=v)
    B, H = q.shape[:2]
    most_rows, _ = longest(q, k, documents)
    if not B * H * most_rows:
        return
    raw = attn_mask is None and alibi_slopes is None
    plain = raw and softcap == 0 and dropout_p == 0
    splits, columns, written, written_stats = 1, 0, out, stats
    by_descriptors = False
    if documents is None and most_rows <= ROWS:
        block_m, block_n, warps, stages = decoding_tile(q, v)
        splits, columns = _split(q, k.shape[2], block_n)
    else:
        by_descriptors = describable(documents, q, k, v)
        block_m, block_n, warps, stages = tile_sizes("fwd", q, v, plain, by_descriptors)
    if splits > 1:
        written = q.new_empty(B, H, splits * most_rows, v.shape[3], dtype=torch.float32)
        written_stats = stats.new_empty(B, H, splits * most_rows, 2)
    const = constants(q, k, v, lower_right, left, right, softcap)
    grid, heads = grid_of(splits if splits > 1 else cdiv(most_rows, block_m), H, B)
    with on_device_of(q):
        _attention_fwd[grid](
            *describe(by_descriptors, (q, block_m), (k, block_n), (v, block_n)),
            written,
            written_stats,
            bounds(documents),
            *extras(attn_mask, alibi_slopes, seed, dropout_p),
            *q.stride()[:3],
            *k.stride()[:3],
            *v.stride()[:3],
            *written.stride()[:3],
            *sizes(q, k, left, right),
            columns,
            heads,
            scale,
            softcap,
            **const,
            DESCRIPTORS=by_descriptors,
            SPLIT=splits > 1,
            RAW=raw and (scale > 0 or softcap > 0),
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
        )
        if splits > 1:
            grid, heads = grid_of(most_rows, H, B)
            _attention_combine_fwd[grid](
                written,
                written_stats,
                out,
                stats,
                *out.stride()[:3],
                most_rows,
                splits,
                heads,
                v.shape[3],
                const["BLOCK_DV"],
                next_power_of_2(2 * multiprocessors(q)),  # the most parts: `_split`
                32,
                num_warps=4,
            )


def _split(q: Tensor, length: int, block_n: int) -> tuple[int, int]:
    """(parts, columns of each) of so many columns.

    Decoding is bound by the bytes of k and v: for 3.35 TB/s and a latency of 0.7 us 2.3 MB must be in flight, 18 KB a
    multiprocessor, which B H programs do not have where there are fewer of them than multiprocessors. So two programs
    a multiprocessor, three tiles of 16 KB in flight each. A part is at least four tiles: it costs 4 D bytes written and
    read again a row, and reads 4 D bytes a column.
    """
    parts = cdiv(2 * multiprocessors(q), q.shape[0] * q.shape[1])
    columns = max(cdiv(cdiv(length, parts), block_n), 4) * block_n
    return cdiv(length, columns), columns
