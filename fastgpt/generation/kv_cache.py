"""Keys and values of the tokens already seen, so that a new token costs one row of attention.

Rows may have different lengths. Prompts are padded on the right: causality hides the padding in the first pass, which
so needs no mask. A further token goes right behind its own row, over the padding, and a mask over the columns hides
what is left of it. The columns of a row, and so the kernels' tiles and their split over keys, are where they are for
the row alone; padding on the left would shift them, and need a mask in every pass. While all rows are equally long
there is no mask at all.

Shapes: B rows, H heads, T new tokens, D channels a head.
"""

# ruff: noqa: N806  (sizes are written B, H, T as above)

from __future__ import annotations

import torch
from torch import Tensor


class KVCache:
    """One (B, H, capacity, D) buffer a layer for the keys and one for the values.

    They are allocated at the first `append`, when shape and dtype are known. A pass of the model is `begin`,
    `append` in every layer, `advance`.

    length:  how many positions the longest row fills.
    lengths: (B,) int64, how many each row fills; None while they are equal.
    mask:    bool (B, 1, 1, length + 1), the columns that the new token of each row sees; None for all.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.lengths: Tensor | None = None
        self.mask: Tensor | None = None
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def begin(self, count: int) -> slice | Tensor:
        """Where `count` new tokens a row go: a range of positions, or (B, 1) where the rows differ.

        Raises ValueError for more than one token where they do.
        """
        if self.lengths is None:
            self.mask = None
            return slice(self.length, self.length + count)
        if count != 1:
            raise ValueError(f"rows of different lengths take one token at a time, not {count}")
        columns = torch.arange(self.length + 1, device=self.lengths.device)
        self.mask = (columns <= self.lengths[:, None])[:, None, None]
        return self.lengths[:, None]

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) behind the filled positions; return all, (B, H, length + T, D)."""
        B, H, T, D = k.shape
        buffers = self._layers[layer]
        if buffers is None:
            # Zeros: a masked column of shorter rows may never be written, and 0 times what lies there could be NaN.
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
        """Count the `count` tokens a row that were appended in every layer."""
        self.length += count
        if self.lengths is not None:
            self.lengths += count

    def set_lengths(self, lengths: Tensor) -> None:
        """Forget what each row has behind its first lengths (B,) tokens, int64."""
        self.length = int(lengths.max())
        self.lengths = None if bool((lengths == self.length).all()) else lengths.clone()

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows (N,) int64 alone."""
        self._layers = [None if kv is None else (kv[0][rows], kv[1][rows]) for kv in self._layers]
        if self.lengths is not None:
            self.set_lengths(self.lengths[rows])

    def clear(self) -> None:
        """Forget all tokens; the buffers stay."""
        self.length, self.lengths = 0, None
