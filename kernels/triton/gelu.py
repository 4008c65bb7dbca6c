"""GELU, alone, behind a bias and as a gate, forward and backward.

    exact:  gelu(x) = x Phi(x),        Phi(x) = (1 + erf(x / sqrt 2)) / 2
            gelu'(x) = Phi(x) + x phi(x),   phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
    tanh:   gelu(x) = x (1 + tanh u) / 2 = x s,   u = sqrt(2 / pi) (x + 0.044715 x^3),   s = sigmoid(2u)
            gelu'(x) = s + 2 x s (1 - s) du/dx
    gate:   y = gelu(a) b,   da = dy b gelu'(a),   db = dy gelu(a)

Shapes: x (..., D) contiguous, bias (D,); a and b contiguous, of one shape. The arithmetic is fp32. Bytes moved
per element: forward one read and one write, backward two reads and one write (the gate: two and one, three and
two). Nothing but the inputs is kept, the derivative is recomputed from them, since these kernels are bound by
memory; what gelu and gelu' of the gate's backward have in common, the compiler evaluates once. dbias is summed
in two stages, so that its bits do not depend on a race: each program sums ROWS_PER_PARTIAL rows, PyTorch sums
the partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastgpt.kernels.common import cdiv, on_device_of

BLOCK = 2048  # elements a program: 16 a thread at 4 warps, two 16-byte loads in 16-bit dtypes
BLOCK_D = 256  # columns and
BLOCK_N = 8  # rows of the tile with a bias: the same 2048
ROWS_PER_PARTIAL = 64  # dbias partial sums are then 1/64 of the elements, in fp32: 2 % more bytes

SQRT_HALF = tl.constexpr(0.7071067811865476)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)
SQRT_2_OVER_PI = tl.constexpr(0.7978845608028654)
CUBIC = tl.constexpr(0.044715)


@triton.jit
def _sigmoid_2u(x):
    """s = sigmoid(2u) and s (1 - s), without overflow: both from exp(-2|u|) <= 1."""
    u = SQRT_2_OVER_PI * (x + CUBIC * x * x * x)
    e = tl.exp(-2.0 * tl.abs(u))
    r = 1.0 / (1.0 + e)
    return tl.where(u >= 0, r, e * r), e * r * r


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    if TANH:
        s, _ = _sigmoid_2u(x)
        return x * s
    else:
        return 0.5 * x * (1.0 + tl.erf(x * SQRT_HALF))


@triton.jit
def _gelu_grad(x, TANH: tl.constexpr):
    if TANH:
        s, s_slope = _sigmoid_2u(x)
        du = SQRT_2_OVER_PI * (1.0 + 3.0 * CUBIC * x * x)
        return s + 2.0 * x * s_slope * du
    else:
        return 0.5 * (1.0 + tl.erf(x * SQRT_HALF)) + x * INV_SQRT_2PI * tl.exp(-0.5 * x * x)


@triton.jit
def _gelu_fwd(p_x, p_y, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(p_x + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_y + o, _gelu(b_x, TANH).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _bias_gelu_fwd(p_x, p_bias, p_y, N, D, TANH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = (o_n < N)[:, None] & (o_d < D)[None, :]
    o = o_n[:, None] * D + o_d[None, :]
    b_bias = tl.load(p_bias + o_d, mask=o_d < D).to(tl.float32)  # [BLOCK_D]
    b_x = tl.load(p_x + o, mask=m).to(tl.float32) + b_bias[None, :]  # [BLOCK_N, BLOCK_D]
    tl.store(p_y + o, _gelu(b_x, TANH).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _geglu_fwd(p_a, p_b, p_y, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_a = tl.load(p_a + o, mask=m).to(tl.float32)  # [BLOCK]
    b_b = tl.load(p_b + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_y + o, (_gelu(b_a, TANH) * b_b).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _gelu_bwd(p_grad, p_x, p_dx, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(p_x + o, mask=m).to(tl.float32)  # [BLOCK]
    b_grad = tl.load(p_grad + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_dx + o, (b_grad * _gelu_grad(b_x, TANH)).to(p_dx.dtype.element_ty), mask=m)


@triton.jit
def _bias_gelu_bwd(
    p_grad,
    p_x,
    p_bias,
    p_dx,
    p_partial,  # (partials, D) fp32
    N,
    D,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_partial = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_bias = tl.load(p_bias + o_d, mask=m_d).to(tl.float32)  # [BLOCK_D]
    b_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        o_n = i_partial * ROWS + start + tl.arange(0, BLOCK_N)
        m = (o_n < N)[:, None] & m_d[None, :]
        o = o_n[:, None] * D + o_d[None, :]
        b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32) + b_bias[None, :]  # [BLOCK_N, BLOCK_D]
        b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        b_dx = tl.where(m, b_grad * _gelu_grad(b_x, TANH), 0.0)  # an infinite bias would make 0 * NaN
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
        b_sum += b_dx
    tl.store(p_partial + i_partial * D + o_d, tl.sum(b_sum, 0), mask=m_d)


@triton.jit
def _geglu_bwd(p_grad, p_a, p_b, p_da, p_db, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_a = tl.load(p_a + o, mask=m).to(tl.float32)  # [BLOCK]
    b_b = tl.load(p_b + o, mask=m).to(tl.float32)  # [BLOCK]
    b_grad = tl.load(p_grad + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_da + o, (b_grad * b_b * _gelu_grad(b_a, TANH)).to(p_da.dtype.element_ty), mask=m)
    tl.store(p_db + o, (b_grad * _gelu(b_a, TANH)).to(p_db.dtype.element_ty), mask=m)


def gelu_fwd(x: Tensor, tanh: bool) -> Tensor:
    y = torch.empty_like(x)
    if x.numel():
        with on_device_of(x):
            _gelu_fwd[(cdiv(x.numel(), BLOCK),)](x, y, x.numel(), tanh, BLOCK, num_warps=4)
    return y


def gelu_bwd(grad: Tensor, x: Tensor, tanh: bool) -> Tensor:
    dx = torch.empty_like(x)
    if x.numel():
        with on_device_of(x):
            _gelu_bwd[(cdiv(x.numel(), BLOCK),)](grad, x, dx, x.numel(), tanh, BLOCK, num_warps=4)
    return dx


def bias_gelu_fwd(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    y = torch.empty_like(x)
    D = bias.shape[0]
    if x.numel():
        N = x.numel() // D
        with on_device_of(x):
            grid = (cdiv(N, BLOCK_N), cdiv(D, BLOCK_D))
            _bias_gelu_fwd[grid](x, bias, y, N, D, tanh, BLOCK_N, BLOCK_D, num_warps=4)
    return y


def bias_gelu_bwd(grad: Tensor, x: Tensor, bias: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    dx = torch.empty_like(x)
    if not x.numel():
        return dx, torch.zeros_like(bias)
    D = bias.shape[0]
    N = x.numel() // D
    partials = cdiv(N, ROWS_PER_PARTIAL)
    partial = x.new_empty(partials, D, dtype=torch.float32)
    with on_device_of(x):
        _bias_gelu_bwd[(partials, cdiv(D, BLOCK_D))](
            grad, x, bias, dx, partial, N, D, tanh, ROWS_PER_PARTIAL, BLOCK_N, BLOCK_D, num_warps=4
        )
    return dx, partial.sum(0).to(bias.dtype)


def geglu_fwd(a: Tensor, b: Tensor, tanh: bool) -> Tensor:
    y = torch.empty_like(a)
    if a.numel():
        with on_device_of(a):
            _geglu_fwd[(cdiv(a.numel(), BLOCK),)](a, b, y, a.numel(), tanh, BLOCK, num_warps=4)
    return y


def geglu_bwd(grad: Tensor, a: Tensor, b: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    da, db = torch.empty_like(a), torch.empty_like(b)
    if a.numel():
        with on_device_of(a):
            _geglu_bwd[(cdiv(a.numel(), BLOCK),)](grad, a, b, da, db, a.numel(), tanh, BLOCK, num_warps=4)
    return da, db
