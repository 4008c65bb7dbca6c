"""GELU: of a tensor, of a tensor plus a bias, and as a gate (GEGLU), forward and backward.

    exact:  gelu(x) = x Phi(x),        Phi(x) = (1 + erf(x / sqrt 2)) / 2
            gelu'(x) = Phi(x) + x phi(x),   phi(x) = exp(-x^2 / 2) / sqrt(2 pi)
    tanh:   gelu(x) = x (1 + tanh u) / 2 = x s,   u = sqrt(2 / pi) (x + 0.044715 x^3),   s = sigmoid(2u)
            gelu'(x) = s + 2 x s (1 - s) du/dx
    gate:   y = gelu(a) b,   da = dy b gelu'(a),   db = dy gelu(a)

Shapes: x (..., columns) contiguous, bias (columns,); a and b contiguous, of one shape. The arithmetic is fp32. Bytes
moved per element: the forward has one read and one write, the backward two reads and one write (the gate: two and one,
three and two). These kernels are bound by memory, so the backward keeps only the inputs and recomputes gelu and gelu'.
dbias is summed in two stages, so that its bits are the same in every run: each program sums ROWS_PER_PARTIAL rows, and
PyTorch sums the partial sums.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import contiguous
from .common import cdiv, on_device_of, reciprocal
from .tuned import chosen

# (elements, warps) on every architecture, and with a bias (rows, columns, warps) by the bytes of an element: each
# thread loads 16 bytes of each operand twice, or four times where nothing is summed. 256 columns are whole cache lines.
TILE = (2048, 4)
TILE_OF_BIAS = {2: (8, 256, 4), 4: (4, 256, 4)}
ROWS_PER_PARTIAL = 64  # dbias then has 1/64 as many partial sums as x has elements, in fp32: 2 % more bytes

# Arguments and factors of exp2 that include log2(e), which saves a multiplication.
HALF_LOG2E = tl.constexpr(0.7213475204444817)
TWO_U = tl.constexpr(-2.302208198144325)  # -2 log2(e) sqrt(2 / pi)
CUBIC = tl.constexpr(0.044715)
TWO_DU = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
LARGE = tl.constexpr(8.5e37)
INV_SQRT_2PI = tl.constexpr(0.3989422804014327)


@triton.jit
def gelu_cdf(x):
    """Return Phi(x) with an error of 3e-7 (relative: 1.4e-6 in the left tail), and exp(-x^2 / 2).

    1 - Phi(|x|) = exp(-x^2 / 2) t P(t) with t = 1 / (1 + 0.34 |x|) and P of degree 6, fitted to the relative error on
    |x| < 5.6. This takes 12 instructions and the exponential, which the derivative needs anyway; a library's erf takes
    33.
    """
    e = tl.exp2(x * x * -HALF_LOG2E)
    t = reciprocal(1.0 + 0.34 * tl.abs(x))
    p = ((0.047052912 * t - 0.20997278) * t + 0.28044787) * t - 0.045527373
    p = ((p * t + 0.16392295) * t + 0.12785697) * t + 0.13621946
    q = p * t * e
    return tl.where(x < 0, q, 1.0 - q), e


@triton.jit
def gelu_cdf_tanh(x):
    """Return s = sigmoid(2u), which approximates Phi, and s (1 - s).

    exp(-2u) may be inf. Then s is 0, but without the minimum s (1 - s) would be inf * 0.
    """
    e = tl.exp2(x * (TWO_U + TWO_U * CUBIC * (x * x)))
    s = reciprocal(1.0 + e)
    return s, tl.minimum(e, LARGE) * s * s


@triton.jit
def gelu(x, TANH: tl.constexpr):
    if TANH:
        cdf, _ = gelu_cdf_tanh(x)
    else:
        cdf, _ = gelu_cdf(x)
    return x * cdf


@triton.jit
def gelu_grad(x, TANH: tl.constexpr):
    """Return gelu'(x)."""
    if TANH:
        cdf, sigmoid_grad = gelu_cdf_tanh(x)
        return cdf + x * sigmoid_grad * (TWO_DU + 3.0 * TWO_DU * CUBIC * (x * x))
    else:
        cdf, e = gelu_cdf(x)
        return cdf + x * INV_SQRT_2PI * e


