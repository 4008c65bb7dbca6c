"""What attention's backward needs of each row, made before its main kernels: attention_bwd.py.

    m, l in base 2, and delta = sum_d out_d dout_d - dlse, or -dlse where the main kernels add the rest (ONE)

Bytes: out and grad_out are read once. The numbers lie side by side, four a row, so that one address serves all.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.attention_tiles import UNSPECIALIZED, grid_of, program
from fastgpt.kernels.checks import contiguous, rows_contiguous
from fastgpt.kernels.common import LOG2E, cdiv, next_power_of_2

TILE = 4096  # bytes of a program: it is bound by memory, and small tiles keep many in flight


# fmt: off
@triton.jit(do_not_specialize=UNSPECIALIZED)
def _attention_bwd_rows(
    p_out, p_grad, p_stats, p_grad_lse, p_rows,
    s_ob, s_oh, s_om, s_gb, s_gh, s_gm,
    Lq, heads,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ONE: tl.constexpr, BLOCK_M: tl.constexpr,
):
    # fmt: on
    i_tile, _, i_h, H, i_b = program(heads)
    o_b = i_b.to(tl.int64)
    o_h = i_h.to(tl.int64)
    o_m = i_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    o_row = o_m[:, None].to(tl.int64)
    o_dv = tl.arange(0, BLOCK_DV)[None, :]
    m_m = o_m < Lq
    m = m_m[:, None] & (o_dv < DV)
    b_delta = tl.zeros((BLOCK_M,), tl.float32)
    if not ONE:
        p_out += o_b * s_ob + o_h * s_oh
        p_grad += o_b * s_gb + o_h * s_gh
        b_out = tl.load(p_out + o_row * s_om + o_dv, mask=m, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_DV]
        b_grad = tl.load(p_grad + o_row * s_gm + o_dv, mask=m, other=0.0).to(tl.float32)
        b_delta = tl.sum(b_out * b_grad, 1)
    o = (o_b * H + o_h) * Lq + o_m
    if p_grad_lse is not None:
        b_delta -= tl.load(p_grad_lse + o, mask=m_m, other=0.0)
    # Rows that see nothing get inf: exp2(s - inf) is 0.
    b_high = tl.load(p_stats + 2 * o, mask=m_m, other=0.0)
    b_low = tl.load(p_stats + 2 * o + 1, mask=m_m, other=0.0)
    tl.store(p_rows + 4 * o, tl.where(b_high == float("-inf"), float("inf"), b_high), mask=m_m)
    tl.store(p_rows + 4 * o + 1, b_low * LOG2E, mask=m_m)
    tl.store(p_rows + 4 * o + 2, b_delta, mask=m_m)


@triton.jit
def load_statistic(p_first, o_m, Lq, other, EDGE: tl.constexpr):
    """Every fourth number from p_first on, one a row; rows that are none get the other.

    The offset is compared, not the row: another number a row to be kept spills 15 registers at a head size of 64.
    """
    o = 4 * o_m
    if EDGE:
        return tl.load(p_first + o, mask=o < 4 * Lq, other=other)
    else:
        return tl.load(p_first + o)


def launch_rows(out: Tensor, grad_out: Tensor, stats: Tensor, grad_lse: Tensor | None, one: bool) -> Tensor:
    """(B, H, Lq, 4) of out and grad_out (B, H, Lq, DV), stats (B, H, Lq, 2) and grad_lse (B, H, Lq)."""
    rows_contiguous("attention_bwd_triton", out=out, grad_out=grad_out)
    contiguous("attention_bwd_triton", stats=stats, grad_lse=grad_lse)
    B, H, Lq, DV = out.shape
    by_row = stats.new_empty(B, H, Lq, 4)
    if by_row.numel():
        block_dv = max(next_power_of_2(DV), 16)
        block = max(TILE // (block_dv * out.element_size()), 1)
        grid, heads = grid_of(cdiv(Lq, block), H, B)
        _attention_bwd_rows[grid](
            out,
            grad_out,
            stats,
            grad_lse,
            by_row,
            *out.stride()[:3],
            *grad_out.stride()[:3],
            Lq,
            heads,
            DV,
            block_dv,
            one,
            block,
            num_warps=4,
        )
    return by_row
