"""The backward of attention; formulas and symbols are those of attention.py.

attention_bwd_preprocess.py first computes m, l and delta of each row. Where one tile has all columns (DELTA_IN_TILE),
the main kernels compute delta as sum_j p_ij dp_ij instead of a sum over out, which is rounded.

The main kernel has one program per BLOCK_N columns, which walks over the rows. Its tiles are transposed,
[BLOCK_N, BLOCK_M]: p^T and ds^T are then the left factors of dv += p^T dout and dk += ds^T q as they are in registers,
without a way through shared memory. ds also gives the tile's part of dq, which is added to an fp32 sum in memory: five
products per tile, and an order of additions that differs from run to run. Deterministic: that kernel leaves out dq, and
a second kernel, one program per BLOCK_M rows, recomputes s and dp: seven products, the same bits every time. The query
heads of a GQA group are summed within the program of their kv head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_bwd_preprocess import (
    attention_bwd_postprocess,
    attention_bwd_preprocess,
    load_row_stats,
)
from .attention_config import DESCRIPTORS_IN_BWD, tile_sizes, transposes_dq
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
from .attention_mask_grad import launch_mask_grad
from .attention_scores import (
    Mask,
    alibi_slope_of_head,
    apply_mask,
    apply_window_by_columns,
    deferred_scale,
    mask_of_head,
    scale_scores,
)
from .attention_tiles import (
    UNSPECIALIZED,
    add_rows,
    block_count,
    block_range_of_columns,
    block_range_of_rows,
    edge_begin,
    first_row,
    head_pointer,
    load_rows,
    program_ids,
    seqlen_info,
    store_rows,
)
from .checks import rows_contiguous
from .common import LOG2E, cdiv, on_device_of
from .philox import keep_tile


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd(
    p_q, p_k, p_v, p_grad,
    p_row_stats,  # (B, H, Lq, 4): m, l in units of log 2 and delta of each row
    cu_seqlens, attn_mask, alibi_slopes, dropout,  # as in the forward
    dropout_threshold,
    s_q, s_k, s_v, s_grad,  # strides over batch, head and row
    Lq, Lk, left, right, folded_heads, scale, softcap,
    p_dk, p_dv,
    p_dq,  # (B, H, Lq, BLOCK_D), fp32, contiguous, unscaled, initially zero; or None
    s_dk, s_dv,  # strides over batch, head and row
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr,
    TRANSPOSE_DQ: tl.constexpr,  # compute dq of few rows as (k^T ds)^T
    DEFER_SCALE: tl.constexpr,  # as in the forward
    DELTA_IN_TILE: tl.constexpr,  # a tile has all columns, and delta is summed over them
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    i_block, _, i_hk, Hk, i_b = program_ids(folded_heads)
    start_n = i_block * BLOCK_N  # causal: first the columns that most rows see
    stats_rows = Lq
    seqlen = seqlen_info(cu_seqlens, i_b, Lq, Lk, LOWER_RIGHT)
    if cu_seqlens is not None:  # noqa: SIM102  (a constant, and a value)
        if start_n >= seqlen.Lk:
            return
    o_b = i_b.to(tl.int64)
    o_hk = i_hk.to(tl.int64)
    o_row = tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_n = start_n + o_col
    p_k = head_pointer(p_k, o_b, o_hk, seqlen.k_begin, s_k, DESCRIPTORS)
    p_v = head_pointer(p_v, o_b, o_hk, seqlen.k_begin, s_v, DESCRIPTORS)
    b_k = load_rows(p_k, i_b, i_hk, start_n, o_col, o_d, s_k, seqlen.Lk, D, BLOCK_D, True, DESCRIPTORS)
    b_v = load_rows(p_v, i_b, i_hk, start_n, o_col, o_dv, s_v, seqlen.Lk, DV, BLOCK_DV, True, DESCRIPTORS)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    exponent_scale = deferred_scale(scale, softcap, DEFER_SCALE)

    visited = block_range_of_columns(seqlen, start_n, left, right, BLOCK_M, BLOCK_N)
    for i_group in range(0, GROUP):
        i_h = i_hk * GROUP + i_group
        o_h = i_h.to(tl.int64)
        p_q_head = head_pointer(p_q, o_b, o_h, seqlen.q_begin, s_q, DESCRIPTORS)
        p_grad_head = head_pointer(p_grad, o_b, o_h, seqlen.q_begin, s_grad, DESCRIPTORS)
        o_line = first_row(cu_seqlens, o_b, o_h, Hk * GROUP, stats_rows, seqlen.q_begin)
        p_row = p_row_stats + 4 * o_line
        p_dq_head = p_dq
        if p_dq is not None and not DESCRIPTORS:
            p_dq_head = p_dq + o_line * BLOCK_D
        mask = Mask(
            None if attn_mask is None else mask_of_head(attn_mask, o_b, o_h),
            None if alibi_slopes is None else alibi_slope_of_head(alibi_slopes, o_b, o_h), left, right,
        )  # fmt: skip
        for EDGE in tl.static_range(2):
            start_m = visited.full_begin
            # Without licm: addresses computed before a loop would stay in registers and spill.
            count = block_count(visited, EDGE)
            for i in tl.range(0, count, disable_licm=EDGE or (TRANSPOSE_DQ and BLOCK_D > 128)):
                if EDGE:
                    start_m = edge_begin(visited, i, BLOCK_M)
                o_m = start_m + o_row
                b_q = load_rows(
                    p_q_head, i_b, i_h, start_m, o_row, o_d, s_q, seqlen.Lq, D, BLOCK_D, EDGE, DESCRIPTORS
                )  # [BLOCK_M, BLOCK_D]
                b_grad = load_rows(
                    p_grad_head, i_b, i_h, start_m, o_row, o_dv, s_grad, seqlen.Lq,
                    DV, BLOCK_DV, EDGE, DESCRIPTORS,
                )  # [BLOCK_M, BLOCK_DV]  # fmt: skip
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                b_s, b_softcap_grad = scale_scores(b_s, scale, softcap, DEFER_SCALE)
                b_s = apply_mask(b_s, o_m[None, :], o_n[:, None], mask, seqlen, False)
                if EDGE:
                    b_s = apply_window_by_columns(b_s, o_row, o_n, start_m, mask, seqlen, BLOCK_M)
                b_m = load_row_stats(p_row, o_m, seqlen.Lq, float("inf"), EDGE)  # [BLOCK_M]
                b_l = load_row_stats(p_row + 1, o_m, seqlen.Lq, 0.0, EDGE)  # [BLOCK_M]
                b_p = tl.exp2(tl.fma(b_s, exponent_scale, -b_m[None, :]) * LOG2E - b_l[None, :])
                b_rp = b_p  # [BLOCK_N, BLOCK_M]
                if dropout is not None:
                    p_seed, keep_scale = dropout
                    seed = tl.load(p_seed)
                    b_keep = tl.trans(keep_tile(seed, dropout_threshold, i_b, i_h, o_m, start_n, BLOCK_N))
                    b_rp = tl.where(b_keep, b_p * keep_scale, 0.0)
                b_dv = tl.dot(b_rp.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
                b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                if dropout is not None:
                    b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
                b_delta = load_row_stats(p_row + 2, o_m, seqlen.Lq, 0.0, EDGE)  # [BLOCK_M]
                if DELTA_IN_TILE:
                    b_delta += tl.sum(tl.where(b_p == 0.0, 0.0, b_p * b_dp), 0)
                b_ds = b_p * (b_dp - b_delta[None, :])
                if softcap is not None:
                    b_ds *= b_softcap_grad
                b_ds = b_ds.to(b_q.dtype)
                b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
                if p_dq is not None:
                    # [BLOCK_M, BLOCK_D]; k^T ds uses wgmma whatever BLOCK_M, and no registers for ds^T
                    if TRANSPOSE_DQ and (EDGE or BLOCK_M < 64):
                        b_dq = tl.trans(tl.dot(tl.trans(b_k), b_ds, input_precision=PRECISION))
                    else:
                        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION)
                    add_rows(
                        p_dq_head, i_b, i_h, start_m, b_dq, o_row, o_d, seqlen.Lq, BLOCK_D, EDGE, DESCRIPTORS
                    )
                if not EDGE:
                    start_m += BLOCK_M

    p_dk = head_pointer(p_dk, o_b, o_hk, seqlen.k_begin + start_n, s_dk, False)
    p_dv = head_pointer(p_dv, o_b, o_hk, seqlen.k_begin + start_n, s_dv, False)
    store_rows(p_dk, b_dk * scale, o_col, o_d, s_dk, seqlen.Lk - start_n, D)
    store_rows(p_dv, b_dv, o_col, o_dv, s_dv, seqlen.Lk - start_n, DV)


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_dq(
    p_q, p_k, p_v, p_grad, p_row_stats,
    cu_seqlens, attn_mask, alibi_slopes, dropout, dropout_threshold,
    s_q, s_k, s_v, s_grad,
    Lq, Lk, left, right, folded_heads, scale, softcap,
    p_dq, s_dq,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, DEFER_SCALE: tl.constexpr,
    DELTA_IN_TILE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    i_block, blocks, i_h, H, i_b = program_ids(folded_heads)
    start_m = (blocks - 1 - i_block) * BLOCK_M  # causal: the longest rows first
    stats_rows = Lq
    seqlen = seqlen_info(cu_seqlens, i_b, Lq, Lk, LOWER_RIGHT)
    if cu_seqlens is not None:  # noqa: SIM102  (a constant, and a value)
        if start_m >= seqlen.Lq:
            return
    o_b = i_b.to(tl.int64)
    o_h = i_h.to(tl.int64)
    i_hk = i_h // GROUP
    o_hk = i_hk.to(tl.int64)
    o_row = tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_m = start_m + o_row
    p_q = head_pointer(p_q, o_b, o_h, seqlen.q_begin, s_q, DESCRIPTORS)
    p_grad = head_pointer(p_grad, o_b, o_h, seqlen.q_begin, s_grad, DESCRIPTORS)
    p_k = head_pointer(p_k, o_b, o_hk, seqlen.k_begin, s_k, DESCRIPTORS)
    p_v = head_pointer(p_v, o_b, o_hk, seqlen.k_begin, s_v, DESCRIPTORS)
    mask = Mask(
        None if attn_mask is None else mask_of_head(attn_mask, o_b, o_h),
        None if alibi_slopes is None else alibi_slope_of_head(alibi_slopes, o_b, o_h), left, right,
    )  # fmt: skip
    p_row = p_row_stats + 4 * first_row(cu_seqlens, o_b, o_h, H, stats_rows, seqlen.q_begin)
    b_q = load_rows(p_q, i_b, i_h, start_m, o_row, o_d, s_q, seqlen.Lq, D, BLOCK_D, True, DESCRIPTORS)
    b_grad = load_rows(
        p_grad, i_b, i_h, start_m, o_row, o_dv, s_grad, seqlen.Lq, DV, BLOCK_DV, True, DESCRIPTORS
    )
    # IEEE fp32 products spill with q and grad as the left factors, so that k and v are.
    TRANSPOSED: tl.constexpr = b_q.dtype == tl.float32 and PRECISION == "ieee"
    b_m = load_row_stats(p_row, o_m, seqlen.Lq, float("inf"), True)  # [BLOCK_M]
    b_l = load_row_stats(p_row + 1, o_m, seqlen.Lq, 0.0, True)  # [BLOCK_M]
    b_delta = load_row_stats(p_row + 2, o_m, seqlen.Lq, 0.0, True)  # [BLOCK_M]
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    exponent_scale = deferred_scale(scale, softcap, DEFER_SCALE)

    visited = block_range_of_rows(seqlen, start_m, left, right, BLOCK_M, BLOCK_N)
    for EDGE in tl.static_range(2):
        for i in range(0, block_count(visited, EDGE)):
            start_n = visited.full_begin + i * BLOCK_N
            if EDGE:
                start_n = edge_begin(visited, i, BLOCK_N)
            o_n = start_n + o_col
            b_k = load_rows(
                p_k, i_b, i_hk, start_n, o_col, o_d, s_k, seqlen.Lk, D, BLOCK_D, EDGE, DESCRIPTORS
            )  # [BLOCK_N, BLOCK_D]
            if TRANSPOSED:
                b_s = tl.trans(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION))  # [BLOCK_M, BLOCK_N]
            else:
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_s, b_softcap_grad = scale_scores(b_s, scale, softcap, DEFER_SCALE)
            b_s = apply_mask(b_s, o_m[:, None], o_n[None, :], mask, seqlen, EDGE)
            b_p = tl.exp2(tl.fma(b_s, exponent_scale, -b_m[:, None]) * LOG2E - b_l[:, None])
            b_v = load_rows(
                p_v, i_b, i_hk, start_n, o_col, o_dv, s_v, seqlen.Lk, DV, BLOCK_DV, EDGE, DESCRIPTORS
            )  # [BLOCK_N, BLOCK_DV]
            if TRANSPOSED:
                b_dp = tl.trans(tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION))  # [BLOCK_M, BLOCK_N]
            else:
                b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
            if dropout is not None:
                p_seed, keep_scale = dropout
                b_keep = keep_tile(tl.load(p_seed), dropout_threshold, i_b, i_h, o_m, start_n, BLOCK_N)
                b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
            if DELTA_IN_TILE:
                b_delta += tl.sum(tl.where(b_p == 0.0, 0.0, b_p * b_dp), 1)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if softcap is not None:
                b_ds *= b_softcap_grad
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)

    p_dq = head_pointer(p_dq, o_b, o_h, seqlen.q_begin + start_m, s_dq, False)
    store_rows(p_dq, b_dq * scale, o_row, o_d, s_dq, seqlen.Lq - start_m, D)


def attention_bwd(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    attn_mask: Tensor | None,
    alibi_slopes: Tensor | None,
    seed: Tensor | None,
    scale: float,
    lower_right: bool,
    left: int,
    right: int,
    softcap: float,
    dropout_p: float,
    mask_grad: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dq, dk, dv and dmask of the mask's shape; empty unless mask_grad."""
    gradients = tuple(empty_blhd(x, *x.shape[1:]) for x in (q, k, v))
    options = AttentionOptions(
        attn_mask, alibi_slopes, seed, scale, lower_right, left, right, softcap, dropout_p
    )
    dmask = None
    if mask_grad:
        assert attn_mask is not None
        dmask = attn_mask.new_empty(attn_mask.shape, dtype=torch.float32)
    launch_bwd(*gradients, grad_out, grad_lse, q, k, v, out, stats, None, options, deterministic, dmask)
    return *gradients, q.new_empty(0) if dmask is None else dmask.to(attn_mask.dtype)


