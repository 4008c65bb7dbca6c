"""The square of ReLU (So et al., 2021, "Primer", arXiv:2109.08668)."""

import torch
from torch import Tensor

from .precision import accumulator


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)², elementwise."""
    return torch.relu(x.to(accumulator(x.dtype))).square().to(x.dtype)
