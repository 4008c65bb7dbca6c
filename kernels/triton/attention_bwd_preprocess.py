"""Attention's backward before and after its main kernels (attention_bwd.py). Before: three numbers of each row.

    m, l in units of log 2, and delta = sum_d out_d dout_d - dlse

or delta = -dlse where the main kernels add the sum (DELTA_IN_TILE). Why dlse is subtracted: s_ij changes the output
through p_ij and the log-sum-exp by p_ij, so that ds_ij = p_ij (dp_ij - sum_d out_id dout_id + dlse_i).

Shapes: out, grad_out (B, H, Lq, DV), stats (B, H, Lq, 2), grad_lse (B, H, Lq), row_stats (B, H, Lq, 4). Bytes: out and
grad_out are read once. The fourth number of a row is unused: four numbers side by side have one address.

After: dq is the fp32 sum of the main kernel, scaled and rounded.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .attention_launch import grid_of
from .attention_tiles import UNSPECIALIZED, program_ids
from .checks import contiguous, rows_contiguous
from .common import LOG2E, cdiv, next_power_of_2

BLOCK_BYTES = 4096  # the kernel is bound by memory: small blocks keep many loads in flight


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_preprocess(
    p_out, p_grad, p_stats, p_grad_lse, p_row_stats,
    s_out, s_grad,  # strides over batch, head and row
    Lq, folded_heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, DELTA_IN_TILE: tl.constexpr, BLOCK_M: tl.constexpr,
):
    # fmt: on
    i_block, _, i_h, H, i_b = program_ids(folded_heads)
    o_b = i_b.to(tl.int64)
    o_h = i_h.to(tl.int64)
    o_m = i_block * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = o_m[:, None].to(tl.int64)
    o_dv = tl.arange(0, BLOCK_DV)[None, :]
    m_m = o_m < Lq
    m = m_m[:, None] & (o_dv < DV)
    b_delta = tl.zeros((BLOCK_M,), tl.float32)
    if not DELTA_IN_TILE:
        p_out += o_b * s_out[0] + o_h * s_out[1]
        p_grad += o_b * s_grad[0] + o_h * s_grad[1]
        b_out = tl.load(p_out + o_row * s_out[2] + o_dv, mask=m, other=0.0)  # [BLOCK_M, BLOCK_DV]
        b_grad = tl.load(p_grad + o_row * s_grad[2] + o_dv, mask=m, other=0.0)  # [BLOCK_M, BLOCK_DV]
        b_delta = tl.sum(b_out.to(tl.float32) * b_grad.to(tl.float32), 1)
    o = (o_b * H + o_h) * Lq + o_m
    if p_grad_lse is not None:
        b_delta -= tl.load(p_grad_lse + o, mask=m_m, other=0.0)
    b_m = tl.load(p_stats + 2 * o, mask=m_m, other=0.0)
    b_l = tl.load(p_stats + 2 * o + 1, mask=m_m, other=0.0)
    # A row that sees no column gets m = inf: exp2(s - inf) is 0.
    tl.store(p_row_stats + 4 * o, tl.where(b_m == float("-inf"), float("inf"), b_m), mask=m_m)
    tl.store(p_row_stats + 4 * o + 1, b_l * LOG2E, mask=m_m)
    tl.store(p_row_stats + 4 * o + 2, b_delta, mask=m_m)


@triton.jit
def load_row_stats(p_first, o_m, Lq, other, EDGE: tl.constexpr):
    """Load every fourth number from p_first on, one for each row; `other` in rows from Lq on.

    The offset is compared, not the row: the row would be one more value to keep, which spills 15 registers at a head
    dimension of 64.
    """
    o = 4 * o_m
    if EDGE:
        return tl.load(p_first + o, mask=o < 4 * Lq, other=other)
    else:
        return tl.load(p_first + o)


def attention_bwd_preprocess(
    out: Tensor, grad_out: Tensor, stats: Tensor, grad_lse: Tensor | None, delta_in_tile: bool
) -> Tensor:
    """Return row_stats (B, H, Lq, 4), fp32."""
    rows_contiguous("attention_bwd_triton", out=out, grad_out=grad_out)
    contiguous("attention_bwd_triton", stats=stats, grad_lse=grad_lse)
    B, H, Lq, DV = out.shape
    row_stats = stats.new_empty(B, H, Lq, 4)
    if row_stats.numel():
        block_dv = max(next_power_of_2(DV), 16)
        block_m = max(BLOCK_BYTES // (block_dv * out.element_size()), 1)
        grid, folded_heads = grid_of(cdiv(Lq, block_m), H, B)
        _attention_bwd_preprocess[grid](
            out,
            grad_out,
            stats,
            grad_lse,
            row_stats,
            out.stride()[:3],
            grad_out.stride()[:3],
            Lq,
            folded_heads,
            DV,
            block_dv,
            delta_in_tile,
            block_m,
            num_warps=4,
        )
    return row_stats


def attention_bwd_postprocess(dq_sum: Tensor, scale: float, dq: Tensor) -> None:
    """Scale the fp32 sums (B, H, Lq, BLOCK_D) of dq and round them to dq (B, H, Lq, D)."""
    torch.mul(dq_sum[..., : dq.shape[3]], scale, out=dq)
