"""A linear layer (Rumelhart, Hinton & Williams, 1986): the specification of `ops.linear`."""

from torch import Tensor

from .precision import accumulator


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x @ weight.T + bias, rounded once; a weight or bias in another dtype is first rounded to x's.

    x (..., K), weight (N, K), bias (N,) or None; the result (..., N) in x's dtype.
    """
    acc = accumulator(x.dtype)
    y = x.to(acc) @ weight.to(x.dtype).to(acc).T
    if bias is not None:
        y = y + bias.to(x.dtype).to(acc)
    return y.to(x.dtype)
