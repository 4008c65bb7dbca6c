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

from fastgpt.kernels.checks import contiguous
from fastgpt.kernels.common import cdiv, on_device_of, reciprocal
from fastgpt.kernels.tuned import chosen

# On every architecture, (elements, warps) and, with a bias, (rows, columns, warps) by the bytes of an element: two
# 16-byte loads a thread of each operand, or four where nothing is summed; 256 columns are whole lines of memory.
TILE = (2048, 4)
TILE_OF_BIAS = {2: (8, 256, 4), 4: (4, 256, 4)}
ROWS_PER_PARTIAL = 64  # dbias partial sums are then 1/64 of the elements, in fp32: 2 % more bytes

# Arguments and factors of exp2, so that nothing is left to be multiplied by log2(e).
HALF_LOG2E = tl.constexpr(0.7213475204444817)
TWO_U = tl.constexpr(-2.302208198144325)  # -2 log2(e) sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)
TWO_DU = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
LARGE = tl.constexpr(8.5e37)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def _normal(x):
    """Phi(x) to 3e-7, the left tail to 1.4e-6 of itself, and exp(-x^2 / 2), of which Phi is made.

    1 - Phi(|x|) = exp(-x^2 / 2) t P(t),   t = 1 / (1 + 0.34 |x|),   P of degree 6 fitted to the relative error on
    |x| < 5.6. Beside the exponential that the derivative needs anyway 12 instructions; a library's erf has 33.
    """
    e = tl.exp2(x * x * -HALF_LOG2E)
    t = reciprocal(1.0 + 0.34 * tl.abs(x))
    p = ((0.047052912 * t - 0.20997278) * t + 0.28044787) * t - 0.045527373
    p = ((p * t + 0.16392295) * t + 0.12785697) * t + 0.13621946
    q = p * t * e
    return tl.where(x < 0, q, 1.0 - q), e


@triton.jit
def _sigmoid_2u(x):
    """s = sigmoid(2u) and s (1 - s). exp(-2u) may be inf, which makes s = 0, but inf times 0 would be NaN."""
    e = tl.exp2(x * (TWO_U + TWO_U * CUBIC * (x * x)))
    s = reciprocal(1.0 + e)
    return s, tl.minimum(e, LARGE) * s * s


@triton.jit
def _gelu(x, TANH: tl.constexpr):
    if TANH:
        s, _ = _sigmoid_2u(x)
        return x * s
    else:
        phi, _ = _normal(x)
        return x * phi


@triton.jit
def _gelu_grad(x, TANH: tl.constexpr):
    if TANH:
        s, s_slope = _sigmoid_2u(x)
        return s + x * s_slope * (TWO_DU + 3.0 * TWO_DU * CUBIC * (x * x))
    else:
        phi, e = _normal(x)
        return phi + x * INV_SQRT_2PI * e


@triton.jit
def _gelu_fwd(p_x, p_y, n, TANH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n
    b_x = tl.load(p_x + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_y + o, _gelu(b_x, TANH).to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["N"])
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


@triton.jit(do_not_specialize=["N"])
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
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d, mask=m_d).to(tl.float32)  # [BLOCK_D]
    b_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        o_n = i_partial * ROWS + start + tl.arange(0, BLOCK_N)
        m = (o_n < N)[:, None] & m_d[None, :]
        o = o_n[:, None] * D + o_d[None, :]
        b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        if p_bias is not None:
            b_x += b_bias[None, :]
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
    contiguous("gelu_fwd_triton", x=x)
    y, n = torch.empty_like(x), x.numel()
    if n:
        block, warps = chosen("gelu_fwd", x, (), TILE)
        with on_device_of(x):
            _gelu_fwd[(cdiv(n, block),)](x, y, n, tanh, block, num_warps=warps)
    return y


def gelu_bwd(grad: Tensor, x: Tensor, tanh: bool) -> Tensor:
    contiguous("gelu_bwd_triton", grad=grad, x=x)
    dx, n = torch.empty_like(x), x.numel()
    if n:
        block, warps = chosen("gelu_bwd", x, (), TILE)
        with on_device_of(x):
            _gelu_bwd[(cdiv(n, block),)](grad, x, dx, n, tanh, block, num_warps=warps)
    return dx


def bias_gelu_fwd(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    contiguous("bias_gelu_fwd_triton", x=x, bias=bias)
    y, D = torch.empty_like(x), bias.shape[0]
    if x.numel():
        N = x.numel() // D
        block_n, block_d, warps = chosen("bias_gelu_fwd", x, (D,), TILE_OF_BIAS[x.element_size()])
        with on_device_of(x):
            grid = (cdiv(N, block_n), cdiv(D, block_d))
            _bias_gelu_fwd[grid](x, bias, y, N, D, tanh, block_n, block_d, num_warps=warps)
    return y


def bias_gelu_bwd(grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """Without a bias, one of 0: dx summed over the rows is asked for all the same."""
    contiguous("bias_gelu_bwd_triton", grad=grad, x=x, bias=bias)
    dx, D = torch.empty_like(x), x.shape[-1]
    if not x.numel():
        return dx, x.new_zeros(D)
    N = x.numel() // D
    partials = cdiv(N, ROWS_PER_PARTIAL)
    partial = x.new_empty(partials, D, dtype=torch.float32)
    block_n, block_d, warps = chosen("bias_gelu_bwd", x, (D,), TILE_OF_BIAS[x.element_size()])
    with on_device_of(x):
        _bias_gelu_bwd[(partials, cdiv(D, block_d))](
            grad, x, bias, dx, partial, N, D, tanh, ROWS_PER_PARTIAL, block_n, block_d, num_warps=warps
        )
    return dx, partial.sum(0).to(x.dtype)


def geglu_fwd(a: Tensor, b: Tensor, tanh: bool) -> Tensor:
    contiguous("geglu_fwd_triton", a=a, b=b)
    y, n = torch.empty_like(a), a.numel()
    if n:
        block, warps = chosen("geglu_fwd", a, (), TILE)
        with on_device_of(a):
            _geglu_fwd[(cdiv(n, block),)](a, b, y, n, tanh, block, num_warps=warps)
    return y


def geglu_bwd(grad: Tensor, a: Tensor, b: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    contiguous("geglu_bwd_triton", grad=grad, a=a, b=b)
    da, db, n = torch.empty_like(a), torch.empty_like(b), a.numel()
    if n:
        block, warps = chosen("geglu_bwd", a, (), TILE)
        with on_device_of(a):
            _geglu_bwd[(cdiv(n, block),)](grad, a, b, da, db, n, tanh, block, num_warps=warps)
    return da, db
