"""The backward of attention: the gradient of a mask that was added to the scores. Symbols are those of attention.py.

    dmask_ij = sum p_ij (dp_ij - delta_i)

over the dimensions along which the mask was broadcast. One program per tile of the mask: it computes the tiles of s and
dp of every batch entry, head, row block and column block that the tile was added to, and sums them in registers. No two
programs write the same number, so that the order of the additions is the same in every run, and nothing is stored
beside the result. Two of the backward's five products are computed a second time.

Shapes: dmask (B or 1, H or 1, Lq or 1, Lk or 1), contiguous, fp32; a dimension of 1 is summed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .attention_bwd_preprocess import load_row_stats
from .attention_config import Tile
from .attention_launch import AttentionOptions, constexprs, grid_of, lengths_and_window, optional_arguments
from .attention_scores import (
    Mask,
    alibi_slope_of_head,
    apply_mask,
    deferred_scale,
    mask_of_head,
    scale_scores,
)
from .attention_tiles import UNSPECIALIZED, head_pointer, load_rows, program_ids, seqlen_info
from .common import LOG2E, cdiv
from .philox import keep_tile


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_mask_grad(
    p_q, p_k, p_v, p_grad,
    p_row_stats,  # (B, H, Lq, 4): m, l in units of log 2 and delta of each row
    attn_mask, alibi_slopes, dropout, dropout_threshold,  # as in the forward
    s_q, s_k, s_v, s_grad,  # strides over batch, head and row
    Lq, Lk, left, right, folded_heads, scale, softcap,
    p_dmask,
    B, H,  # of q
    GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    LOWER_RIGHT: tl.constexpr, PRECISION: tl.constexpr,
    DELTA_IN_TILE: tl.constexpr,  # a tile has all columns, and delta is summed over them
    SUM_BATCH: tl.constexpr, SUM_HEADS: tl.constexpr, SUM_ROWS: tl.constexpr, SUM_COLUMNS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):
    # fmt: on
    i_tile, _, i_h, mask_heads, i_b = program_ids(folded_heads)
    seqlen = seqlen_info(None, i_b, Lq, Lk, LOWER_RIGHT)
    columns = 1 if SUM_COLUMNS else Lk
    column_blocks = tl.cdiv(columns, BLOCK_N)
    first_m = i_tile // column_blocks * BLOCK_M
    first_n = i_tile % column_blocks * BLOCK_N
    o_row = tl.arange(0, BLOCK_M)
    o_col = tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    o_dv = tl.arange(0, BLOCK_DV)
    b_dmask = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    exponent_scale = deferred_scale(scale, softcap, False)

    for b in range(0 if SUM_BATCH else i_b, B if SUM_BATCH else i_b + 1):
        o_b = tl.cast(b, tl.int64)
        for h in range(0 if SUM_HEADS else i_h, H if SUM_HEADS else i_h + 1):
            o_h = tl.cast(h, tl.int64)
            o_hk = o_h // GROUP
            p_q_head = head_pointer(p_q, o_b, o_h, 0, s_q, False)
            p_k_head = head_pointer(p_k, o_b, o_hk, 0, s_k, False)
            p_v_head = head_pointer(p_v, o_b, o_hk, 0, s_v, False)
            p_grad_head = head_pointer(p_grad, o_b, o_h, 0, s_grad, False)
            p_row = p_row_stats + 4 * (o_b * H + o_h) * Lq
            mask = Mask(
                mask_of_head(attn_mask, o_b, o_h),
                None if alibi_slopes is None else alibi_slope_of_head(alibi_slopes, o_b, o_h), left, right,
            )  # fmt: skip
            for start_m in range(first_m, Lq if SUM_ROWS else first_m + BLOCK_M, BLOCK_M):
                o_m = start_m + o_row
                b_q = load_rows(p_q_head, b, h, start_m, o_row, o_d, s_q, Lq, D, BLOCK_D, True, False)
                b_grad = load_rows(p_grad_head, b, h, start_m, o_row, o_dv, s_grad, Lq, DV, BLOCK_DV, True, False)
                b_m = load_row_stats(p_row, o_m, Lq, float("inf"), True)  # [BLOCK_M]
                b_l = load_row_stats(p_row + 1, o_m, Lq, 0.0, True)  # [BLOCK_M]
                b_delta = load_row_stats(p_row + 2, o_m, Lq, 0.0, True)  # [BLOCK_M]
                begin_n = first_n
                end_n = Lk if SUM_COLUMNS else first_n + BLOCK_N
                if left is not None:
                    begin_n = tl.maximum(begin_n, (start_m + seqlen.diagonal - left) // BLOCK_N * BLOCK_N)
                if right is not None:
                    end_n = tl.minimum(end_n, start_m + BLOCK_M + seqlen.diagonal + right)
                for start_n in range(begin_n, end_n, BLOCK_N):
                    o_n = start_n + o_col
                    b_k = load_rows(p_k_head, b, h, start_n, o_col, o_d, s_k, Lk, D, BLOCK_D, True, False)
                    b_v = load_rows(p_v_head, b, h, start_n, o_col, o_dv, s_v, Lk, DV, BLOCK_DV, True, False)
                    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                    b_s, _softcap_grad = scale_scores(b_s, scale, softcap, False)
                    b_s = apply_mask(b_s, o_m[:, None], o_n[None, :], mask, seqlen, True)
                    b_p = tl.exp2(tl.fma(b_s, exponent_scale, -b_m[:, None]) * LOG2E - b_l[:, None])
                    b_dp = tl.dot(b_grad, tl.trans(b_v), input_precision=PRECISION)  # [BLOCK_M, BLOCK_N]
                    if dropout is not None:
                        p_seed, keep_scale = dropout
                        b_keep = keep_tile(tl.load(p_seed), dropout_threshold, b, h, o_m, start_n, BLOCK_N)
                        b_dp = tl.where(b_keep, b_dp * keep_scale, 0.0)
                    b_sum = b_delta
                    if DELTA_IN_TILE:
                        b_sum += tl.sum(tl.where(b_p == 0.0, 0.0, b_p * b_dp), 1)
                    b_dmask += tl.where(b_p == 0.0, 0.0, b_p * (b_dp - b_sum[:, None]))

    o_i = first_m + o_row
    o_j = first_n + o_col
    rows = Lq
    if SUM_ROWS:
        b_dmask = tl.where(o_row[:, None] == 0, tl.sum(b_dmask, 0)[None, :], 0.0)
        rows = 1
    if SUM_COLUMNS:
        b_dmask = tl.where(o_col[None, :] == 0, tl.sum(b_dmask, 1)[:, None], 0.0)
    p_dmask += (tl.cast(i_b, tl.int64) * mask_heads + i_h) * rows * columns
    p_block = p_dmask + o_i[:, None].to(tl.int64) * columns + o_j[None, :]
    tl.store(p_block, b_dmask, mask=(o_i[:, None] < rows) & (o_j[None, :] < columns))


def launch_mask_grad(
    dmask: Tensor,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row_stats: Tensor,
    options: AttentionOptions,
    tile: Tile,
    delta_in_tile: bool,
) -> None:
    """Write dmask.

    Args:
        dmask: contiguous, fp32, of the mask's shape.
        tile: of the kernel "dq", which has the same factors in shared memory.
    """
    B, H, Lq, Lk = *q.shape[:2], q.shape[2], k.shape[2]
    summed = [wide == 1 for wide in dmask.shape]
    if not all((B, H, Lq, Lk)):
        dmask.zero_()
        return
    block_m, block_n, warps, stages = tile
    tiles = cdiv(dmask.shape[2], block_m) * cdiv(dmask.shape[3], block_n)
    grid, folded_heads = grid_of(tiles, dmask.shape[1], dmask.shape[0])
    _attention_mask_grad[grid](
        q,
        k,
        v,
        grad_out,
        row_stats,
        *optional_arguments(options),
        q.stride()[:3],
        k.stride()[:3],
        v.stride()[:3],
        grad_out.stride()[:3],
        *lengths_and_window(q, k, options),
        folded_heads,
        options.scale,
        options.softcap or None,
        dmask,
        B,
        H,
        **constexprs(q, k, v, options.lower_right),
        DELTA_IN_TILE=delta_in_tile,
        SUM_BATCH=summed[0],
        SUM_HEADS=summed[1],
        SUM_ROWS=summed[2],
        SUM_COLUMNS=summed[3],
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        num_warps=warps,
        num_stages=stages,
    )
