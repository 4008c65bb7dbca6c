"""Sampling of a token from logits.

    logits -> repetition penalty -> temperature -> top-k -> top-p -> draw

A draw evaluates the inverse cumulative distribution at a uniform number in [0, 1).

Shapes: N rows, V = vocab_size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

_TINY, _HUGE = (getattr(torch.finfo(torch.float32), name) for name in ("tiny", "max"))


@dataclass(frozen=True)
class Sampling:
    """Options of sampling, as in `GPT.generate`.

    Raises:
        ValueError: an option is out of range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        # Outside the normal range of float32, quotients and products become NaN.
        for name, most, zero in (
            ("temperature", _HUGE, "0 or "),
            ("top_p", 1.0, ""),
            ("repetition_penalty", _HUGE, ""),
        ):
            value = getattr(self, name)
            if value is not None and not _TINY <= value <= most and not (zero and value == 0):
                raise ValueError(f"{name} must be {zero}from {_TINY:.2g} to {most:.2g}, not {value}")

    def choose(self, logits: Tensor, seen: Tensor | None, uniform: Tensor | None) -> Tensor:
        """Sample a token for each row.

        Args:
            logits: (N, V) float32.
            seen: (N, V) bool, the tokens that the repetition penalty affects; None for none.
            uniform: (N,) float64 in [0, 1), the random numbers; None selects the most likely token (temperature 0).

        Returns:
            (N,) int64, the tokens; arbitrary valid ids in rows with logits that are NaN.
        """
        if seen is not None:
            penalty = self.repetition_penalty
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-_HUGE, _HUGE)
            logits = torch.where(seen, penalized, logits)
        if uniform is None:
            return logits.argmax(dim=-1)
        probabilities = sampling_distribution(logits, self.temperature, self.top_k, self.top_p)
        edges = probabilities.double().cumsum(dim=-1)
        edges = edges / edges[:, -1:]  # the last edge is exactly 1, above every draw
        # right=True never selects a token of probability 0.
        token = torch.searchsorted(edges, uniform[:, None], right=True)[:, 0]
        return token.clamp(max=logits.shape[-1] - 1)  # NaN compares below no edge, which gives index V


def sampling_distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities (..., V) that `GPT.generate` samples from, for temperature > 0."""
    # Relative to the largest logit, so that a quotient can only overflow to -inf.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked  # the mass of the tokens ranked above: 0 for the first
        kept = ranked.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)
