"""Sampling of a token: options, and the distribution that it is drawn from.

    logits -> repetition penalty -> temperature -> top-k -> top-p -> draw

A draw is the inverse of the cumulative distribution at a number in [0, 1).

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
    """How a token is chosen from logits; the options are those of `GPT.generate`.

    Raises ValueError for values that choose none.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k must be at least 1, not {self.top_k}")
        # Beyond these numbers of float32, quotients and products are NaN.
        for name, most, also in (
            ("temperature", _HUGE, "0 or "),
            ("top_p", 1.0, ""),
            ("repetition_penalty", _HUGE, ""),
        ):
            value = getattr(self, name)
            if value is not None and not _TINY <= value <= most and not (also and value == 0):
                raise ValueError(f"{name} must be {also}from {_TINY:.2g} to {most:.2g}, not {value}")

    def choose(self, logits: Tensor, seen: Tensor | None, uniform: Tensor | None) -> Tensor:
        """A token (N,) int64 for each row; any of the V where the logits are not numbers.

        logits:  (N, V) float32.
        seen:    (N, V) bool, the tokens that the repetition penalty acts on; None for none.
        uniform: (N,) float64 in [0, 1), what is drawn; not used at temperature 0.
        """
        if seen is not None:
            penalty = self.repetition_penalty
            penalized = torch.where(logits > 0, logits / penalty, logits * penalty).clamp(-_HUGE, _HUGE)
            logits = torch.where(seen, penalized, logits)
        if uniform is None:
            return logits.argmax(dim=-1)
        probabilities = sampling_distribution(logits, self.temperature, self.top_k, self.top_p)
        edges = probabilities.double().cumsum(dim=-1)
        edges = edges / edges[:, -1:]  # the last is exactly 1, which no draw reaches
        token = torch.searchsorted(edges, uniform[:, None], right=True)[
            :, 0
        ]  # never a token of probability 0
        return token.clamp(max=logits.shape[-1] - 1)  # NaN is below no edge


def sampling_distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities (..., V) that `GPT.generate` draws from, given logits (..., V); temperature > 0."""
    # From the largest logit down, so that a quotient overflows to -inf alone.
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
