"""Key-value cache: stores keys and values of past tokens, so that a new token needs one row of attention.

Rows may have different lengths. Prompts are padded on the right: causality hides the padding in the first pass, which
therefore needs no mask. New tokens of a row overwrite its padding, and a mask over the columns hides the rest. The
columns of a row, and thus the kernels' tiles and their split over keys, are the same as for the row alone; padding on
the left would shift them and need a mask in every pass. No mask is needed while all rows have the same length.

Shapes: B rows, H heads, T new tokens, D channels per head.
"""

# ruff: noqa: N806  (sizes are written B, H, T as above)

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """Key and value buffers, (B, H, capacity, D) each, per layer.

    They are allocated at the first `append`, when shape and dtype are known. A forward pass of the model calls `begin`,
    then `append` in every layer, then `advance`.

    Attributes:
        length: number of positions that the longest row fills.
        lengths: (B,) int64, number of positions that each row fills; None if all are equal.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.lengths: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def begin(self, count: int) -> slice | Tensor:
        """Start a forward pass of `count` new tokens per row.

        Returns:
            The positions of the new tokens: a slice, or (B, 1) int64 if the lengths differ.

        Raises:
            ValueError: the lengths differ and count is not 1.
        """
        if self.lengths is None:
            return slice(self.length, self.length + count)
        if count != 1:
            raise ValueError(
                f"rows of different lengths accept one token per pass, not {count}; append them one by one"
            )
        return self.lengths[:, None]

    def mask_within(self, window: int | None) -> Tensor | None:
        """Return the columns that the new token of each row attends to, (B, 1, 1, length + 1) bool.

        `window` limits them to the last ones, the token's own included. None if all lengths are equal: no mask is
        needed then.
        """
        if self.lengths is None:
            return None
        columns, last = torch.arange(self.length + 1, device=self.lengths.device), self.lengths[:, None]
        seen = columns <= last
        if window is not None:
            seen &= columns > last - window
        return seen[:, None, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) after the filled positions; return all, (B, H, length + T, D)."""
        B, H, T, D = k.shape
        buffers = self._layers[layer]
        if buffers is None:
            # Zeros: masked columns of shorter rows may stay unwritten, and 0 times an uninitialized value can be NaN.
            buffers = k.new_zeros(B, H, self.capacity, D), v.new_zeros(B, H, self.capacity, D)
            self._layers[layer] = buffers
        end = self.length + T
        for buffer, new in zip(buffers, (k, v), strict=True):
            if self.lengths is None:
                buffer[:, :, self.length : end] = new
            else:
                buffer[torch.arange(B, device=k.device), :, self.lengths] = new[:, :, 0]
        return buffers[0][:, :, :end], buffers[1][:, :, :end]

    def advance(self, count: int) -> None:
        """Add `count`, the number of new tokens per row, to the lengths, after `append` in every layer."""
        self.length += count
        if self.lengths is not None:
            self.lengths += count

    def set_lengths(self, lengths: Tensor) -> None:
        """Truncate each row to `lengths` (B,) int64 tokens."""
        self.length = int(lengths.max())
        self.lengths = None if bool((lengths == self.length).all()) else lengths.clone()

    def keep(self, rows: Tensor) -> None:
        """Keep only these rows (N,) int64."""
        self._layers = [None if kv is None else (kv[0][rows], kv[1][rows]) for kv in self._layers]
        if self.lengths is not None:
            self.set_lengths(self.lengths[rows])

    def clear(self) -> None:
        """Remove all tokens; the buffers stay allocated."""
        self.length, self.lengths = 0, None
