"""The linear layer of the GPU backends, Triton and CUDA: PyTorch's matrix products.

x (M, K), weight (N, K), bias (N,), weight and bias in x's dtype or in float32:
    y = x @ weight.T + bias;  dx = dy @ weight;  dweight = dy.T @ x;  dbias = sum of dy over rows
"""

from __future__ import annotations

import torch
from torch import Tensor


def linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.nn.functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_bwd(
    grad: Tensor, x: Tensor, weight: Tensor, with_x: bool, with_weight: bool, with_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, dweight, dbias = x.new_empty(0), weight.new_empty(0), weight.new_empty(0)
    if with_x:
        dx = grad @ weight.to(x.dtype)
    if with_weight:
        dweight = (grad.T @ x).to(weight.dtype)
    if with_bias:
        dbias = grad.sum(0).to(weight.dtype)
    return dx, dweight, dbias
