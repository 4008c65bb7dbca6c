"""SwiGLU: SiLU as a gate, forward and backward.

    y = silu(a) b,   silu(x) = x s,   s = sigmoid(x) = 1 / (1 + exp(-x))
    da = dy b silu'(a),   silu'(x) = s + silu(x) (1 - s),   db = dy silu(a)

Shapes: a and b contiguous, of one shape. The arithmetic is fp32. Moved per element: the forward has two reads and one
write, the backward three and two. The kernels are bound by memory, so the backward keeps only the inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import contiguous
from .common import LOG2E, cdiv, on_device_of, reciprocal
from .tuned import chosen

# (elements, warps) on every architecture: each thread loads 16 bytes of each operand twice, or four times in fp32.
TILE = (2048, 4)


@triton.jit
def silu_and_grad(x):
    """Return silu(x) and silu'(x).

    exp(-x) may be inf. Then s and silu are 0; silu(-inf) is NaN, as in PyTorch.
    """
    s = reciprocal(1.0 + tl.exp2(x * -LOG2E))
    y = x * s
    return y, s + y * (1.0 - s)


@triton.jit
def _swiglu_fwd(p_a, p_b, p_y, numel, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_a = tl.load(p_a + o, mask=m).to(tl.float32)  # [BLOCK]
    b_b = tl.load(p_b + o, mask=m).to(tl.float32)  # [BLOCK]
    b_silu, _ = silu_and_grad(b_a)
    tl.store(p_y + o, (b_silu * b_b).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _swiglu_bwd(p_grad, p_a, p_b, p_da, p_db, numel, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_a = tl.load(p_a + o, mask=m).to(tl.float32)  # [BLOCK]
    b_b = tl.load(p_b + o, mask=m).to(tl.float32)  # [BLOCK]
    b_grad = tl.load(p_grad + o, mask=m).to(tl.float32)  # [BLOCK]
    b_silu, b_silu_grad = silu_and_grad(b_a)
    tl.store(p_da + o, (b_grad * b_b * b_silu_grad).to(p_da.dtype.element_ty), mask=m)
    tl.store(p_db + o, (b_grad * b_silu).to(p_db.dtype.element_ty), mask=m)


def swiglu_fwd(a: Tensor, b: Tensor) -> Tensor:
    contiguous("swiglu_fwd_triton", a=a, b=b)
    y, numel = torch.empty_like(a), a.numel()
    if numel:
        block, warps = chosen("swiglu_fwd", a, (), TILE)
        with on_device_of(a):
            _swiglu_fwd[(cdiv(numel, block),)](a, b, y, numel, block, num_warps=warps)
    return y


def swiglu_bwd(grad: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Return da and db."""
    contiguous("swiglu_bwd_triton", grad=grad, a=a, b=b)
    da, db, numel = torch.empty_like(a), torch.empty_like(b), a.numel()
    if numel:
        block, warps = chosen("swiglu_bwd", a, (), TILE)
        with on_device_of(a):
            _swiglu_bwd[(cdiv(numel, block),)](grad, a, b, da, db, numel, block, num_warps=warps)
    return da, db
