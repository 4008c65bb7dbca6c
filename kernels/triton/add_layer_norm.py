"""Residual addition and LayerNorm in one kernel.

    sum = x + residual, rounded to its dtype;   mean, var over D of that rounded value
    xhat = (sum - mean) rstd,   rstd = 1 / sqrt(var + eps);   normed = xhat weight + bias

    g = grad_normed weight
    dsum = rstd (g - mean_j g - xhat mean_j (g xhat)) + grad_sum
    dweight = sum_i grad_normed xhat,   dbias = sum_i grad_normed

Shapes: x, residual (N, D) contiguous, weight, bias (D,), mean (N,) fp64. The arithmetic is fp32. The statistics are
those of the stored (rounded) sum, so that forward and backward use the same values; a row stays in registers for them.
Rows with a large offset keep their digits: with the pivot x_0 and m = x_0 + mean(sum - x_0), rounded,

    mean = m + c,   c = mean(sum - m);   var = mean((sum - m)^2) - c^2;   xhat = ((sum - m) - c) rstd

A constant row has m = x_0 and xhat = 0 exactly. The backward, too, subtracts the mean in two steps. The first sum adds
halves divided by D, so that it cannot overflow. Bytes moved per element: the forward has two reads and two writes, the
backward three reads (grad_normed, grad_sum, sum) and one write; it recomputes xhat from sum, mean and rstd. dweight and
dbias are summed in two stages without atomics: a fixed number of programs sums strided rows, and PyTorch sums the
partial sums. A row that does not fit into registers together with its two sums is cut into tiles. A first kernel then
computes the two means over the row, at the cost of two more reads.
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
# Backward: (elements of a tile, warps, programs). 16 elements per thread and two sums of as many take 117 registers, so
# that two programs fit into a multiprocessor. There are about as many programs as fit into a GPU at once and no more,
# because each writes partial sums: at N = 8192, 1/16 of the bytes of x.
TILE = (4096, 8, 256)
LARGEST = tl.constexpr(3.4028234663852886e38)


@triton.jit
def _in_two_parts(x):
    """Split an fp64 number into a sum of two fp32 numbers."""
    high = x.to(tl.float32)
    return high, (x - high.to(tl.float64)).to(tl.float32)


@triton.jit
def _add_layer_norm_fwd(
    p_x,
    p_residual,
    p_weight,
    p_bias,
    p_normed,
    p_sum,
    p_mean,
    p_rstd,
    D,
    eps,
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

    origin = tl.load(p_x + i_n * D, mask=D > 0, other=0.0).to(tl.float32)
    if p_residual is not None:
        origin += tl.load(p_residual + i_n * D, mask=D > 0, other=0.0).to(tl.float32)
        origin = origin.to(p_sum.dtype.element_ty).to(tl.float32)
    b_half = tl.where(m_d, b_sum * 0.5 - origin * 0.5, 0.0)  # [BLOCK_D]
    middle = 2.0 * (origin * 0.5 + tl.sum(b_half * (1.0 / D), 0))
    b_deviation = tl.where(m_d, b_sum - middle, 0.0)  # [BLOCK_D]
    rest = tl.sum(b_deviation * (1.0 / D), 0)
    var = tl.sum(b_deviation * b_deviation, 0) / D - tl.minimum(rest * rest, LARGEST)
    var = tl.where(var < 0.0, 0.0, var)
    rstd = 1.0 / tl.sqrt(var + eps)
    tl.store(p_mean + i_n, middle.to(tl.float64) + rest.to(tl.float64))
    tl.store(p_rstd + i_n, rstd)

    b_normed = (b_deviation - rest) * rstd
    if p_weight is not None:
        b_normed *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
    if p_bias is not None:
        b_normed += tl.load(p_bias + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_normed + i_n * D + o_d, b_normed.to(p_normed.dtype.element_ty), mask=m_d)


@triton.jit(do_not_specialize=["N"])
def _add_layer_norm_bwd_rows(
    p_grad,
    p_sum,
    p_weight,
    p_mean,
    p_rstd,
    p_means,
    N,
    D,
    BLOCK_D: tl.constexpr,
):
    i_n = tl.program_id(0).to(tl.int64)
    mean, mean_low = _in_two_parts(tl.load(p_mean + i_n))
    rstd = tl.load(p_rstd + i_n)
    b_c1 = tl.zeros((BLOCK_D,), tl.float32)
    b_c2 = tl.zeros((BLOCK_D,), tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)
        m_d = o_d < D
        b_sum = tl.load(p_sum + i_n * D + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        b_grad = tl.load(p_grad + i_n * D + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
        if p_weight is not None:
            b_grad *= tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)
        b_c1 += b_grad
        b_c2 += b_grad * tl.where(m_d, ((b_sum - mean) - mean_low) * rstd, 0.0)
    tl.store(p_means + i_n, tl.sum(b_c1, 0) / D)
    tl.store(p_means + N + i_n, tl.sum(b_c2, 0) / D)


@triton.jit(do_not_specialize=["N"])
def _add_layer_norm_bwd(
    p_grad,  # of normed
    p_grad_sum,
    p_sum,
    p_weight,
    p_mean,
    p_rstd,
    p_means,  # (2, N) fp32: of g and of g xhat; None if a tile has whole rows
    p_dsum,
    p_partial,  # (2, programs, D) fp32: dweight, dbias
    N,
    D,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_partial = tl.program_id(0).to(tl.int64)
    partials = tl.num_programs(0)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    if p_weight is not None:
        b_weight = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    # Elementwise sums, which are reduced over the rows of the tile once, at the end.
    b_dweight = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    b_dbias = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for i_tile in range(tl.program_id(0), (N + BLOCK_N - 1) // BLOCK_N, partials):
        o_n = tl.cast(i_tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        m = m_n[:, None] & m_d[None, :]
        o = o_n[:, None] * D + o_d[None, :]
        b_mean, b_mean_low = _in_two_parts(tl.load(p_mean + o_n, mask=m_n, other=0.0))  # [BLOCK_N]
        b_rstd = tl.load(p_rstd + o_n, mask=m_n, other=0.0)  # [BLOCK_N]
        b_sum = tl.load(p_sum + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        b_xhat = ((b_sum - b_mean[:, None]) - b_mean_low[:, None]) * b_rstd[:, None]  # [BLOCK_N, BLOCK_D]
        b_xhat = tl.where(m, b_xhat, 0.0)
        b_dweight += b_grad * b_xhat
        b_dbias += b_grad
        if p_weight is not None:
            b_grad *= b_weight[None, :]
        if p_means is None:
            b_c1 = tl.sum(b_grad, 1) / D  # [BLOCK_N]
            b_c2 = tl.sum(b_grad * b_xhat, 1) / D  # [BLOCK_N]
        else:
            b_c1 = tl.load(p_means + o_n, mask=m_n, other=0.0)  # [BLOCK_N]
            b_c2 = tl.load(p_means + N + o_n, mask=m_n, other=0.0)  # [BLOCK_N]
        b_dsum = (b_grad - b_c1[:, None] - b_xhat * b_c2[:, None]) * b_rstd[:, None]
        if p_grad_sum is not None:
            b_dsum += tl.load(p_grad_sum + o, mask=m, other=0.0).to(tl.float32)
        tl.store(p_dsum + o, b_dsum.to(p_dsum.dtype.element_ty), mask=m)
    tl.store(p_partial + i_partial * D + o_d, tl.sum(b_dweight, 0), mask=m_d)
    tl.store(p_partial + (partials + i_partial) * D + o_d, tl.sum(b_dbias, 0), mask=m_d)


def add_layer_norm_fwd(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return normed and sum (N, D), mean (N,) fp64 and rstd (N,) fp32; without a residual, sum is empty."""
    contiguous("add_layer_norm_fwd_triton", x=x, residual=residual, weight=weight, bias=bias)
    N, D = x.shape
    dtype = x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype)
    normed = x.new_empty(N, D, dtype=dtype)
    total = x.new_empty(0) if residual is None else x.new_empty(N, D, dtype=dtype)
    mean, rstd = x.new_empty(N, dtype=torch.float64), x.new_empty(N, dtype=torch.float32)
    if N:
        block_d = next_power_of_2(max(D, 1))
        warps = min(max(block_d // (32 * ELEMENTS), 1), 16)
        (warps,) = chosen("add_layer_norm_fwd", x, (D,), (warps,))
        with on_device_of(x):
            _add_layer_norm_fwd[(N,)](
                x, residual, weight, bias, normed, total, mean, rstd, D, eps, block_d, num_warps=warps
            )
    return normed, total, mean, rstd


def add_layer_norm_bwd(
    grad_normed: Tensor,
    grad_sum: Tensor | None,
    sum: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dsum (N, D), dweight and dbias (D,) fp32."""
    op = "add_layer_norm_bwd_triton"
    contiguous(op, grad_normed=grad_normed, grad_sum=grad_sum, total=sum, weight=weight, mean=mean, rstd=rstd)
    N, D = sum.shape
    dsum = torch.empty_like(sum)
    if not sum.numel():
        return dsum, *(sum.new_zeros(D, dtype=torch.float32) for _ in range(2))
    tile, warps, partials = chosen("add_layer_norm_bwd", sum, (D,), TILE)
    row = next_power_of_2(D)
    whole = row <= 2 * tile
    block_d = row if whole else tile
    pieces, block_n = cdiv(D, block_d), max(tile // block_d, 1)
    partials = min(cdiv(N, block_n), max(partials // pieces, 1))
    means = None if whole else sum.new_empty(2, N, dtype=torch.float32)
    partial = sum.new_empty(2, partials, D, dtype=torch.float32)
    with on_device_of(sum):
        if means is not None:
            _add_layer_norm_bwd_rows[(N,)](
                grad_normed, sum, weight, mean, rstd, means, N, D, block_d, num_warps=warps
            )
        _add_layer_norm_bwd[(partials, pieces)](
            grad_normed,
            grad_sum,
            sum,
            weight,
            mean,
            rstd,
            means,
            dsum,
            partial,
            N,
            D,
            block_n,
            block_d,
            num_warps=warps if block_d <= tile else 2 * warps,
        )
    return dsum, partial[0].sum(0), partial[1].sum(0)
