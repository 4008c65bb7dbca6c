"""Cross-entropy of a linear layer's output: the projection onto the vocabulary and its loss in one."""

from torch import Tensor

from .cross_entropy import cross_entropy
from .precision import accumulator


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    class_weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """`cross_entropy(hidden @ weight.T + bias, target, ...)`, the logits not rounded in between.

    hidden (N, D), weight (V, D), bias (V,) or None; the rest and the results as `cross_entropy`.
    """
    logits = project(hidden, weight, bias)
    options = (class_weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    return cross_entropy(logits, target, *options)


def project(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The logits (N, V), in float32 (float64 for float64)."""
    acc = accumulator(hidden.dtype)
    logits = hidden.to(acc) @ weight.to(acc).T
    return logits if bias is None else logits + bias.to(acc)
