"""The MLP of a Transformer's layer (Vaswani et al., 2017, arXiv:1706.03762), with GELU: what `ops.mlp` computes."""

from torch import Tensor

from .gelu import linear_gelu
from .linear import linear


def mlp(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor | None,
    weight2: Tensor,
    bias2: Tensor | None,
    tanh: bool = False,
) -> Tensor:
    """gelu(x @ weight1.T + bias1) @ weight2.T + bias2, the activation rounded in between, the pre-activation not.

    x (..., K), weight1 (N, K), bias1 (N,) or None, weight2 (C, N), bias2 (C,) or None; the result (..., C).
    """
    return linear(linear_gelu(x, weight1, bias1, tanh), weight2, bias2)
