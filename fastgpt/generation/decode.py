"""Autoregressive decoding of a batch of prompts.

The random number of a draw, in [0, 1), depends on (row, step) only. A row therefore samples the same tokens on every
device, independently of the other rows of its batch and of when they end.

Shapes: B rows, N of them not ended, V = vocab_size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastgpt.generation.kv_cache import KVCache
from fastgpt.generation.sampling import Sampling
from fastgpt.ops._checks import check_tokens

UNUSABLE = "the model's logits are NaN or infinite: its training has diverged; use an older checkpoint"
NOTHING = -1  # fills a row after its end
MOST_NEW_TOKENS = 1 << 24
_BLOCK = 1024  # steps per allocation of memory


class ModelConfig(Protocol):
    """The part of a model's configuration that decoding reads."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def block_size(self) -> int: ...
    @property
    def n_layer(self) -> int: ...


class CausalLM(Protocol):
    """Interface of a causal language model for decoding; `fastgpt.model.GPT` implements it."""

    @property
    def config(self) -> ModelConfig: ...
    @property
    def training(self) -> bool: ...
    def train(self, mode: bool = True) -> Any: ...
    def eval(self) -> Any: ...
    def hidden_states(self, idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the input of `logits` (B, T, C) for idx (B, T), which continues the tokens in `cache`."""
        ...

    def logits(self, hidden: Tensor, num_tokens: int | None = None) -> Tensor:
        """Return the logits (N, V) of hidden (N, C), of the first `num_tokens` tokens alone if given."""
        ...


@torch.no_grad()
def generate(
    model: CausalLM,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    *,
    repetition_penalty: float = 1.0,
    lengths: Tensor | None = None,
    end_token: int | None = None,
    on_token: Callable[[int, int], bool | None] | None = None,
    num_tokens: int | None = None,
) -> Tensor:
    """Sample up to `max_new_tokens` tokens after each prompt.

    With the key-value cache, a new token needs a forward pass of one row. When the text exceeds block_size, the window
    slides: each further token is predicted from the last block_size tokens with a full forward pass, because positions
    count from the start of the window. The model is in evaluation mode during generation.

    Args:
        model: the model.
        idx: (B, T) integers, the prompts, padded on the right if `lengths` is given.
        max_new_tokens: maximum number of new tokens per row.
        temperature: divisor of the logits; 0 selects the most likely token.
        top_k: number of the most likely tokens to sample from.
        top_p: probability of the smallest set of tokens to sample from (Holtzman et al. 2020).
        seed: row b samples as it does alone with seed + b, and torch's generator is unchanged. None uses torch's
            generator.
        repetition_penalty: divisor of the positive logits, and factor of the negative logits, of tokens that the row
            already contains (Keskar et al. 2019, CTRL, section 4.1).
        lengths: (B,) integers from 1 to T, the length of each prompt. New tokens directly follow the row's prompt.
        end_token: a row ends at this token.
        on_token: called with (row, token) for every token; a row ends when it returns True.
        num_tokens: only ids below it are sampled, for a padded vocabulary.

    Returns:
        (B, T + max_new_tokens) int64, -1 after the end of a row.

    Raises:
        ValueError: a prompt or option is out of range.
        IndexError: a token is outside the vocabulary (on the CPU).
        FloatingPointError: the logits are NaN or infinite.
    """
    check_tokens(idx)
    sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
    was_training = model.training
    model.eval()
    try:
        return _decode(model, idx, lengths, max_new_tokens, sampling, seed, end_token, on_token, num_tokens)
    finally:
        model.train(was_training)


def _decode(
    model: CausalLM,
    idx: Tensor,
    lengths: Tensor | None,
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    end_token: int | None,
    on_token: Callable[[int, int], bool | None] | None,
    num_tokens: int | None,
) -> Tensor:
    """Implement `generate` for a model in evaluation mode, without gradients."""
    B, T = idx.shape  # noqa: N806
    _check_prompts(idx, lengths, max_new_tokens)
    device = idx.device
    ends = torch.full((B,), T, device=device) if lengths is None else lengths.to(device, torch.long)
    uniform = _Uniform(B, max_new_tokens, seed, device) if sampling.temperature else None
    text = idx.long().masked_fill(torch.arange(T, device=device) >= ends[:, None], NOTHING)
    vocab_size = model.config.vocab_size if num_tokens is None else min(num_tokens, model.config.vocab_size)
    seen = _seen(text, vocab_size) if sampling.repetition_penalty != 1 else None

    finished: list[tuple[Tensor, Tensor]] = []  # (row indices, rows of `text`)
    rows = torch.arange(B, device=device)
    cache = KVCache(model.config.n_layer, min(model.config.block_size, T + max_new_tokens))
    even = lengths is None  # then no length is read back from the device
    longest = T if even else int(ends.max())
    unusable = torch.zeros((), dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        if step % _BLOCK == 0:
            text = F.pad(text, (0, min(_BLOCK, max_new_tokens - step)), value=NOTHING)
        hidden = _last_hidden(model, text, ends, longest, even, cache)
        logits = model.logits(hidden, vocab_size).float()
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
        unfinished = [
            not ((on_token is not None and on_token(row, one)) or one == end_token)
            for row, one in zip(rows.tolist(), token.tolist(), strict=True)
        ]
        if not all(unfinished):
            is_unfinished = torch.tensor(unfinished, device=device)
            finished.append((rows[~is_unfinished], text[~is_unfinished]))
            kept = is_unfinished.nonzero()[:, 0]
            rows, text, ends = rows[kept], text[kept], ends[kept]
            seen = None if seen is None else seen[kept]
            if not len(rows):
                break
            cache.keep(kept)
            longest = longest if even else int(ends.max())
    if unusable:  # checked once at the end on a GPU, because reading the flag synchronizes
        raise FloatingPointError(UNUSABLE)
    out = torch.full((B, T + max_new_tokens), NOTHING, device=device)
    for indices, part in (*finished, (rows, text)):
        out[indices, : part.shape[1]] = part
    return out


def _last_hidden(
    model: CausalLM, text: Tensor, ends: Tensor, longest: int, even: bool, cache: KVCache
) -> Tensor:
    """Compute the hidden state of the last token of each row.

    Args:
        model: the model.
        text: (N, ...) int64, the rows.
        ends: (N,) int64, the lengths of the rows.
        longest: the largest length.
        even: True if all lengths are equal.
        cache: keys and values of all tokens but the last. It is refilled at the first call and once the longest row
            exceeds the block size.

    Returns:
        (N, C), the input of the head.
    """
    block = model.config.block_size
    if cache.length and longest <= block:
        return model.hidden_states(text.gather(1, ends[:, None] - 1), cache)[:, -1]
    cache.clear()
    starts = (ends - block).clamp(min=0)
    window = starts[:, None] + torch.arange(min(longest, block), device=text.device)
    hidden = model.hidden_states(text.gather(1, window).clamp(min=0), cache)
    if even:
        return hidden[:, -1]
    sizes = ends - starts
    cache.set_lengths(sizes)
    return hidden[torch.arange(len(ends), device=text.device), sizes - 1]


class _Uniform:
    """Uniform random numbers in [0, 1), float64; with a seed, row b has its own stream, that of seed + b."""

    def __init__(self, rows: int, steps: int, seed: int | None, device: torch.device) -> None:
        if seed is not None and seed < 0:
            raise ValueError(f"seed must not be negative, not {seed}")
        self._rows, self._steps, self._device = rows, steps, device
        self._streams = (
            [np.random.default_rng(seed + row) for row in range(rows)] if seed is not None else None
        )
        self._block = torch.empty(rows, 0)

    def at(self, step: int) -> Tensor:
        """Return the numbers of a step, (rows,); steps must be consecutive."""
        if step % _BLOCK == 0:
            size = min(_BLOCK, self._steps - step)
            if self._streams:
                drawn = torch.from_numpy(np.stack([stream.random(size) for stream in self._streams]))
            else:
                drawn = torch.rand(self._rows, size, dtype=torch.float64)
            self._block = drawn.to(self._device)
        return self._block[:, step % _BLOCK]


def _seen(text: Tensor, vocab_size: int) -> Tensor:
    """Mark the tokens below vocab_size that each row of text (N, ...) contains: (N, vocab_size) bool."""
    seen = torch.zeros(len(text), vocab_size + 1, dtype=torch.bool, device=text.device)
    seen.scatter_(1, text.masked_fill((text == NOTHING) | (text > vocab_size), vocab_size), True)
    return seen[:, :vocab_size].contiguous()


def _check_prompts(idx: Tensor, lengths: Tensor | None, max_new_tokens: int) -> None:
    B, T = idx.shape  # noqa: N806
    if not T:
        raise ValueError("the prompt is empty; give at least one token")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must not be negative, not {max_new_tokens}")
    if max_new_tokens > MOST_NEW_TOKENS:
        raise ValueError(f"max_new_tokens must be at most {MOST_NEW_TOKENS:,}, not {max_new_tokens:,}")
    if lengths is None:
        return
    if lengths.shape != (B,) or lengths.is_floating_point() or lengths.dtype == torch.bool:
        raise ValueError(f"lengths must be ({B},) integers, not {tuple(lengths.shape)} of {lengths.dtype}")
    if not B:
        raise ValueError("lengths given for an empty batch; omit lengths")
    shortest, longest = int(lengths.min()), int(lengths.max())
    if shortest < 1 or longest > T:
        raise ValueError(f"lengths must be from 1 to {T}, not from {shortest} to {longest}")