@triton.jit
def _gelu_fwd(p_x, p_y, numel, TANH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_x = tl.load(p_x + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_y + o, gelu(b_x, TANH).to(p_y.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_fwd(
    p_x, p_bias, p_y, rows, columns, TANH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m = (o_n < rows)[:, None] & (o_d < columns)[None, :]
    o = o_n[:, None] * columns + o_d[None, :]
    b_bias = tl.load(p_bias + o_d, mask=o_d < columns).to(tl.float32)  # [BLOCK_D]
    b_x = tl.load(p_x + o, mask=m).to(tl.float32) + b_bias[None, :]  # [BLOCK_N, BLOCK_D]
    tl.store(p_y + o, gelu(b_x, TANH).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _geglu_fwd(p_a, p_b, p_y, numel, TANH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_a = tl.load(p_a + o, mask=m).to(tl.float32)  # [BLOCK]
    b_b = tl.load(p_b + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_y + o, (gelu(b_a, TANH) * b_b).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _gelu_bwd(p_grad, p_x, p_dx, numel, TANH: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_x = tl.load(p_x + o, mask=m).to(tl.float32)  # [BLOCK]
    b_grad = tl.load(p_grad + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_dx + o, (b_grad * gelu_grad(b_x, TANH)).to(p_dx.dtype.element_ty), mask=m)


@triton.jit(do_not_specialize=["rows"])
def _bias_gelu_bwd(
    p_grad,
    p_x,
    p_bias,
    p_dx,
    p_partial,  # (partials, columns) fp32
    rows,
    columns,
    TANH: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    i_partial = tl.program_id(0).to(tl.int64)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < columns
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_d, mask=m_d).to(tl.float32)  # [BLOCK_D]
    b_sum = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    for start in range(0, ROWS, BLOCK_N):
        o_n = i_partial * ROWS + start + tl.arange(0, BLOCK_N)
        m = (o_n < rows)[:, None] & m_d[None, :]
        o = o_n[:, None] * columns + o_d[None, :]
        b_x = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        if p_bias is not None:
            b_x += b_bias[None, :]
        b_grad = tl.load(p_grad + o, mask=m, other=0.0).to(tl.float32)  # [BLOCK_N, BLOCK_D]
        b_dx = tl.where(
            m, b_grad * gelu_grad(b_x, TANH), 0.0
        )  # with an infinite bias, 0 * NaN beyond the rows
        tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)
        b_sum += b_dx
    tl.store(p_partial + i_partial * columns + o_d, tl.sum(b_sum, 0), mask=m_d)


@triton.jit
def _geglu_bwd(p_grad, p_a, p_b, p_da, p_db, numel, TANH: tl.constexpr, BLOCK: tl.constexpr):
    # The compiler evaluates the common parts of gelu and gelu' once.
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_a = tl.load(p_a + o, mask=m).to(tl.float32)  # [BLOCK]
    b_b = tl.load(p_b + o, mask=m).to(tl.float32)  # [BLOCK]
    b_grad = tl.load(p_grad + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_da + o, (b_grad * b_b * gelu_grad(b_a, TANH)).to(p_da.dtype.element_ty), mask=m)
    tl.store(p_db + o, (b_grad * gelu(b_a, TANH)).to(p_db.dtype.element_ty), mask=m)


def gelu_fwd(x: Tensor, tanh: bool) -> Tensor:
    contiguous("gelu_fwd_triton", x=x)
    y, numel = torch.empty_like(x), x.numel()
    if numel:
        block, warps = chosen("gelu_fwd", x, (), TILE)
        with on_device_of(x):
            _gelu_fwd[(cdiv(numel, block),)](x, y, numel, tanh, block, num_warps=warps)
    return y


def gelu_bwd(grad: Tensor, x: Tensor, tanh: bool) -> Tensor:
    contiguous("gelu_bwd_triton", grad=grad, x=x)
    dx, numel = torch.empty_like(x), x.numel()
    if numel:
        block, warps = chosen("gelu_bwd", x, (), TILE)
        with on_device_of(x):
            _gelu_bwd[(cdiv(numel, block),)](grad, x, dx, numel, tanh, block, num_warps=warps)
    return dx


def bias_gelu_fwd(x: Tensor, bias: Tensor, tanh: bool) -> Tensor:
    contiguous("bias_gelu_fwd_triton", x=x, bias=bias)
    y, columns = torch.empty_like(x), bias.shape[0]
    if x.numel():
        rows = x.numel() // columns
        block_n, block_d, warps = chosen("bias_gelu_fwd", x, (columns,), TILE_OF_BIAS[x.element_size()])
        with on_device_of(x):
            grid = (cdiv(rows, block_n), cdiv(columns, block_d))
            _bias_gelu_fwd[grid](x, bias, y, rows, columns, tanh, block_n, block_d, num_warps=warps)
    return y


def bias_gelu_bwd(grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """Return dx and dbias, its sum over the rows.

    Args:
        bias: None for 0; dbias is returned all the same.
    """
    contiguous("bias_gelu_bwd_triton", grad=grad, x=x, bias=bias)
    dx, columns = torch.empty_like(x), x.shape[-1]
    if not x.numel():
        return dx, x.new_zeros(columns)
    rows = x.numel() // columns
    partials = cdiv(rows, ROWS_PER_PARTIAL)
    partial = x.new_empty(partials, columns, dtype=torch.float32)
    block_n, block_d, warps = chosen("bias_gelu_bwd", x, (columns,), TILE_OF_BIAS[x.element_size()])
    with on_device_of(x):
        _bias_gelu_bwd[(partials, cdiv(columns, block_d))](
            grad,
            x,
            bias,
            dx,
            partial,
            rows,
            columns,
            tanh,
            ROWS_PER_PARTIAL,
            block_n,
            block_d,
            num_warps=warps,
        )
    return dx, partial.sum(0).to(x.dtype)


def geglu_fwd(a: Tensor, b: Tensor, tanh: bool) -> Tensor:
    contiguous("geglu_fwd_triton", a=a, b=b)
    y, numel = torch.empty_like(a), a.numel()
    if numel:
        block, warps = chosen("geglu_fwd", a, (), TILE)
        with on_device_of(a):
            _geglu_fwd[(cdiv(numel, block),)](a, b, y, numel, tanh, block, num_warps=warps)
    return y


def geglu_bwd(grad: Tensor, a: Tensor, b: Tensor, tanh: bool) -> tuple[Tensor, Tensor]:
    """Return da and db."""
    contiguous("geglu_bwd_triton", grad=grad, a=a, b=b)
    da, db, numel = torch.empty_like(a), torch.empty_like(b), a.numel()
    if numel:
        block, warps = chosen("geglu_bwd", a, (), TILE)
        with on_device_of(a):
            _geglu_bwd[(cdiv(numel, block),)](grad, a, b, da, db, numel, tanh, block, num_warps=warps)
    return da, db
