"""The square of ReLU, forward and backward.

    y = max(x, 0)^2,   dx = 2 max(x, 0) dy

Shapes: x contiguous. The arithmetic is fp32. Moved per element: the forward has one read and one write, the backward
two and one. Where x <= 0, dx is 0 even if dy is not finite, as in PyTorch; a NaN in x stays NaN.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import contiguous
from .common import cdiv, on_device_of
from .tuned import chosen

# (elements, warps) on every architecture: each thread loads 16 bytes of each operand twice, or four times in fp32.
TILE = (2048, 4)


@triton.jit
def _relu_squared_fwd(p_x, p_y, numel, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_x = tl.load(p_x + o, mask=m).to(tl.float32)  # [BLOCK]
    tl.store(p_y + o, tl.where(b_x <= 0, 0.0, b_x * b_x).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _relu_squared_bwd(p_grad, p_x, p_dx, numel, BLOCK: tl.constexpr):
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < numel
    b_x = tl.load(p_x + o, mask=m).to(tl.float32)  # [BLOCK]
    b_grad = tl.load(p_grad + o, mask=m).to(tl.float32)  # [BLOCK]
    b_dx = tl.where(b_x <= 0, 0.0, 2.0 * b_x * b_grad)
    tl.store(p_dx + o, b_dx.to(p_dx.dtype.element_ty), mask=m)


def relu_squared_fwd(x: Tensor) -> Tensor:
    contiguous("relu_squared_fwd_triton", x=x)
    y, numel = torch.empty_like(x), x.numel()
    if numel:
        block, warps = chosen("relu_squared_fwd", x, (), TILE)
        with on_device_of(x):
            _relu_squared_fwd[(cdiv(numel, block),)](x, y, numel, block, num_warps=warps)
    return y


def relu_squared_bwd(grad: Tensor, x: Tensor) -> Tensor:
    contiguous("relu_squared_bwd_triton", grad=grad, x=x)
    dx, numel = torch.empty_like(x), x.numel()
    if numel:
        block, warps = chosen("relu_squared_bwd", x, (), TILE)
        with on_device_of(x):
            _relu_squared_bwd[(cdiv(numel, block),)](grad, x, dx, numel, block, num_warps=warps)
    return dx
