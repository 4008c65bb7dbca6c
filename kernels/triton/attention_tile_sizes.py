"""The tile sizes of the attention kernels, by GPU, dtype and head dimension."""

from __future__ import annotations

import functools

import torch
import triton
from torch import Tensor

from fastgpt.kernels.common import capability, is_tf32, next_power_of_2
from fastgpt.kernels.tuned import chosen

# (BLOCK_M, BLOCK_N, warps, stages) for each kernel and (padded) head dimension: first for plain and causal
# attention, then with a mask, dropout, a softcap or slopes, which take registers from the tile. The largest tiles that
# compile without spills: `python -m bench resources` shows what each takes and what its inner loop is bound by.
# More columns a tile of the forward rescale the output less often: at 64, 128 columns instead of 64 take 4.25 instead
# of 5 fp32 instructions a score. In "bwd" (which holds dk and dv, and sends dq away) few rows leave room for both.
Tile = tuple[int, int, int, int]
Table = dict[str, dict[int, tuple[Tile, Tile]]]
HOPPER: Table = {  # 227 KiB of shared memory, products of 64 rows and more
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
BLACKWELL: Table = HOPPER | {  # sums lie in tensor memory; options spill with eight warps
    "fwd": HOPPER["fwd"] | {128: ((128, 64, 8, 3), (128, 32, 8, 2))},
    "dkv": HOPPER["dkv"] | {256: ((32, 64, 4, 1), (32, 64, 4, 1))},
    "bwd": {
        64: ((32, 128, 8, 3), (16, 64, 4, 1)),
        128: ((32, 128, 8, 2), (16, 64, 4, 1)),
        256: ((32, 64, 8, 2), (16, 64, 4, 1)),
    },
}
AMPERE: Table = {  # and every other part: at most 99 KiB
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
FP32: Table = {  # no tensor core has IEEE fp32: multiply-adds, whose operands stand in registers
    "fwd": {
        64: ((32, 32, 4, 1), (32, 16, 4, 1)),
        128: ((32, 16, 8, 1), (16, 16, 8, 1)),
        256: ((16, 16, 8, 1), (16, 16, 8, 1)),
    },
    "dkv": {64: ((16, 32, 4, 1), (16, 16, 8, 1)), 128: _FP32, 256: _FP32},
    "bwd": {64: ((16, 32, 4, 1), (16, 16, 8, 1)), 128: _FP32, 256: _FP32},
    "dq": {64: ((32, 16, 4, 1), (16, 16, 8, 1)), 128: _FP32, 256: _FP32},
}
TF32: Table = {  # tensor cores for fp32 with the digits of fp16: half of AMPERE's tiles at twice the bytes
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
# By tensor descriptors, whose addresses take no registers, plain attention has room for larger tiles, by (major
# capability, kernel, head dimension). Integer instructions a score of the backward: with 128 rows at 64 0.41, not 0.97;
# with 64 rows at 128 1.09, not 1.94, and 0.38 where dq is left out.
DESCRIBED: dict[tuple[int, str, int], Tile] = {
    (9, "bwd", 64): (128, 128, 8, 2),
    (9, "bwd", 128): (64, 128, 8, 2),
    (9, "dkv", 128): (64, 128, 8, 2),
    (10, "fwd", 128): (128, 128, 8, 2),
    (10, "bwd", 64): (64, 128, 8, 3),
}
# The forward of 16 rows and fewer, by head dimension: bound by the bytes of k and v, of which tiles are in flight.
DECODING: dict[int, Tile] = {64: (16, 128, 4, 3), 128: (16, 64, 8, 3), 256: (16, 32, 4, 2)}
# Triton 3.6 spills in the backward by descriptors (on sm_90a 111 registers at 64, 18 at 128), but not by pointers.
DESCRIBED_BWD = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7)
# The interpreter's time goes by the number of tiles, its use is in testing their edges.
INTERPRETED = {"fwd": (32, 16, 4, 1), "bwd": (16, 32, 4, 1), "dkv": (16, 32, 4, 1), "dq": (32, 16, 4, 1)}


def tile_sizes(kernel: str, q: Tensor, v: Tensor, plain: bool, described: bool) -> Tile:
    """(BLOCK_M, BLOCK_N, warps, stages) of one of the kernels "fwd", "bwd", "dkv" (that without dq), "dq"."""
    device, tf32 = capability(q), is_tf32(q)
    if device is None:
        return chosen(f"attention_{kernel}", q, (0, 0), INTERPRETED[kernel])
    fp32 = q.dtype == torch.float32
    name, size, row = _row(kernel, device, fp32, tf32, q.shape[-1], v.shape[-1], plain, described)
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
    described: bool,
) -> tuple[str, tuple[int, ...], Tile]:
    """The arguments of `chosen`.

    A padded head dimension, or another one of v, takes registers too, for the masks of the loads.
    """
    size = max(64, next_power_of_2(max(D, DV)))
    plain = plain and D == DV and next_power_of_2(D) == D
    table = {9: HOPPER, 10: BLACKWELL}.get(device[0], AMPERE)
    if tf32:  # 163 KiB of shared memory and more, or 99
        table = TF32 if device in ((8, 0), (8, 7)) or device[0] in (9, 10) else TF32_IN_99_KIB
    elif fp32:
        table = FP32
    row = table[kernel][size][0 if plain else 1]
    if plain and described:
        row = DESCRIBED.get((device[0], kernel, size), row)
    return f"attention_{kernel}", (size, int(plain), int(described), int(tf32)), row


def keys_left(q: Tensor, described: bool) -> bool:
    """Whether few rows of dq are made as (k^T ds)^T: the head dimension then stands where Hopper's matrix instruction
    wants 64 rows, and that of sm_100 128. By pointers Hopper has registers for it only at 256, where all tiles are low.
    """
    device = capability(q)
    if device is None or device[0] not in (9, 10) or (q.dtype == torch.float32 and not is_tf32(q)):
        return described
    return described or device[0] == 10 or (q.shape[-1] > 128 and q.element_size() == 2)


def decoding_tile(q: Tensor, v: Tensor) -> Tile:
    """As `tile_sizes`, of the forward of few rows."""
    if capability(q) is None:
        return INTERPRETED["fwd"]
    if q.dtype == torch.float32:
        return (TF32 if is_tf32(q) else FP32)["fwd"][256][1]
    return DECODING[max(64, next_power_of_2(max(q.shape[-1], v.shape[-1])))]
