"""Dropout as a pure function of (seed, batch, head, row, column).

Philox 4×32-10, a counter-based generator (Salmon et al., 2011, "Parallel random numbers: as easy as
1, 2, 3"): key = the low and high halves of the seed, counter = (column // 4, row, head, batch). The
four 32-bit words of one call decide over four neighbouring columns: column j takes word j % 4. Every
backend computes the same words, so that the masks are equal bit for bit.
"""

import torch
from torch import Tensor

_M0, _M1 = 0xD2511F53, 0xCD9E8D57  # multipliers
_W0, _W1 = 0x9E3779B9, 0xBB67AE85  # Weyl increments of the key
_LOW = 0xFFFFFFFF


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low halves of the 64-bit product of two 32-bit numbers held in int64."""
    low = a * (b & 0xFFFF)  # < 2^48
    high = a * (b >> 16)  # < 2^48
    middle = high + (low >> 16)  # < 2^49
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: Tensor) -> tuple[Tensor, ...]:
    """Four 32-bit words, as int64 tensors, for broadcastable int64 counters and a one-element int64 seed."""
    c0, c1, c2, c3 = counter
    k0, k1 = seed.reshape(()) & _LOW, (seed.reshape(()) >> 32) & _LOW
    for _ in range(10):
        high0, low0 = _multiply(_M0, c0)
        high1, low1 = _multiply(_M1, c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _W0) & _LOW, (k1 + _W1) & _LOW
    return tuple(torch.broadcast_tensors(c0, c1, c2, c3))


def dropout_threshold(p: float) -> int:
    """A word below this is dropped."""
    return min(round(p * 2**32), 2**32 - 1)


def dropout_keep(seed: Tensor, p: float, shape: tuple[int, int, int, int], first_batch: int = 0) -> Tensor:
    """The mask of kept elements, bool, of shape (batch, heads, rows, columns), on the seed's device.

    The batch entries are numbered from `first_batch`.
    """
    batch, heads, rows, columns = shape
    ranges = ((columns + 3) // 4, rows, heads, batch)
    views = ((1, 1, 1, -1), (1, 1, -1, 1), (1, -1, 1, 1), (-1, 1, 1, 1))
    counter = [torch.arange(n, device=seed.device).view(v) for n, v in zip(ranges, views, strict=True)]
    counter[3] += first_batch
    words = torch.stack(philox((counter[0], counter[1], counter[2], counter[3]), seed), dim=-1)
    return words.flatten(-2)[..., :columns] >= dropout_threshold(p)
