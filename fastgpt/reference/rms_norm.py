"""Root mean square layer normalization (Zhang & Sennrich, 2019, arXiv:1910.07467), alone and after an addition."""

import torch
from torch import Tensor

from .precision import accumulator


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0) -> Tensor:
    """normed = x/√(mean(x²) + eps)·(offset + weight), over the last dimension.

    x (..., D), weight (D,) or None (then the last factor is 1). The result has x's dtype.
    """
    z = x.to(accumulator(x.dtype))
    y = z * rstd(z, eps)
    if weight is not None:
        y = y * (offset + weight.to(z.dtype))
    return y.to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float = 0.0
) -> tuple[Tensor, Tensor]:
    """sum = x + residual;  normed = rms_norm(sum).

    x and residual (..., D) of dtypes that may differ. Both results have the promoted dtype of x and residual. The
    statistics are those of the rounded sum, so that the backward computes with the same values as the forward.
    """
    total = x
    if residual is not None:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        acc = accumulator(dtype)
        total = (x.to(acc) + residual.to(acc)).to(dtype)
    return rms_norm(total, weight, eps, offset), total


def rstd(z: Tensor, eps: float) -> Tensor:
    """1/√(mean(z²) + eps) over the last dimension, which is kept: (..., 1).

    A row of large numbers is divided by a power of two first, so that the sum of squares does not overflow.
    """
    if z.shape[-1] == 0:
        return z.new_full((*z.shape[:-1], 1), torch.nan)
    largest = z.detach().abs().amax(dim=-1, keepdim=True)
    power = torch.exp2(torch.floor(torch.log2(largest.clamp(min=1.0))))
    scale = torch.where(largest.isfinite(), power, 1.0)
    return torch.rsqrt((z / scale).square().mean(dim=-1, keepdim=True) + eps / scale.square()) / scale
