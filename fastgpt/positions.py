"""Where a token stands, as numbers: waves and rotations of positions, and positions in packed documents."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of x by the angles of cos and sin.

    x (B, H, T, D) takes them as (T, D/2), or (B, 1, T, D/2) where rows differ; packed x (B T, H, D) as (B T, 1, D/2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


LARGEST_TABLE = 1 << 31  # numbers in a table of positions


def sin_cos(length: int, channels: int) -> tuple[Tensor, Tensor]:
    """sin and cos of position / 10000^(2i / channels), each (length, channels / 2).

    Raises ValueError for more than LARGEST_TABLE numbers.
    """
    if length * channels > LARGEST_TABLE:
        raise ValueError(f"{length} positions of {channels} channels are too many for a table")
    frequency = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    angle = torch.arange(length)[:, None] * frequency
    return angle.sin(), angle.cos()


def document_positions(documents: Tensor, idx: Tensor) -> Tensor:
    """For each token of idx (B, T) its place in its document, (B, T)."""
    if documents.dim() != 1 or documents.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"documents must be (documents + 1,) of int32 or int64, not {tuple(documents.shape)} {documents.dtype}"
        )
    places = torch.arange(idx.numel(), device=idx.device, dtype=documents.dtype)
    begin = documents[torch.searchsorted(documents, places, right=True) - 1]
    return (places - begin).view_as(idx)
