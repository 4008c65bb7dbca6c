"""GELU, the Gaussian error linear unit (Hendrycks & Gimpel, 2016, arXiv:1606.08415), and what it is fused with."""

import math

import torch
from torch import Tensor

from .precision import accumulator


def gelu(x: Tensor, tanh: bool = False) -> Tensor:
    """x·Φ(x), with Φ the normal distribution function, or its tanh approximation.

    erf:   y = x/2 · (1 + erf(x/√2))
    tanh:  y = x/2 · (1 + tanh(√(2/π)·(x + 0.044715·x³)))
    """
    z = x.to(accumulator(x.dtype))
    if tanh:
        phi = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))
    else:
        # erfc keeps the relative accuracy of the left tail, where 1 + erf cancels.
        phi = 0.5 * torch.erfc(-z * math.sqrt(0.5))
    return (z * phi).to(x.dtype)


def bias_gelu(x: Tensor, bias: Tensor, tanh: bool = False) -> Tensor:
    """gelu(x + bias), x (..., D), bias (D,); the sum is not rounded in between."""
    acc = accumulator(x.dtype)
    return gelu(x.to(acc) + bias.to(acc), tanh).to(x.dtype)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, tanh: bool = False) -> Tensor:
    """gelu(x @ weight.T + bias), the pre-activation not rounded in between; weight and bias first, to x's dtype.

    x (..., K), weight (N, K), bias (N,) or None; the result (..., N).
    """
    acc = accumulator(x.dtype)
    z = x.to(acc) @ weight.to(x.dtype).to(acc).T
    if bias is not None:
        z = z + bias.to(x.dtype).to(acc)
    return gelu(z, tanh).to(x.dtype)


def geglu(a: Tensor, b: Tensor, tanh: bool = False) -> Tensor:
    """gelu(a)·b, elementwise (Shazeer, 2020, arXiv:2002.05202); gelu(a) is not rounded in between."""
    acc = accumulator(a.dtype)
    return (gelu(a.to(acc), tanh) * b.to(acc)).to(a.dtype)
