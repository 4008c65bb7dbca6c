"""Tile sizes of the attention kernels, by GPU, dtype and head dimension."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from .common import capability, is_tf32, next_power_of_2
from .tuned import chosen

# (BLOCK_M, BLOCK_N, warps, stages) for each kernel and (padded) head dimension. The first row is for plain and causal
# attention. The second is for attention with a mask, dropout, a softcap or ALiBi, which need registers of their own.
# These are the largest tiles that compile without spills; `python -m bench resources` shows the registers and shared
# memory of each and the bound on its inner loop.
# With more columns per tile the forward rescales the output less often: at a head dimension of 64, tiles of 128 columns
# take 4.25 fp32 instructions per score and tiles of 64 columns take 5. "bwd" keeps dk and dv in registers and adds dq
# to memory; tiles with few rows leave room for both sums.
Tile = tuple[int, int, int, int]
Table = dict[str, dict[int, tuple[Tile, Tile]]]
HOPPER: Table = {  # 227 KiB of shared memory; wgmma takes at least 64 rows
    "fwd": {
        64: ((128, 128, 8, 3), (128, 64, 8, 3)),
        128: ((128, 128, 8, 3), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (64, 32, 8, 1)),
    },
    "dkv": {
        64: ((64, 128, 8, 3), (32, 64, 8, 1)),
        128: ((32, 128, 8, 2), (32, 64, 8, 1)),
        256: ((32, 64, 8, 2), (16, 64, 8, 1)),
    },
    "bwd": {
        64: ((64, 128, 8, 3), (32, 64, 8, 1)),
        128: ((32, 128, 8, 2), (16, 64, 8, 1)),
        256: ((16, 64, 8, 2), (16, 64, 8, 1)),
    },
    "dq": {
        64: ((128, 64, 8, 3), (128, 32, 8, 2)),
        128: ((128, 64, 8, 2), (128, 32, 8, 2)),
        256: ((128, 32, 8, 2), (32, 32, 8, 1)),
    },
}
BLACKWELL: Table = HOPPER | {  # accumulators are in tensor memory; options spill with eight warps
    "fwd": HOPPER["fwd"] | {128: ((128, 64, 8, 3), (128, 32, 8, 2))},
    "dkv": HOPPER["dkv"] | {256: ((32, 64, 4, 1), (32, 64, 4, 1))},
    "bwd": {
        64: ((32, 128, 8, 3), (16, 64, 4, 1)),
        128: ((32, 128, 8, 2), (16, 64, 4, 1)),
        256: ((32, 64, 8, 2), (16, 64, 4, 1)),
    },
}
AMPERE: Table = {  # and every other GPU: at most 99 KiB of shared memory
    "fwd": {
        64: ((128, 64, 8, 3), (128, 32, 8, 2)),
        128: ((128, 32, 8, 3), (64, 32, 4, 2)),
        256: ((64, 32, 8, 1), (64, 16, 8, 1)),
    },
    "dkv": {
        64: ((32, 128, 8, 2), (32, 64, 8, 1)),
        128: ((64, 64, 8, 1), (32, 32, 8, 1)),
        256: ((16, 64, 8, 1), (16, 32, 8, 1)),
    },
    "bwd": {
        64: ((32, 128, 8, 2), (32, 64, 8, 1)),
        128: ((32, 64, 8, 1), (32, 32, 8, 1)),
        256: ((16, 64, 8, 1), (16, 32, 8, 1)),
    },
    "dq": {
        64: ((128, 32, 8, 2), (64, 32, 8, 1)),
        128: ((64, 32, 8, 2), (64, 32, 8, 1)),
        256: ((64, 16, 8, 1), (64, 16, 8, 1)),
    },
}
_FP32 = ((16, 16, 8, 1), (16, 16, 8, 1))
FP32: Table = {  # no tensor core multiplies IEEE fp32: scalar multiply-adds with operands in registers
    "fwd": {
        64: ((32, 32, 4, 1), (32, 16, 4, 1)),
        128: ((32, 16, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "dkv": {64: ((16, 32, 4, 1), (16, 16, 8, 1)), 128: _FP32, 256: _FP32},
    "bwd": {64: ((16, 32, 4, 1), (16, 16, 8, 1)), 128: _FP32, 256: _FP32},
    "dq": {64: ((32, 16, 4, 1), (16, 16, 8, 1)), 128: _FP32, 256: _FP32},
}
TF32: Table = {  # elements of twice the size: half of AMPERE's tiles
    "fwd": {
        64: ((64, 32, 4, 2), (64, 32, 4, 1)),
        128: ((64, 32, 4, 1), (32, 32, 4, 1)),
        256: ((32, 32, 8, 1), (32, 16, 8, 1)),
    },
    "dkv": {
        64: ((32, 64, 8, 1), (16, 64, 8, 1)),
        128: ((32, 32, 8, 1), (16, 32, 8, 1)),
        256: ((16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "bwd": {
        64: ((32, 64, 8, 1), (16, 64, 8, 1)),
        128: ((16, 32, 8, 1), (16, 32, 8, 1)),
        256: ((16, 32, 8, 1), (16, 16, 8, 1)),
    },
    "dq": {
        64: ((64, 32, 8, 1), (32, 32, 8, 1)),
        128: ((32, 32, 8, 1), (32, 16, 8, 1)),
        256: ((32, 16, 8, 1), (16, 16, 8, 1)),
    },
}
_SMALL = {256: ((16, 16, 8, 1), (16, 16, 8, 1))}
TF32_IN_99_KIB: Table = TF32 | {"dkv": TF32["dkv"] | _SMALL, "bwd": TF32["bwd"] | _SMALL}
# Tensor descriptors need no registers for addresses, which leaves plain attention room for larger tiles, by (major
# compute capability, kernel, head dimension). They lower the backward's integer instructions per score: from 0.97 to
# 0.41 with 128 rows at 64; from 1.94 to 1.09 with 64 rows at 128 (0.38 in the kernel without dq).
WITH_DESCRIPTORS: dict[tuple[int, str, int], Tile] = {
    (9, "bwd", 64): (128, 128, 8, 2),
    (9, "bwd", 128): (64, 128, 8, 2),
    (9, "dkv", 128): (64, 128, 8, 2),
    (10, "fwd", 128): (128, 128, 8, 2),
    (10, "bwd", 64): (64, 128, 8, 3),
}
# The forward of at most 16 rows, by head dimension. It is bound by the bytes of k and v: several tiles are in flight.
DECODING: dict[int, Tile] = {64: (16, 128, 4, 3), 128: (16, 64, 8, 3), 256: (16, 32, 4, 2)}
# With descriptors, Triton 3.6 spills in the backward (on sm_90a 111 registers at 64 and 18 at 128). With pointers it
# does not.
DESCRIPTORS_IN_BWD = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
# The interpreter's time grows with the number of tiles. These are small enough that tests reach the edges of tiles.
INTERPRETED = {"fwd": (32, 16, 4, 1), "bwd": (16, 32, 4, 1), "dkv": (16, 32, 4, 1), "dq": (32, 16, 4, 1)}


def tile_sizes(kernel: str, q: Tensor, v: Tensor, plain: bool, descriptors: bool) -> Tile:
    """Choose the tile of a kernel.

    Args:
        kernel: "fwd", "bwd", "dkv" (the backward without dq) or "dq".
        plain: no mask, dropout, softcap or ALiBi.
        descriptors: the kernel gets tensor descriptors.

    Returns:
        (BLOCK_M, BLOCK_N, warps, stages).
    """
    device, tf32 = capability(q), is_tf32(q)
    if device is None:
        return chosen(f"attention_{kernel}", q, (0, 0), INTERPRETED[kernel])
    fp32 = q.dtype == torch.float32
    name, size, row = _row(kernel, device, fp32, tf32, q.shape[-1], v.shape[-1], plain, descriptors)
    return chosen(name, q, size, row)


@functools.cache
def _row(
    kernel: str,
    device: tuple[int, int],
    fp32: bool,
    tf32: bool,
    D: int,
    DV: int,
    plain: bool,
    descriptors: bool,
) -> tuple[str, tuple[int, ...], Tile]:
    """Look up the arguments of `chosen`.

    A padded head dimension, or a v of another size, takes registers for the masks of its loads, as the options do.
    """
    size = max(64, next_power_of_2(max(D, DV)))
    plain = plain and D == DV and next_power_of_2(D) == D
    table = {9: HOPPER, 10: BLACKWELL}.get(device[0], AMPERE)
    if tf32:  # GPUs with at least 163 KiB of shared memory, or with 99
        table = TF32 if device in ((8, 0), (8, 7)) or device[0] in (9, 10) else TF32_IN_99_KIB
    elif fp32:
        table = FP32
    row = table[kernel][size][0 if plain else 1]
    if plain and descriptors:
        row = WITH_DESCRIPTORS.get((device[0], kernel, size), row)
    return f"attention_{kernel}", (size, int(plain), int(descriptors), int(tf32)), row


def transposes_dq(q: Tensor, descriptors: bool) -> bool:
    """Return whether the backward computes dq of few rows as (k^T ds)^T.

    The head dimension is then where Hopper's matrix instruction needs 64 rows and that of sm_100 needs 128. With
    pointers, Hopper has registers for it only at a head dimension of 256, where all tiles have few rows.
    """
    device = capability(q)
    if device is None or device[0] not in (9, 10) or (q.dtype == torch.float32 and not is_tf32(q)):
        return descriptors
    return descriptors or device[0] == 10 or (q.shape[-1] > 128 and q.element_size() == 2)


def decoding_tile(q: Tensor, v: Tensor) -> Tile:
    """Choose the tile of the forward of at most 16 rows; like `tile_sizes`."""
    if capability(q) is None:
        return INTERPRETED["fwd"]
    if q.dtype == torch.float32:
        return (TF32 if is_tf32(q) else FP32)["fwd"][256][1]
    return DECODING[max(64, next_power_of_2(max(q.shape[-1], v.shape[-1])))]
