"""Rotary position embedding, RoPE (Su et al., RoFormer, 2021, arXiv:2104.09864)."""

import torch
from torch import Tensor

from .precision import accumulator


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotate pairs of the first R channels of q and k by the angles of their positions; the other channels stay.

        (x_i, x_j) → (x_i·cos_p - x_j·sin_p,  x_j·cos_p + x_i·sin_p)     for pair p = 0, …, R/2 - 1

    Pair p has the channels p and p + R/2 (GPT-NeoX, Llama), or 2p and 2p + 1 if `interleaved` (RoFormer, GPT-J).

    Args:
        q, k: (B, H, T, D) and (B, Hk, T, D).
        cos, sin: (T, R/2), or (B, T, R/2) where the rows of the batch have other positions.
        interleaved: which channels are a pair.
    """
    return _rotate(q, cos, sin, interleaved), _rotate(k, cos, sin, interleaved)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    acc = accumulator(x.dtype)
    if cos.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    cos, sin = cos.to(acc), sin.to(acc)
    pairs = cos.shape[-1]
    turned, rest = x[..., : 2 * pairs].to(acc), x[..., 2 * pairs :]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
    else:
        a, b = turned[..., :pairs], turned[..., pairs:]
    both = (a * cos - b * sin).to(x.dtype), (b * cos + a * sin).to(x.dtype)
    if interleaved:
        return torch.cat((torch.stack(both, dim=-1).flatten(-2), rest), dim=-1)
    return torch.cat((*both, rest), dim=-1)
