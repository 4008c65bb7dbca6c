"""SwiGLU, a linear unit gated by SiLU (Shazeer, 2020, arXiv:2002.05202)."""

import torch
from torch import Tensor

from .precision import accumulator


def swiglu(a: Tensor, b: Tensor) -> Tensor:
    """silu(a)·b, elementwise, with silu(x) = x·σ(x) and σ(x) = 1/(1 + exp(-x)); silu(a) is not rounded in between."""
    acc = accumulator(a.dtype)
    z = a.to(acc)
    return (z * torch.sigmoid(z) * b.to(acc)).to(a.dtype)
