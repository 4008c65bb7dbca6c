"""The backward of attention; the mathematics is in attention.py, whose names these are.

What a row needs, m, l in base 2 and delta, is made first (attention_bwd_rows.py). Where a tile has all columns (ONE),
delta is sum_j p_ij dp_ij, computed in the main kernels, and not a sum over out, which is rounded. The main kernel
has a program per BLOCK_N columns walk over the rows. It works on transposed tiles, [BLOCK_N, BLOCK_M]: p^T and ds^T
then are the left factors of dv += p^T dout and dk += ds^T q as they stand in registers, without a way through shared
memory. ds also makes the tile's share of dQ, which is added to an fp32 sum in memory: five products a tile, and an
order of additions that differs from run to run. Deterministic: the kernel leaves dQ out, and another one, a program
per BLOCK_M rows, computes s and dp again: seven products, the same bits every time. A GQA group's query heads are
summed within the program of their key head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_bwd_rows import launch_rows, load_statistic
from fastgpt.kernels.attention_tile_sizes import DESCRIBED_BWD, keys_left, tile_sizes
from fastgpt.kernels.attention_tiles import (
    UNSPECIALIZED,
    Documents,
    add_rows,
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
from fastgpt.kernels.common import LOG2E, cdiv, on_device_of
from fastgpt.kernels.philox import keep_tile


@triton.jit
def _seen(
    o_row, o_n, Lk, offset, left, right,
    ROWS: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr,
):  # fmt: skip
    """Which of ROWS rows see the columns o_n, of a tile that lies [columns, rows]; offset is that of the tile's rows.

    A column's first and last row are compared, not each row's columns: two numbers a thread instead of sixteen.
    """
    first = o_n * 0
    if HAS_RIGHT:
        first = o_n - (offset + right)
    m = o_row[None, :] >= tl.where(o_n < Lk, first, ROWS)[:, None]
    if HAS_LEFT:
        m = m & (o_row[None, :] <= (o_n - (offset - left))[:, None])
    return m


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd(
    p_q, p_k, p_v, p_grad,
    p_rows,  # (B, H, Lq, 4): m, l in base 2 and delta of each row, side by side so that one address serves all
    documents, mask, slopes, dropout,  # None, or a tuple of pointers and numbers
    threshold,  # of dropout
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gm,
    Lq, Lk, left, right, heads, scale, softcap,
    p_dk, p_dv,
    p_dq,  # (B, H, Lq, BLOCK_D) in fp32, contiguous, unscaled, zero at first; or None
    s_dkb, s_dkh, s_dkn, s_dvb, s_dvh, s_dvn,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, KEYS_LEFT: tl.constexpr,
    RAW: tl.constexpr,  # as in the forward
    ONE: tl.constexpr,  # a tile has all columns
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    i_tile, _, i_hk, Hk, i_b = program(heads)
    start_n = i_tile * BLOCK_N  # causal: the columns that most rows see first
    lines = Lq
    begin_q, begin_k, Lq, Lk, offset = place(documents, i_b, Lq, Lk, LOWER_RIGHT)
    if documents is not None:  # noqa: SIM102  (a constant, and a value)
        if start_n >= Lk:
            return
    o_b = i_b.to(tl.int64)
    o_hk = i_hk.to(tl.int64)
    o_start = begin_k + start_n
    o_row = tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_n = start_n + o_col
    p_k = head(p_k, o_b, o_hk, begin_k, s_kb, s_kh, s_kn, DESCRIPTORS)
    p_v = head(p_v, o_b, o_hk, begin_k, s_vb, s_vh, s_vn, DESCRIPTORS)
    b_k = load_rows(p_k, i_b, i_hk, start_n, o_col, o_d, s_kn, Lk, D, BLOCK_D, True, DESCRIPTORS)
    b_v = load_rows(p_v, i_b, i_hk, start_n, o_col, o_dv, s_vn, Lk, DV, BLOCK_DV, True, DESCRIPTORS)
    b_dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dv = tl.zeros((BLOCK_N, BLOCK_DV), tl.float32)
    unit = unit_of(scale, softcap, SOFTCAP, RAW)

    # Column j is seen by the rows j - offset - right .. j - offset + left.
    last_n = tl.minimum(start_n + BLOCK_N, Lk) - 1
    whole = start_n + BLOCK_N <= Lk  # else exp2(0 - lse) of columns that are none may overflow
    full, full_count, before, before_count, behind, behind_count = visited_tiles(
        start_n, last_n, Lq, -offset - right, left - offset, BLOCK_M, HAS_RIGHT, HAS_LEFT, whole
    )
    for i_group in range(0, GROUP):
        i_h = i_hk * GROUP + i_group
        o_h = i_h.to(tl.int64)
        p_q_head = head(p_q, o_b, o_h, begin_q, s_qb, s_qh, s_qm, DESCRIPTORS)
        p_grad_head = head(p_grad, o_b, o_h, begin_q, s_gb, s_gh, s_gm, DESCRIPTORS)
        o_line = first_line(documents, o_b, o_h, Hk * GROUP, lines, begin_q)
        p_row = p_rows + 4 * o_line
        p_dq_head = p_dq
        if p_dq is not None and not DESCRIPTORS:
            p_dq_head = p_dq + o_line * BLOCK_D
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
        for EDGE in tl.static_range(2):
            count = full_count
            if EDGE:
                count = before_count + behind_count
            start_m = full
            # Addresses that are kept from before a loop spill where registers are few.
            for i in tl.range(0, count, disable_licm=EDGE or (KEYS_LEFT and BLOCK_D > 128)):
                if EDGE:
                    start_m = tl.where(
                        i < before_count, before + i * BLOCK_M, behind + (i - before_count) * BLOCK_M
                    )
                o_m = start_m + o_row
                b_q = load_rows(
                    p_q_head, i_b, i_h, start_m, o_row, o_d, s_qm, Lq, D, BLOCK_D, EDGE, DESCRIPTORS
                )  # [BLOCK_M, BLOCK_D]
                b_grad = load_rows(
                    p_grad_head, i_b, i_h, start_m, o_row, o_dv, s_gm, Lq, DV, BLOCK_DV, EDGE, DESCRIPTORS
                )  # [BLOCK_M, BLOCK_DV]
                b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                b_s, b_cap_slope = scores(
                    b_s, o_m[None, :], o_n[:, None], p_mask, s_mm, s_mn, slope, Lq, Lk, offset, left, right,
                    scale, softcap, HAS_LEFT, HAS_RIGHT, SOFTCAP, RAW, False,
                )  # fmt: skip
                if EDGE:
                    m = _seen(o_row, o_n, Lk, offset + start_m, left, right, BLOCK_M, HAS_LEFT, HAS_RIGHT)
                    b_s = tl.where(m, b_s, float("-inf"))
                b_high = load_statistic(p_row, o_m, Lq, float("inf"), EDGE)  # [BLOCK_M]
                b_low = load_statistic(p_row + 1, o_m, Lq, 0.0, EDGE)  # [BLOCK_M]
                b_p = tl.exp2(tl.fma(b_s, unit, -b_high[None, :]) * LOG2E - b_low[None, :])  # [BLOCK_N, BLOCK_M]
                b_r = b_p
                if dropout is not None:
                    seed = tl.load(dropout[0])
                    b_keep = tl.trans(keep_tile(seed, threshold, i_b, i_h, o_m, start_n, BLOCK_N))
                    b_r = tl.where(b_keep, b_p * dropout[1], 0.0)
                b_dv = tl.dot(b_r.to(b_grad.dtype), b_grad, b_dv, input_precision=PRECISION)
                b_dp = tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
                if dropout is not None:
                    b_dp = tl.where(b_keep, b_dp * dropout[1], 0.0)
                b_delta = load_statistic(p_row + 2, o_m, Lq, 0.0, EDGE)  # [BLOCK_M]
                if ONE:
                    b_delta += tl.sum(tl.where(b_p == 0.0, 0.0, b_p * b_dp), 0)
                b_ds = b_p * (b_dp - b_delta[None, :])
                if SOFTCAP:
                    b_ds *= b_cap_slope
                b_ds = b_ds.to(b_q.dtype)
                b_dk = tl.dot(b_ds, b_q, b_dk, input_precision=PRECISION)
                if p_dq is not None:
                    # [BLOCK_M, BLOCK_D]; k^T ds takes wgmma however few the rows, and no registers for ds^T
                    if KEYS_LEFT and (EDGE or BLOCK_M < 64):
                        b_dq = tl.trans(tl.dot(tl.trans(b_k), b_ds, input_precision=PRECISION))
                    else:
                        b_dq = tl.dot(tl.trans(b_ds), b_k, input_precision=PRECISION)
                    add_rows(p_dq_head, i_b, i_h, start_m, b_dq, o_row, o_d, Lq, BLOCK_D, EDGE, DESCRIPTORS)
                if not EDGE:
                    start_m += BLOCK_M

    p_dk += o_b * s_dkb + o_hk * s_dkh + o_start * s_dkn
    p_dv += o_b * s_dvb + o_hk * s_dvh + o_start * s_dvn
    store_rows(p_dk, b_dk * scale, o_col, o_d, s_dkn, Lk - start_n, D)
    store_rows(p_dv, b_dv, o_col, o_dv, s_dvn, Lk - start_n, DV)


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_dq(
    p_q, p_k, p_v, p_grad, p_rows, documents, mask, slopes, dropout, threshold,
    s_qb, s_qh, s_qm, s_kb, s_kh, s_kn, s_vb, s_vh, s_vn, s_gb, s_gh, s_gm,
    Lq, Lk, left, right, heads, scale, softcap,
    p_dq, s_dqb, s_dqh, s_dqm,
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIPTORS: tl.constexpr, RAW: tl.constexpr, ONE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    i_tile, tiles, i_h, H, i_b = program(heads)
    start_m = (tiles - 1 - i_tile) * BLOCK_M  # causal: the longest rows first
    lines = Lq
    begin_q, begin_k, Lq, Lk, offset = place(documents, i_b, Lq, Lk, LOWER_RIGHT)
    if documents is not None:  # noqa: SIM102  (a constant, and a value)
        if start_m >= Lq:
            return
    o_b = i_b.to(tl.int64)
    o_h = i_h.to(tl.int64)
    i_hk = i_h // GROUP
    o_hk = i_hk.to(tl.int64)
    o_start = begin_q + start_m
    o_row = tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    o_m = start_m + o_row
    p_q = head(p_q, o_b, o_h, begin_q, s_qb, s_qh, s_qm, DESCRIPTORS)
    p_grad = head(p_grad, o_b, o_h, begin_q, s_gb, s_gh, s_gm, DESCRIPTORS)
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
    p_row = p_rows + 4 * first_line(documents, o_b, o_h, H, lines, begin_q)
    b_q = load_rows(p_q, i_b, i_h, start_m, o_row, o_d, s_qm, Lq, D, BLOCK_D, True, DESCRIPTORS)
    b_grad = load_rows(p_grad, i_b, i_h, start_m, o_row, o_dv, s_gm, Lq, DV, BLOCK_DV, True, DESCRIPTORS)
    # Multiply-adds of IEEE fp32 spill where q and grad are the left factors. Above they are the right ones.
    TRANSPOSED: tl.constexpr = b_q.dtype == tl.float32 and PRECISION == "ieee"
    b_high = load_statistic(p_row, o_m, Lq, float("inf"), True)  # [BLOCK_M]
    b_low = load_statistic(p_row + 1, o_m, Lq, 0.0, True)  # [BLOCK_M]
    b_delta = load_statistic(p_row + 2, o_m, Lq, 0.0, True)  # [BLOCK_M]
    b_dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    unit = unit_of(scale, softcap, SOFTCAP, RAW)

    last_m = tl.minimum(start_m + BLOCK_M, Lq) - 1
    full, full_count, before, before_count, behind, behind_count = visited_tiles(
        start_m, last_m, Lk, offset - left, offset + right, BLOCK_N, HAS_LEFT, HAS_RIGHT
    )
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
            if TRANSPOSED:
                b_s = tl.trans(tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION))  # [BLOCK_M, BLOCK_N]
            else:
                b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)
            b_s, b_cap_slope = scores(
                b_s, o_m[:, None], o_n[None, :], p_mask, s_mm, s_mn, slope, Lq, Lk, offset, left, right,
                scale, softcap, HAS_LEFT, HAS_RIGHT, SOFTCAP, RAW, EDGE,
            )  # fmt: skip
            b_p = tl.exp2(tl.fma(b_s, unit, -b_high[:, None]) * LOG2E - b_low[:, None])  # [BLOCK_M, BLOCK_N]
            b_v = load_rows(p_v, i_b, i_hk, start_n, o_col, o_dv, s_vn, Lk, DV, BLOCK_DV, EDGE, DESCRIPTORS)
            if TRANSPOSED:
                b_dp = tl.trans(tl.dot(b_v, tl.trans(b_grad), input_precision=PRECISION))  # [BLOCK_M, BLOCK_N]
            else:
                b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)
            if dropout is not None:
                b_keep = keep_tile(tl.load(dropout[0]), threshold, i_b, i_h, o_m, start_n, BLOCK_N)
                b_dp = tl.where(b_keep, b_dp * dropout[1], 0.0)
            if ONE:
                b_delta += tl.sum(tl.where(b_p == 0.0, 0.0, b_p * b_dp), 1)
            b_ds = b_p * (b_dp - b_delta[:, None])
            if SOFTCAP:
                b_ds *= b_cap_slope
            b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)

    p_dq += o_b * s_dqb + o_h * s_dqh + o_start * s_dqm
    store_rows(p_dq, b_dq * scale, o_row, o_d, s_dqm, Lq - start_m, D)


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
    """(dq, dk, dv, dmask); a mask that wants a gradient is refused before, so that dmask is empty."""
    gradients = tuple(head_major(x, *x.shape[1:]) for x in (q, k, v))
    extras = (attn_mask, alibi_slopes, seed)
    options = (scale, lower_right, left, right, softcap, dropout_p)
    launch_bwd(*gradients, grad_out, grad_lse, q, k, v, out, stats, None, *extras, *options, deterministic)
    return *gradients, q.new_empty(0)


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
    deterministic: bool,
) -> None:
    """Writes dq, dk and dv; tensors of documents are the views that `Documents.views` makes."""
    rows_contiguous("attention_bwd_triton", q=q, k=k, v=v)
    B, H = q.shape[:2]
    Hk = v.shape[1]
    most_rows, most_columns = longest(q, k, documents)
    # Documents lie in one memory: what is done to every row is done once, to the first entry's view of all.
    once = slice(None) if documents is None else slice(1)
    if grad_out.stride(3) != 1:  # an expanded scalar, as out.sum() makes: the tiles want whole lines
        grad_out = grad_out[once].contiguous().expand_as(out)
    raw = attn_mask is None and alibi_slopes is None and (scale > 0 or softcap > 0)
    plain = softcap == 0 and attn_mask is None and alibi_slopes is None and dropout_p == 0
    const = constants(q, k, v, lower_right, left, right, softcap)
    by_descriptors = DESCRIBED_BWD and describable(documents, q, k, v, grad_out)
    kernels = ("dkv", "dq") if deterministic else ("bwd", "bwd")
    small = [tile_sizes(kernel, q, v, False, by_descriptors) for kernel in kernels]
    one = most_columns <= min(columns for _, columns, *_ in small)
    # The sum takes registers, which the tiles of other than plain calls leave.
    tile, tile_of_dq = small if one else [tile_sizes(kernel, q, v, plain, by_descriptors) for kernel in kernels]
    with on_device_of(q):
        by_row = launch_rows(out[once], grad_out[once], stats[once], grad_lse, one)
    rest = (
        by_row,
        bounds(documents),
        *extras(attn_mask, alibi_slopes, seed, dropout_p),
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *grad_out.stride()[:3],
        *sizes(q, k, left, right),
    )
    total = None
    if not deterministic:
        shape = (*by_row.shape[:3], const["BLOCK_D"])
        total = q.new_zeros(shape, dtype=torch.float32).expand(B, -1, -1, -1)
    with on_device_of(q):
        if B * Hk * most_columns:
            block_m, block_n, warps, stages = tile
            grid, heads = grid_of(cdiv(most_columns, block_n), Hk, B)
            _attention_bwd[grid](
                *describe(by_descriptors, (q, block_m), (k, block_n), (v, block_n), (grad_out, block_m)),
                *rest,
                heads,
                scale,
                softcap,
                dk,
                dv,
                *describe(by_descriptors and total is not None, (total, block_m)),
                *dk.stride()[:3],
                *dv.stride()[:3],
                **const,
                DESCRIPTORS=by_descriptors,
                KEYS_LEFT=keys_left(q, by_descriptors),
                RAW=raw,
                ONE=one,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=warps,
                num_stages=stages,
            )
        if B * H * most_rows and total is None:
            block_m, block_n, warps, stages = tile_of_dq
            grid, heads = grid_of(cdiv(most_rows, block_m), H, B)
            _attention_bwd_dq[grid](
                *describe(by_descriptors, (q, block_m), (k, block_n), (v, block_n), (grad_out, block_m)),
                *rest,
                heads,
                scale,
                softcap,
                dq,
                *dq.stride()[:3],
                **const,
                DESCRIPTORS=by_descriptors,
                RAW=raw,
                ONE=one,
                BLOCK_M=block_m,
                BLOCK_N=block_n,
                num_warps=warps,
                num_stages=stages,
            )
    if total is not None:
        torch.mul(total[once][..., : q.shape[3]], scale, out=dq[once])
