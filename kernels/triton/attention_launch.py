"""The host side of the attention kernels: options, packed documents, tensor descriptors and kernel arguments."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder
from triton.tools.tensor_descriptor import TensorDescriptor

from .common import capability, is_tf32, next_power_of_2
from .philox import dropout_scale, dropout_threshold

# Multiply-adds of q k^T from which on the kernels get tensor descriptors. The host takes some microseconds for each:
# the forward has three, the backward five. The device saves about a tenth of attention's time. Below this limit, 3,000
# tokens of GPT-2 124M in rows of 1,024, the host is slower than the device. Estimates: no GPU has measured them.
DESCRIPTOR_MIN_MACS = 2**31
GRID_AXIS_MAX = 65_535  # programs along the second and third axis of a grid


class AttentionOptions(NamedTuple):
    """The optional tensors and the numbers of an attention call, as in the op's schema.

    Attributes:
        attn_mask: (B or 1, H or 1, Lq or 1, Lk or 1), bool or floating-point.
        alibi_slopes: (H,) or (B, H), fp32.
        seed: (1,), int64: of the dropout.
        left: columns that a row sees before the diagonal; -1 for all. `right` likewise after it.
        softcap: 0 for none.
    """

    attn_mask: Tensor | None
    alibi_slopes: Tensor | None
    seed: Tensor | None
    scale: float
    lower_right: bool
    left: int
    right: int
    softcap: float
    dropout_p: float

    @property
    def plain(self) -> bool:
        """True without a mask, ALiBi, softcap and dropout."""
        return not self.adds_to_scores and self.softcap == 0 and self.dropout_p == 0

    @property
    def adds_to_scores(self) -> bool:
        return self.attn_mask is not None or self.alibi_slopes is not None

    @property
    def defers_scale(self) -> bool:
        """True if nothing is added to the scores and their factor is positive: the exponent can include it."""
        return not self.adds_to_scores and (self.scale > 0 or self.softcap > 0)


@dataclass(frozen=True)
class PackedDocuments:
    """Packed documents as a batch: entry n is the rows cu_seqlens_q[n] .. cu_seqlens_q[n + 1]."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    def as_batch(self, *tensors: Tensor) -> Iterator[Tensor]:
        """View (total, heads, size) tensors as (documents, heads, total, size).

        Every entry is the whole memory, in which a program goes to the rows of its document.
        """
        for x in tensors:
            yield self.expand(x.transpose(0, 1))

    def expand(self, x: Tensor) -> Tensor:
        """View a (heads, total, size) tensor as (documents, heads, total, size)."""
        return x.expand(self.cu_seqlens_q.shape[0] - 1, *x.shape)


def max_lengths(q: Tensor, k: Tensor, packed: PackedDocuments | None) -> tuple[int, int]:
    """Return the largest number of rows and of columns of a batch entry."""
    if packed is None:
        return q.shape[2], k.shape[2]
    return min(packed.max_seqlen_q, q.shape[2]), min(packed.max_seqlen_k, k.shape[2])


def grid_of(blocks: int, heads: int, batch: int) -> tuple[tuple[int, ...], int | None]:
    """Choose the grid and the kernel's argument `folded_heads`.

    The grid is (blocks, heads, batch), in which the blocks of a head are neighbours, and `folded_heads` is None. Where
    an axis would be too long, heads and batch are folded into the first axis, which may have 2**31 - 1 programs, and
    `folded_heads` is the number of heads.
    """
    if heads <= GRID_AXIS_MAX and batch <= GRID_AXIS_MAX:
        return (blocks, heads, batch), None
    return (heads * batch, blocks), heads


# ---- kernel arguments ----


def constexprs(q: Tensor, k: Tensor, v: Tensor, lower_right: bool) -> dict[str, int | bool | str]:
    """Return the compile-time arguments that all attention kernels have in common."""
    group = q.shape[1] // max(k.shape[1], 1)
    return _constexprs(group, q.shape[-1], v.shape[-1], lower_right, is_tf32(q))


@functools.cache
def _constexprs(group: int, D: int, DV: int, lower_right: bool, tf32: bool) -> dict[str, int | bool | str]:
    return {
        "GROUP": group,
        "LOWER_RIGHT": lower_right,
        "D": D,
        "DV": DV,
        "BLOCK_D": max(16, next_power_of_2(D)),  # tl.dot takes at least 16
        "BLOCK_DV": max(16, next_power_of_2(DV)),
        "PRECISION": "tf32" if tf32 else "ieee",
    }


