"""RMSNorm, alone and with the residual addition before it, in one kernel.

    sum = x + residual, rounded to its dtype;   n = sum rstd,   rstd = 1 / sqrt(mean(sum^2) + eps)
    normed = n w,   w = offset + weight

    g = grad_normed w
    dsum = rstd (g - n mean_j (g n)) + grad_sum
    dweight = sum_i grad_normed n

Shapes: x, residual (N, D) contiguous, weight (D,), rstd (N,) fp32. The arithmetic is fp32. The statistic is that of
the stored (rounded) sum, so that forward and backward use the same values; a row stays in registers for it. If the sum
of squares overflows, it is computed again for sum 2^-80, and rstd is 2^-80 / sqrt(mean).

Bytes moved per element: the forward has two reads and two writes (one of each without a residual), the backward three
reads (grad_normed, grad_sum, sum) and one write; it recomputes n from sum and rstd. dweight is summed in two stages
without atomics: a fixed number of programs sums strided rows, and PyTorch sums the partial sums. A row that does not
fit into registers together with its sum is cut into tiles. A first kernel then computes mean(g n) over the row, at the
cost of two more reads.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import contiguous
from .common import cdiv, next_power_of_2, on_device_of
from .tuned import chosen

# On every architecture. Forward: elements of a row per thread, up to 16 warps; two 16-byte loads in 16-bit dtypes.
ELEMENTS = 16
# Backward: (elements of a tile, warps, programs). There are about as many programs as fit into a GPU at once and no
# more, because each writes partial sums.
TILE = (4096, 8, 256)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _rms_norm_fwd(
    p_x,
    p_residual,
    p_weight,
    p_normed,
    p_sum,
    p_rstd,
    D,
    eps,
    offset,
    BLOCK_D: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.load(p_x + i_n * D + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    if p_residual is not None:
        b_sum += tl.load(p_residual + i_n * D + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_stored = b_sum.to(p_sum.dtype.element_ty)
        tl.store(p_sum + i_n * D + o_d, b_stored, mask=m_d)
        b_sum = b_stored.to(tl.float32)

    scale = 1.0
    squares = tl.sum(b_sum * b_sum, 0)
    if squares > LARGEST:
        scale = 8.271806125530277e-25  # 2^-80
        b_small = b_sum * scale  # [BLOCK_D]
        squares = tl.sum(b_small * b_small, 0)
    rstd = scale / tl.sqrt(squares / D + eps * scale * scale)
    tl.store(p_rstd + i_n, rstd)

    b_normed = b_sum * rstd
    if p_weight is not None:
        b_normed *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32) + offset
    tl.store(p_normed + i_n * D + o_d, b_normed.to(p_normed.dtype.element_ty), mask=m_d)


@triton.jit
def _rms_norm_bwd_rows(
    p_grad,
    p_sum,
    p_weight,
    p_rstd,
    p_means,
    D,
    offset,
    BLOCK_D: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    rstd = tl.load(p_rstd + i_n)
    b_products = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_sum = tl.load(p_sum + i_n * D + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        b_grad = tl.load(p_grad + i_n * D + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        if p_weight is not None:
            b_grad *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32) + offset
        b_products += b_grad * (b_sum * rstd)
    tl.store(p_means + i_n, tl.sum(b_products, 0) / D)


@triton.jit(do_not_specialize=["N"])
def _rms_norm_bwd(
    p_grad,  # of normed
    p_grad_sum,
    p_sum,
    p_weight,
    p_rstd,
    p_means,  # (N,) fp32: of g n; None if a tile has whole rows
    p_dsum,
    p_partial,  # (programs, D) fp32: dweight
    N,
    D,
    offset,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_partial = tl.program_id(0).to(tl.int64)
    partials = tl.num_programs(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32) + offset  # [BLOCK_D]
        # An elementwise sum, which is reduced over the rows of the tile once, at the end.
        b_dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i_tile in range(tl.program_id(0), (N + BLOCK_N - 1) // BLOCK_N, partials):
        o_n = tl.cast(i_tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m = m_n[:, None] & m_d[None, :]
        o = o_n[:, None] * D + o_d[None, :]
        b_rstd = tl.load(p_rstd + o_n, mask=m_n, other=0.0)  # [BLOCK_N]
        b_sum = tl.load(p_sum + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        b_n = b_sum * b_rstd[:, None]  # [BLOCK_N, BLOCK_D]
        if p_weight is not None:
            b_dweight += b_grad * b_n
            b_grad *= b_weight[None, :]
        # [BLOCK_N]
        b_mean = (
            tl.sum(b_grad * b_n, 1) / D if p_means is None else tl.load(p_means + o_n, mask=m_n, other=0.0)
        )
        b_dsum = (b_grad - b_n * b_mean[:, None]) * b_rstd[:, None]
        if p_grad_sum is not None:
            b_dsum += tl.load(p_grad_sum + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dsum + o, b_dsum.to(p_dsum.dtype.element_ty), mask=m)
    if p_weight is not None:
        tl.store(p_partial + i_partial * D + o_d, tl.sum(b_dweight, 0), mask=m_d)


def rms_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return normed and sum (N, D) and rstd (N,) fp32; without a residual, sum is empty."""
    contiguous("rms_norm_fwd_triton", x=x, residual=residual, weight=weight)
    N, D = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = x.new_empty(N, D, dtype=dtype)
    total = x.new_empty(0) if residual is None else x.new_empty(N, D, dtype=dtype)
    rstd = x.new_empty(N, dtype=torch.float32)
    if N:
        block_d = next_power_of_2(max(D, 1))
        warps = min(max(block_d // (32 * ELEMENTS), 1), 16)
        (warps,) = chosen("rms_norm_fwd", x, (D,), (warps,))
        with on_device_of(x):
            _rms_norm_fwd[(N,)](
                x, residual, weight, normed, total, rstd, D, eps, offset, block_d, num_warps=warps
            )
    return normed, total, rstd


def rms_norm_bwd(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    rstd: Tensor,
    offset: float,
) -> tuple[Tensor, Tensor]:
    """Return dsum (N, D) and dweight (D,) fp32, which is empty without a weight."""
    op = "rms_norm_bwd_triton"
    contiguous(op, grad_normed=grad_normed, grad_sum=grad_sum, total=sum, weight=weight, rstd=rstd)
    N, D = sum.shape
    dsum = torch.empty_like(sum)
    if not sum.numel():
        return dsum, sum.new_zeros(0 if weight is None else D, dtype=torch.float32)
    tile, warps, partials = chosen("rms_norm_bwd", sum, (D,), TILE)
    row = next_power_of_2(D)
    whole = row <= 2 * tile
    block_d = row if whole else tile
    pieces, block_n = cdiv(D, block_d), max(tile // block_d, 1)
    partials = min(cdiv(N, block_n), max(partials // pieces, 1))
    means = None if whole else sum.new_empty(N, dtype=torch.float32)
    partial = sum.new_empty(partials, 0 if weight is None else D, dtype=torch.float32)
    with on_device_of(sum):
        if means is not None:
            _rms_norm_bwd_rows[(N,)](
                grad_normed, sum, weight, rstd, means, D, offset, block_d, num_warps=warps
            )
        _rms_norm_bwd[(partials, pieces)](
            grad_normed,
            grad_sum,
            sum,
            weight,
            rstd,
            means,
            dsum,
            partial,
            N,
            D,
            offset,
            block_n,
            block_d,
            num_warps=warps if block_d <= tile else 2 * warps,
        )
    return dsum, partial.sum(0)
