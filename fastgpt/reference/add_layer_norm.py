"""Residual addition and layer normalisation (Ba, Kiros & Hinton, 2016, arXiv:1607.06450) in one."""

import torch
from torch import Tensor

from .precision import accumulator


def add_layer_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """sum = x + residual;  normed = (sum - mean)/√(variance + eps)·weight + bias, over the last dimension.

    x and residual (..., D) of dtypes that may differ; weight, bias (D,) or None (then 1 and 0). The
    variance is the biased one. Both results have the promoted dtype of x and residual; the mean and
    variance are those of the rounded sum, so that the backward sees what the forward saw.
    """
    total = x
    if residual is not None:
        dtype = torch.promote_types(x.dtype, residual.dtype)
        acc = accumulator(dtype)
        total = (x.to(acc) + residual.to(acc)).to(dtype)
    acc = accumulator(total.dtype)
    centred = centre(total.to(acc))[0]
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(total.dtype), total


def centre(z: Tensor) -> tuple[Tensor, Tensor]:
    """z minus its mean over the last dimension, and that mean in float64, (..., D) and (..., 1).

    A large offset common to a row costs no digits: with m = z_0 + mean(z - z_0), rounded, the mean is
    m + mean(z - m). A constant row is exactly 0. The sums are over halves divided by D, so that none overflows.
    """
    size = z.shape[-1]
    half = z.detach() / 2
    pivot = half[..., :1].sum(dim=-1, keepdim=True)  # 0 in a row of no elements
    middle = 2 * (pivot + ((half - pivot) / size).sum(dim=-1, keepdim=True))
    deviation = z - middle
    rest = (deviation / size).sum(dim=-1, keepdim=True)
    return deviation - rest, middle.double() + rest.double()