def cu_seqlens_of(packed: PackedDocuments | None) -> tuple[Tensor, Tensor] | None:
    return None if packed is None else (packed.cu_seqlens_q, packed.cu_seqlens_k)


def lengths_and_window(
    q: Tensor, k: Tensor, options: AttentionOptions
) -> tuple[int, int, int | None, int | None]:
    """Return the arguments Lq, Lk, left and right; None for no bound.

    A bound beyond every column is cut to Lq + Lk, so that sums with it stay within int32.
    """
    Lq, Lk, left, right = q.shape[2], k.shape[2], options.left, options.right
    most = Lq + Lk
    return Lq, Lk, None if left < 0 else min(left, most), None if right < 0 else min(right, most)


def optional_arguments(options: AttentionOptions) -> tuple[Any, Any, Any, int | None]:
    """Return the arguments attn_mask, alibi_slopes, dropout and dropout_threshold.

    Each of the first three is None, which costs a launch little time, or a tuple: a mask and its strides, slopes and
    their strides over batch and head (0 over the batch for slopes (H,)), or the seed and the scale of dropout.
    """
    mask, slopes, seed, p = options.attn_mask, options.alibi_slopes, options.seed, options.dropout_p
    attn_mask = None
    if mask is not None:
        attn_mask = (mask, *(0 if n == 1 else s for n, s in zip(mask.shape, mask.stride(), strict=True)))
    alibi_slopes = None
    if slopes is not None:
        alibi_slopes = (slopes, 0 if slopes.dim() == 1 else slopes.stride(0), slopes.stride(-1))
    if p == 0:
        return attn_mask, alibi_slopes, None, None
    return attn_mask, alibi_slopes, (seed, dropout_scale(p)), dropout_threshold(p)


def empty_blhd(like: Tensor, heads: int, length: int, size: int) -> Tensor:
    """Allocate (B, heads, length, size) in the memory order (B, length, heads, size).

    The projections before and after attention read and write that order.
    """
    return like.new_empty(like.shape[0], length, heads, size).transpose(1, 2)


# ---- tensor descriptors ----


def use_descriptors(packed: PackedDocuments | None, *tensors: Tensor) -> bool:
    """Return whether the kernels get tensor descriptors.

    With a descriptor the copying unit (TMA, sm_90 and sm_100) computes all addresses of a tile, and elements beyond the
    end of a dimension are 0. Packed documents have none: the rows after the end of a document are those of the next
    one, which may hold NaN. Small problems have none, because the host would take longer than the device.

    Args:
        tensors: q, k and others of their shapes.
    """
    if packed is not None:
        return False
    device = capability(tensors[0])
    if device is None:
        if not hasattr(InterpreterBuilder, "create_descriptor_reduce"):  # `add_rows` needs it
            return False
    elif device[0] not in (9, 10) or tensors[0].numel() * tensors[1].shape[2] < DESCRIPTOR_MIN_MACS:
        return False
    return all(map(_fits_descriptor, tensors))


def as_descriptors(descriptors: bool, *tiles: tuple[Tensor, int]) -> tuple[Tensor | TensorDescriptor, ...]:
    """Return tensor descriptors, or the tensors themselves where `descriptors` is false.

    Args:
        tiles: (B, H, L, size) tensors, each with the number of rows of a head that a tile has.
    """
    if not descriptors:
        return tuple(x for x, _ in tiles)
    blocks = ([1, 1, rows, max(16, next_power_of_2(x.shape[3]))] for x, rows in tiles)
    return tuple(
        TensorDescriptor(x, [*x.shape], [*x.stride()], block)
        for (x, _), block in zip(tiles, blocks, strict=True)
    )


def _fits_descriptor(x: Tensor) -> bool:
    """Return whether elements have 16 bits and rows and heads begin at multiples of 16 bytes.

    Operands of fp32 products come from registers, so that fp32 gains nothing.
    """
    return (
        x.element_size() == 2
        and x.shape[3] <= 128  # with descriptors of 256 the backward spills, with pointers it does not
        and x.data_ptr() % 16 == 0
        and x.stride(3) == 1
        and all(n > 0 for n in x.shape)
        and all(s > 0 and s % 8 == 0 for s in x.stride()[:3])
    )
