"""Choosing tokens: the distribution that is drawn from, and the loop that grows rows of text.

    logits -> repetition penalty -> temperature -> top-k -> top-p -> draw

A draw is the inverse of the cumulative distribution at a number in [0, 1) that belongs to (row, step) alone. So a row
draws the same whatever else is in its batch, on every device, and when other rows end.

Shapes: B rows, N of them not ended, V = vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt import ops
from fastgpt.kv_cache import KVCache

if TYPE_CHECKING:
    from fastgpt.model import GPT

UNUSABLE = "the model's logits are NaN or infinite: its training has diverged; take an older checkpoint"
NOTHING = -1  # in place of a token, behind the end of a row
MOST_NEW_TOKENS = 1 << 24
_BLOCK = 1024  # steps that memory is taken for at once
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


def continue_rows(
    model: GPT,
    idx: Tensor,
    lengths: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    end_token: int | None,
    on_token: Callable[[int, int], bool | None] | None,
    num_tokens: int | None,
) -> Tensor:
    """`GPT.generate`, for a model in evaluation mode and without gradients."""
    B, T = idx.shape  # noqa: N806
    _check_prompts(idx, lengths, max_new_tokens)
    device = idx.device
    ends = torch.full((B,), T, device=device) if lengths is None else lengths.to(device, torch.long)
    uniform = _Uniform(B, max_new_tokens, seed, device) if sampling.temperature else None
    text = idx.long().masked_fill(torch.arange(T, device=device) >= ends[:, None], NOTHING)
    vocab_size = model.config.vocab_size if num_tokens is None else min(num_tokens, model.config.vocab_size)
    seen = _seen(text, vocab_size) if sampling.repetition_penalty != 1 else None

    finished: list[tuple[Tensor, Tensor]] = []  # (places, rows of `text`), as they end
    rows = torch.arange(B, device=device)
    cache = KVCache(model.config.n_layer, min(model.config.block_size, T + max_new_tokens))
    even = lengths is None  # then nothing has to be read back from the device
    longest = T if even else int(ends.max())
    unusable = torch.zeros((), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        if step % _BLOCK == 0:
            text = F.pad(text, (0, min(_BLOCK, max_new_tokens - step)), value=NOTHING)
        hidden = _last_hidden(model, text, ends, longest, even, cache)
        logits = ops.linear(hidden, model.lm_head.weight[:num_tokens]).float()
        if logits.numel():
            unusable |= ~logits.amax().isfinite()
        if (on_token is not None or device.type == "cpu") and unusable:
            raise FloatingPointError(UNUSABLE)
        token = sampling.choose(logits, seen, None if uniform is None else uniform.at(step)[rows])
        text.scatter_(1, ends[:, None], token[:, None])
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        ends, longest = ends + 1, longest + 1
        if end_token is None and on_token is None:
            continue
        goes_on = [
            not ((on_token is not None and on_token(row, one)) or one == end_token)
            for row, one in zip(rows.tolist(), token.tolist(), strict=True)
        ]
        if not all(goes_on):
            going = torch.tensor(goes_on, device=device)
            finished.append((rows[~going], text[~going]))
            kept = going.nonzero()[:, 0]
            rows, text, ends = rows[kept], text[kept], ends[kept]
            seen = None if seen is None else seen[kept]
            if not len(rows):
                break
            cache.keep(kept)
            longest = longest if even else int(ends.max())
    if unusable:  # a GPU is not waited for before
        raise FloatingPointError(UNUSABLE)
    whole = torch.full((B, T + max_new_tokens), NOTHING, device=device)
    for places, part in (*finished, (rows, text)):
        whole[places, : part.shape[1]] = part
    return whole


def _last_hidden(model: GPT, text: Tensor, ends: Tensor, longest: int, even: bool, cache: KVCache) -> Tensor:
    """What the head reads at the last token of each row, (N, C).

    text (N, …) holds the rows, ends (N,) their lengths, longest the largest of them, even says that they are equal,
    cache has the tokens before the last; it is filled anew at the first call, and when the longest row has
    outgrown the block.
    """
    block = model.config.block_size
    if cache.length and longest <= block:
        return model.hidden(text.gather(1, ends[:, None] - 1), cache)[:, -1]
    cache.clear()
    starts = (ends - block).clamp(min=0)
    window = starts[:, None] + torch.arange(min(longest, block), device=text.device)
    hidden = model.hidden(text.gather(1, window).clamp(min=0), cache)
    if even:
        return hidden[:, -1]
    sizes = ends - starts
    cache.set_lengths(sizes)
    return hidden[torch.arange(len(ends), device=text.device), sizes - 1]


class _Uniform:
    """Numbers in [0, 1), float64; with a seed row b is a stream of its own, that of seed + b."""

    def __init__(self, rows: int, steps: int, seed: int | None, device: torch.device) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"seed must not be negative, not {seed}")
        self._rows, self._steps, self._device = rows, steps, device
        self._streams = (
            [np.random.default_rng(seed + row) for row in range(rows)] if seed is not None else None
        )
        self._block = torch.empty(rows, 0)

    def at(self, step: int) -> Tensor:
        """Those of a step, (rows,); steps come one after the other."""
        if step % _BLOCK == 0:
            size = min(_BLOCK, self._steps - step)
            if self._streams:
                drawn = torch.from_numpy(np.stack([stream.random(size) for stream in self._streams]))
            else:
                drawn = torch.rand(self._rows, size, dtype=torch.float64)
            self._block = drawn.to(self._device)
        return self._block[:, step % _BLOCK]


def _seen(text: Tensor, vocab_size: int) -> Tensor:
    """Which tokens below vocab_size each row of text (N, …) holds: bool (N, vocab_size)."""
    seen = torch.zeros(len(text), vocab_size + 1, dtype=torch.bool, device=text.device)
    seen.scatter_(1, text.masked_fill((text == NOTHING) | (text > vocab_size), vocab_size), True)
    return seen[:, :vocab_size].contiguous()


def _check_prompts(idx: Tensor, lengths: Tensor | None, max_new_tokens: int) -> None:
    B, T = idx.shape  # noqa: N806
    if not T:
        raise ValueError("generation needs a prompt of at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, not {max_new_tokens}")
    if max_new_tokens > MOST_NEW_TOKENS:
        raise ValueError(f"max_new_tokens must be at most {MOST_NEW_TOKENS:,}, not {max_new_tokens:,}")
    if lengths is None:
        return
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be ({B},) integers, not {tuple(lengths.shape)} of {lengths.dtype}")
    if not B:
        raise ValueError("lengths of no prompts: give at least one, or omit lengths")
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > T:
        raise ValueError(f"lengths must lie in 1 to {T}, not in {shortest} to {longest}")
