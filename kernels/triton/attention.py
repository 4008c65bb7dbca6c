"""Scaled dot-product attention, tiled: the (Lq, Lk) scores are never written to memory.

    s_ij = scale q_i.k_j;  softcap: s = c tanh(s / c);  + ALiBi: -slope |i + diagonal - j|;  + mask
    m_i = max_j s_ij,   l_i = log sum_j exp(s_ij - m_i),   p_ij = exp((s_ij - m_i) - l_i),   out_i = sum_j r_ij p_ij v_j

over the columns i + diagonal - left <= j <= i + diagonal + right (-1: no bound), with diagonal = Lk - Lq if
lower_right, else 0. r is 1, or the dropout mask of philox.py / (1 - dropout_p). A row that sees no column has out = 0,
m = -inf and l = 0.

    delta_i = sum_d out_id dout_id - dlse_i      (= sum_j p_ij dp_ij - dlse_i)
    dv_j = sum_i r_ij p_ij dout_i,   dp_ij = r_ij dout_i.v_j,   ds_ij = p_ij (dp_ij - delta_i)
    dq_i = scale sum_j ds_ij k_j,    dk_j = scale sum_i ds_ij q_i   (softcap: ds times 1 - (s / c)^2)

Shapes: q (B, H, Lq, D), k (B, Hk, Lk, D), v (B, Hk, Lk, DV), stats (B, H, Lq, 2), fp32: m and l. Query head h reads
kv head h // GROUP, GROUP = H / Hk. The last stride is 1. The backward keeps out and stats, and recomputes the scores
from q and k.

m and l are two numbers, because their sum would lose l beside large scores. A score that is a product x u, where u is
the scale or the softcap, is never subtracted from a rounded product: s - m is (x - max x) u, or fma(x, u, -m), with the
rounding error of m in l. So large scores keep their digits, however the compiler contracts.

Forward: one program per BLOCK_M rows walks over the columns with an online softmax. It skips the blocks outside the
window, and masks only the blocks at the edges. Packed documents (attention_varlen.py) are batch entries whose first
row, first column and lengths are read from cu_seqlens. The backward is in attention_bwd.py.

Few rows and many columns, as in decoding: a program takes a part of the columns (SPLIT) and writes its own out_c, m_c
and l_c. A second kernel merges them:  m = max_c m_c,  l = log sum_c exp(m_c - m + l_c),
out = sum_c exp(m_c - m + l_c - l) out_c.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_bwd import attention_bwd
from .attention_config import decoding_tile, tile_sizes
from .attention_launch import (
    AttentionOptions,
    PackedDocuments,
    as_descriptors,
    constexprs,
    cu_seqlens_of,
    empty_blhd,
    grid_of,
    lengths_and_window,
    max_lengths,
    optional_arguments,
    use_descriptors,
)
from .attention_scores import (
    Mask,
    alibi_slope_of_head,
    apply_mask,
    deferred_scale,
    mask_of_head,
    online_softmax_finish,
    online_softmax_merge,
    online_softmax_rescale,
    scale_scores,
)
from .attention_tiles import (
    UNSPECIALIZED,
    block_count,
    block_range_of_rows,
    block_range_within,
    edge_begin,
    first_row,
    head_pointer,
    load_rows,
    program_ids,
    seqlen_info,
    store_rows,
)
from .checks import rows_contiguous
from .common import LOG2E, cdiv, multiprocessors, next_power_of_2, on_device_of
from .philox import keep_tile

__all__ = ["attention_bwd", "attention_fwd"]


SPLIT_ROWS = 16  # rows up to which the columns are split: tl.dot takes at least 16


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_fwd(
    p_q, p_k, p_v, p_out,
    p_stats,  # (B, H, Lq, 2), contiguous
    cu_seqlens,  # None, or pointers to cu_seqlens_q and cu_seqlens_k of packed documents
    attn_mask, alibi_slopes,  # None, or a pointer and strides
    dropout,  # None, or a pointer to the seed, and the scale of the probabilities that dropout keeps
    dropout_threshold,
    s_q, s_k, s_v, s_out,  # strides over batch, head and row
    Lq, Lk, left, right, split_columns, folded_heads, scale, softcap,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LOWER_RIGHT: tl.constexpr,
    PRECISION: tl.constexpr,  # of fp32 products
    DESCRIPTORS: tl.constexpr,  # p_q, p_k, p_v are tensor descriptors
    SPLIT: tl.constexpr,  # a program takes all rows and split_columns columns, a multiple of BLOCK_N
    DEFER_SCALE: tl.constexpr,  # scale in the exponent; nothing is added to the scores
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    i_block, blocks, i_h, H, i_b = program_ids(folded_heads)
    start_m = (blocks - 1 - i_block) * BLOCK_M  # causal: the longest rows first
    i_split = 0
    stats_rows = Lq
    if SPLIT:
        start_m = 0
        i_split = i_block
        stats_rows = Lq * blocks
    seqlen = seqlen_info(cu_seqlens, i_b, Lq, Lk, LOWER_RIGHT)
    if cu_seqlens is not None:  # noqa: SIM102  (a constant, and a value)
        if start_m >= seqlen.Lq:
            return
    o_b = i_b.to(tl.int64)
    o_h = i_h.to(tl.int64)
    i_hk = i_h // GROUP
    o_hk = i_hk.to(tl.int64)
    p_k = head_pointer(p_k, o_b, o_hk, seqlen.k_begin, s_k, DESCRIPTORS)
    p_v = head_pointer(p_v, o_b, o_hk, seqlen.k_begin, s_v, DESCRIPTORS)
    mask = Mask(
        None if attn_mask is None else mask_of_head(attn_mask, o_b, o_h),
        None if alibi_slopes is None else alibi_slope_of_head(alibi_slopes, o_b, o_h), left, right,
    )  # fmt: skip
    keep_scale = 1.0
    if dropout is not None:
        p_seed, keep_scale = dropout
        seed = tl.load(p_seed)

    o_row = tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_m = start_m + o_row
    p_q = head_pointer(p_q, o_b, o_h, seqlen.q_begin, s_q, DESCRIPTORS)
    b_q = load_rows(p_q, i_b, i_h, start_m, o_row, o_d, s_q, seqlen.Lq, D, BLOCK_D, True, DESCRIPTORS)
    b_row_max = tl.full((BLOCK_M,), float("-inf"), tl.float32)
    b_row_sum = tl.zeros((BLOCK_M,), tl.float32)
    b_out = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    exponent_scale = deferred_scale(scale, softcap, DEFER_SCALE)

    visited = block_range_of_rows(seqlen, start_m, left, right, BLOCK_M, BLOCK_N)
    if SPLIT:
        first = i_split * split_columns
        visited = block_range_within(visited, first, first + split_columns, BLOCK_N)
    for EDGE in tl.static_range(2):
        for i in range(0, block_count(visited, EDGE)):
            start_n = visited.full_begin + i * BLOCK_N
            if EDGE:
                start_n = edge_begin(visited, i, BLOCK_N)
            o_n = start_n + o_col
            b_k = load_rows(
                p_k, i_b, i_hk, start_n, o_col, o_d, s_k, seqlen.Lk, D, BLOCK_D, EDGE, DESCRIPTORS
            )  # [BLOCK_N, BLOCK_D]
            b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
            b_s, _ = scale_scores(b_s, scale, softcap, DEFER_SCALE)
            b_s = apply_mask(b_s, o_m[:, None], o_n[None, :], mask, seqlen, EDGE)
            b_p, b_rescale, b_row_max, b_row_sum = online_softmax_rescale(
                b_s, b_row_max, b_row_sum, exponent_scale
            )
            if dropout is not None:
                b_keep = keep_tile(seed, dropout_threshold, i_b, i_h, o_m, start_n, BLOCK_N)
                b_p = tl.where(b_keep, b_p, 0.0)
            b_v = load_rows(
                p_v, i_b, i_hk, start_n, o_col, o_dv, s_v, seqlen.Lk, DV, BLOCK_DV, EDGE, DESCRIPTORS
            )  # [BLOCK_N, BLOCK_DV]
            b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_rescale[:, None], input_precision=PRECISION)

    b_divisor, b_m, b_l = online_softmax_finish(b_row_max, b_row_sum, exponent_scale)
    b_out = b_out * (keep_scale / b_divisor)[:, None]
    first_out = seqlen.q_begin + start_m + i_split * seqlen.Lq
    p_out = head_pointer(p_out, o_b, o_h, first_out, s_out, False)
    store_rows(p_out, b_out, o_row, o_dv, s_out, seqlen.Lq - start_m, DV)
    p_stats += 2 * (first_row(cu_seqlens, o_b, o_h, H, stats_rows, seqlen.q_begin) + i_split * seqlen.Lq)
    tl.store(p_stats + 2 * o_m, b_m, mask=o_m < seqlen.Lq)
    tl.store(p_stats + 2 * o_m + 1, b_l, mask=o_m < seqlen.Lq)


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_combine_fwd(
    p_part, p_part_stats,  # (B, H, splits * Lq, DV) and (B, H, splits * Lq, 2), contiguous
    p_out, p_stats,
    s_out,  # strides over batch, head and row
    Lq, splits, folded_heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_SPLITS: tl.constexpr, CHUNK: tl.constexpr,
):
    # fmt: on
    i_m, _, i_h, H, i_b = program_ids(folded_heads)
    o_b = i_b.to(tl.int64)
    o_h = i_h.to(tl.int64)
    o_bh = o_b * H + o_h
    o_first = o_bh * splits * Lq + i_m  # this row of the first part
    o_split = tl.arange(0, BLOCK_SPLITS)
    b_m, b_l = _load_part_stats(p_part_stats, o_first, o_split, splits, Lq)  # [BLOCK_SPLITS]
    row_max = tl.max(b_m, 0)
    row_m, row_rest, row_sum = online_softmax_merge(b_m, b_l)
    o_dv = tl.arange(0, BLOCK_DV)
    b_out = tl.zeros((BLOCK_DV,), tl.float32)
    for start in range(0, splits, CHUNK):  # in chunks: 256 parts of a head do not fit into registers
        o_chunk = start + tl.arange(0, CHUNK)
        b_chunk_m, b_chunk_l = _load_part_stats(p_part_stats, o_first, o_chunk, splits, Lq)  # [CHUNK]
        b_weight = tl.exp2(((b_chunk_m - row_m) + b_chunk_l - row_rest) * LOG2E) / row_sum
        m_part = (o_chunk < splits)[:, None] & (o_dv[None, :] < DV)
        p_rows = p_part + (o_first + o_chunk * Lq)[:, None] * DV
        b_part = tl.load(p_rows + o_dv[None, :], mask=m_part, other=0.0)  # [CHUNK, BLOCK_DV]
        b_out += tl.sum(b_part * b_weight[:, None], 0)
    p_out = head_pointer(p_out, o_b, o_h, i_m.to(tl.int64), s_out, False)
    tl.store(p_out + o_dv, b_out.to(p_out.dtype.element_ty), mask=o_dv < DV)
    p_stats += 2 * (o_bh * Lq + i_m)
    tl.store(p_stats, row_max)
    tl.store(p_stats + 1, tl.where(row_max == float("-inf"), 0.0, row_rest + tl.log(row_sum)))


@triton.jit
def _load_part_stats(p_part_stats, o_first, o_split, splits, Lq):
    """Load m and l of a row in some of the parts; -inf and 0 after the last part."""
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
    """Return out (B, H, Lq, DV) and stats (B, H, Lq, 2), fp32."""
    B, H, Lq, _ = q.shape
    out = empty_blhd(q, H, Lq, v.shape[3])
    stats = q.new_empty(B, H, Lq, 2, dtype=torch.float32)
    options = AttentionOptions(
        attn_mask, alibi_slopes, seed, scale, lower_right, left, right, softcap, dropout_p
    )
    launch_fwd(out, stats, q, k, v, None, options)
    return out, stats


def launch_fwd(
    out: Tensor,
    stats: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    packed: PackedDocuments | None,
    options: AttentionOptions,
) -> None:
    """Write out and stats.

    Args:
        packed: if given, all tensors are views that `PackedDocuments` makes.
    """
    rows_contiguous("attention_fwd_triton", q=q, k=k, v=v)
    B, H = q.shape[:2]
    max_rows, _ = max_lengths(q, k, packed)
    if not B * H * max_rows:
        return
    splits, split_columns, written, written_stats = 1, 0, out, stats
    descriptors = False
    if packed is None and max_rows <= SPLIT_ROWS:
        block_m, block_n, warps, stages = decoding_tile(q, v)
        splits, split_columns = _split(q, k.shape[2], block_n)
    else:
        descriptors = use_descriptors(packed, q, k, v)
        block_m, block_n, warps, stages = tile_sizes("fwd", q, v, options.plain, descriptors)
    if splits > 1:
        written = q.new_empty(B, H, splits * max_rows, v.shape[3], dtype=torch.float32)
        written_stats = stats.new_empty(B, H, splits * max_rows, 2)
    const = constexprs(q, k, v, options.lower_right)
    grid, folded_heads = grid_of(splits if splits > 1 else cdiv(max_rows, block_m), H, B)
    with on_device_of(q):
        _attention_fwd[grid](
            *as_descriptors(descriptors, (q, block_m), (k, block_n), (v, block_n)),
            written,
            written_stats,
            cu_seqlens_of(packed),
            *optional_arguments(options),
            q.stride()[:3],
            k.stride()[:3],
            v.stride()[:3],
            written.stride()[:3],
            *lengths_and_window(q, k, options),
            split_columns,
            folded_heads,
            options.scale,
            options.softcap or None,
            **const,
            DESCRIPTORS=descriptors,
            SPLIT=splits > 1,
            DEFER_SCALE=options.defers_scale,
            BLOCK_M=block_m,
            BLOCK_N=block_n,
            num_warps=warps,
            num_stages=stages,
        )
        if splits > 1:
            grid, folded_heads = grid_of(max_rows, H, B)
            _attention_combine_fwd[grid](
                written,
                written_stats,
                out,
                stats,
                out.stride()[:3],
                max_rows,
                splits,
                folded_heads,
                v.shape[3],
                const["BLOCK_DV"],
                next_power_of_2(2 * multiprocessors(q)),  # the most parts that `_split` makes
                32,
                num_warps=4,
            )


def _split(q: Tensor, length: int, block_n: int) -> tuple[int, int]:
    """Return into how many parts the columns are split, and the columns of a part.

    Decoding is bound by the bytes of k and v. At 3.35 TB/s and a latency of 0.7 us, 2.3 MB must be in flight: 18 KB per
    multiprocessor. B H programs do not have that where there are fewer of them than multiprocessors. So there are two
    programs per multiprocessor, each with three tiles of 16 KB in flight. A part has at least four tiles: it costs 4 D
    bytes per row that are written and read again, and reads 4 D bytes per column.
    """
    parts = cdiv(2 * multiprocessors(q), q.shape[0] * q.shape[1])
    columns = max(cdiv(cdiv(length, parts), block_n), 4) * block_n
    return cdiv(length, columns), columns
