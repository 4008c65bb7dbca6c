"""Residual addition and layer normalisation (Ba, Kiros & Hinton, 2016, arXiv:1607.06450) in one."""

import torch
from torch import Tensor

from fastgpt.reference.precision import accumulator


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
    z = total.to(acc)
    centred = z - z.mean(dim=-1, keepdim=True)
    y = centred * torch.rsqrt(centred.square().mean(dim=-1, keepdim=True) + eps)
    if weight is not None:
        y = y * weight.to(acc)
    if bias is not None:
        y = y + bias.to(acc)
    return y.to(total.dtype), total
