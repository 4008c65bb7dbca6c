"""Softmax cross-entropy of each row, as `torch.nn.functional.cross_entropy` defines it, and more.

For a row of logits l (V values), target y, class weights w (1 without), smoothing ε, z-loss ζ and logit scale k:

    x = c·tanh(k·l/c)  with a softcap c, else k·l              (softcap: Gemma 2, arXiv:2408.00118)
    lse  = log Σ_j exp(x_j)
    loss = (1-ε)·w_y·(lse - x_y) + ε/V·Σ_j w_j·(lse - x_j) + ζ·lse²

Label smoothing: Szegedy et al., arXiv:1512.00567. z-loss: PaLM, arXiv:2204.02311.
"""

import torch
from torch import Tensor

from .precision import accumulator


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    logit_scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Loss and log-sum-exp of each row.

    Args:
        logits: (N, V).
        target: (N,) int64 class indices, or (N, V) class probabilities (then ignore_index has no
            meaning, and smoothing mixes them with the uniform distribution).
        weight: (V,) class weights, or None.
        ignore_index: rows with this target have loss 0 and no gradient through it.
        softcap: 0 for none.
        logit_scale: multiplies the logits, before the softcap.

    Returns:
        loss (N,) and lse (N,), float32 (float64 for float64 logits).

    Raises:
        IndexError: a target is outside [0, V) and is not ignore_index (checked on the CPU).
    """
    vocab = logits.shape[1]
    x = capped(logits, softcap, logit_scale)
    w = x.new_ones(vocab) if weight is None else weight.to(x.dtype)
    lse = log_sum_exp(x)
    nll = -torch.log_softmax(x, dim=1)  # lse - x, without the cancellation that large logits bring

    if target.is_floating_point():
        p = target.to(x.dtype) * (1 - label_smoothing) + label_smoothing / max(vocab, 1)
        loss = (p * w * nll).sum(dim=1)
        return (loss + z_loss * lse**2 if z_loss else loss), lse

    valid = target != ignore_index
    check_targets(target, vocab, ignore_index)
    if vocab == 0:
        return x.new_zeros(x.shape[0]), lse
    y = torch.where(valid, target, 0)[:, None]
    loss = (1 - label_smoothing) * w[y[:, 0]] * nll.gather(1, y)[:, 0]
    if z_loss:
        loss = loss + z_loss * lse**2
    if label_smoothing:
        loss = loss + label_smoothing / vocab * (w * nll).sum(dim=1)
    return torch.where(valid, loss, 0), lse


def capped(logits: Tensor, softcap: float, logit_scale: float) -> Tensor:
    """The logits with their scale and softcap, in float32 (float64 for float64)."""
    x = logits.to(accumulator(logits.dtype))
    x = x if logit_scale == 1 else x * logit_scale
    return softcap * torch.tanh(x / softcap) if softcap else x


def softmax_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """The maximum m of x (..., V) and Σ exp(x - m) over the last dimension, both (...).

    m is a constant to autograd. It is 0 where the maximum is infinite or there is no element.
    """
    if not x.shape[-1]:
        return x.new_zeros(x.shape[:-1]), x.sum(dim=-1)
    m = x.detach().amax(dim=-1)
    m = torch.where(m.isfinite(), m, 0)
    return m, torch.exp(x - m[..., None]).sum(dim=-1)


def log_sum_exp(x: Tensor) -> Tensor:
    """log Σ exp x over the last dimension of x (..., V).

    `torch.logsumexp` has exp(x - lse) for its gradient, in which a large maximum has absorbed the logarithm.
    """
    m, total = softmax_statistics(x)
    return m + torch.log(total)


def check_targets(target: Tensor, vocab: int, ignore_index: int) -> None:
    """Raises the IndexError that PyTorch raises, on the CPU; reading targets back from a GPU would stall it."""
    if target.device.type != "cpu":
        return
    bad = (target != ignore_index) & ((target < 0) | (target >= vocab))
    if bad.any():
        raise IndexError(f"Target {int(target[bad][0])} is out of bounds.")