def launch_bwd(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    packed: PackedDocuments | None,
    options: AttentionOptions,
    deterministic: bool,
    dmask: Tensor | None = None,
) -> None:
    """Write dq, dk and dv, and dmask if it is given.

    Args:
        packed: if given, all tensors are views that `PackedDocuments` makes.
        dmask: fp32, contiguous.
    """
    rows_contiguous("attention_bwd_triton", q=q, k=k, v=v)
    B, H, Hk = *q.shape[:2], v.shape[1]
    max_rows, max_columns = max_lengths(q, k, packed)
    # Packed documents share one memory: work on every row is done once, on the first entry, which is a view of all.
    once = slice(None) if packed is None else slice(1)
    if grad_out.stride(3) != 1:  # an expanded scalar, as out.sum() makes; the kernels load contiguous rows
        grad_out = grad_out[once].contiguous().expand_as(out)
    const = constexprs(q, k, v, options.lower_right)
    descriptors = DESCRIPTORS_IN_BWD and use_descriptors(packed, q, k, v, grad_out)
    kernels = ("dkv", "dq") if deterministic else ("bwd", "bwd") if dmask is None else ("bwd", "dq")
    small = [tile_sizes(kernel, q, v, False, descriptors) for kernel in kernels]
    delta_in_tile = max_columns <= min(columns for _, columns, *_ in small)
    # The sum for delta needs registers, which the tiles for calls with options leave free.
    tile, dq_tile = (
        small if delta_in_tile else [tile_sizes(kernel, q, v, options.plain, descriptors) for kernel in kernels]
    )
    with on_device_of(q):
        row_stats = attention_bwd_preprocess(out[once], grad_out[once], stats[once], grad_lse, delta_in_tile)
    arguments = (
        row_stats,
        cu_seqlens_of(packed),
        *optional_arguments(options),
        q.stride()[:3],
        k.stride()[:3],
        v.stride()[:3],
        grad_out.stride()[:3],
        *lengths_and_window(q, k, options),
    )
    dq_sum = None
    if not deterministic:
        shape = (*row_stats.shape[:3], const["BLOCK_D"])
        dq_sum = q.new_zeros(shape, dtype=torch.float32).expand(B, -1, -1, -1)
    with on_device_of(q):
        if B * Hk * max_columns:
            block_m, block_n, warps, stages = tile
            grid, folded_heads = grid_of(cdiv(max_columns, block_n), Hk, B)
            _attention_bwd[grid](
                *as_descriptors(descriptors, (q, block_m), (k, block_n), (v, block_n), (grad_out, block_m)),
                *arguments,
                folded_heads,
                options.scale,
                options.softcap or None,
                dk,
                dv,
                *as_descriptors(descriptors and dq_sum is not None, (dq_sum, block_m)),
                dk.stride()[:3],
                dv.stride()[:3],
                **const,
                DESCRIPTORS=descriptors,
                TRANSPOSE_DQ=transposes_dq(q, descriptors),
                DEFER_SCALE=options.defers_scale,
                DELTA_IN_TILE=delta_in_tile,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=warps,
                num_stages=stages,
            )
        if B * H * max_rows and dq_sum is None:
            block_m, block_n, warps, stages = dq_tile
            grid, folded_heads = grid_of(cdiv(max_rows, block_m), H, B)
            _attention_bwd_dq[grid](
                *as_descriptors(descriptors, (q, block_m), (k, block_n), (v, block_n), (grad_out, block_m)),
                *arguments,
                folded_heads,
                options.scale,
                options.softcap or None,
                dq,
                dq.stride()[:3],
                **const,
                DESCRIPTORS=descriptors,
                DEFER_SCALE=options.defers_scale,
                DELTA_IN_TILE=delta_in_tile,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=warps,
                num_stages=stages,
            )
        if dmask is not None:
            launch_mask_grad(dmask, grad_out, q, k, v, row_stats, options, dq_tile, delta_in_tile)
    if dq_sum is not None:
        attention_bwd_postprocess(dq_sum[once], options.scale, dq[once])
