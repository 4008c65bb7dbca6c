"""Occupancy: the resources of a multiprocessor by architecture, and a call of cuobjdump."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.codegen.sass import Instruction

# Registers, bytes of shared memory, threads and blocks of a multiprocessor (compute capability tables of NVIDIA's
# programming guide). Each block needs 1 KiB of shared memory in addition to its own.
MULTIPROCESSOR = {
    "sm_80": (65536, 164 << 10, 2048, 32),
    "sm_86": (65536, 100 << 10, 1536, 16),
    "sm_89": (65536, 100 << 10, 1536, 24),
    "sm_90a": (65536, 228 << 10, 2048, 32),
    "sm_100a": (65536, 228 << 10, 2048, 32),
    "sm_120": (65536, 100 << 10, 1536, 24),
}
SHARED_PER_BLOCK = {  # bytes
    "sm_80": 163 << 10,
    "sm_86": 99 << 10,
    "sm_89": 99 << 10,
    "sm_90a": 227 << 10,
    "sm_100a": 227 << 10,
    "sm_120": 99 << 10,
}

# Lower bound of the elements read and written per element of the result; of rope per pair of channels.
LEAST = {
    "gelu_fwd": (1, 1), "gelu_bwd": (2, 1), "bias_gelu_fwd": (1, 1), "bias_gelu_bwd": (2, 1), "geglu_fwd": (2, 1),
    "geglu_bwd": (3, 2), "cross_entropy_fwd": (1, 0), "cross_entropy_bwd": (1, 1), "add_layer_norm_fwd": (2, 2),
    "add_layer_norm_bwd": (3, 1), "add_layer_norm_bwd_rows": (2, 0), "rms_norm_fwd": (2, 2), "rms_norm_bwd": (3, 1),
    "rms_norm_bwd_rows": (2, 0), "swiglu_fwd": (2, 1), "swiglu_bwd": (3, 2), "relu_squared_fwd": (1, 1),
    "relu_squared_bwd": (2, 1), "rope_fwd": (2, 2),
}  # fmt: skip


def least(kernel: str, constants: Mapping[str, Any]) -> tuple[int, int]:
    """Return the bound of `LEAST` for a Triton kernel; `constants` has the arguments that are None."""
    reads, writes = LEAST[kernel]
    if constants.get("p_residual", 0) is None:  # then there is no sum
        return reads - 1, writes - 1
    return reads - (constants.get("p_grad_sum", 0) is None), writes


def tool(option: str, path: str) -> str:
    """Run cuobjdump, which is part of Triton, on a cubin and return its output."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def blocks(registers: int, warps: int, shared: int, arch: str) -> int:
    """Count the blocks (programs) that fit into a multiprocessor; a warp gets registers in units of 256."""
    all_registers, all_shared, threads, most = MULTIPROCESSOR[arch]
    a_warp = -(-registers * 32 // 256) * 256
    return min(
        all_registers // (a_warp * warps), all_shared // (shared + 1024), threads // (32 * warps), most
    )


def width(instruction: Instruction) -> int:
    """Return the bytes that a thread moves in a load or store."""
    widths = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}
    return next((widths[part] for part in instruction.opcode.split(".") if part in widths), 4)
