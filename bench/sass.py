"""What a kernel's machine code (SASS) says of its speed: the instructions of its innermost loops, by pipe.

Rates are results a cycle and multiprocessor, from the table of arithmetic throughput in NVIDIA's CUDA C++
Programming Guide; those of the matrix units are the data sheets' dense bfloat16 FLOP/s by multiprocessors and
boost clock (A100: 312e12 / 108 / 1.41 GHz, H100: 989e12 / 132 / 1.83 GHz, B200: 2250e12 / 148 / 1.85 GHz). An
instruction of a warp is 32 results.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass

ARCHITECTURES = ("sm_80", "sm_90a", "sm_100a")
MATRIX_FLOPS = {"sm_80": 2048, "sm_90a": 4096, "sm_100a": 8192}  # a cycle and multiprocessor
RATES = {
    "sm_80": {"mufu": 16, "fp32": 64, "int": 64},
    "sm_90a": {"mufu": 16, "fp32": 128, "int": 64},
    "sm_100a": {"mufu": 16, "fp32": 128, "int": 64},
}

# The pipe of an opcode: the first whose names one begins with. Selections and conversions between floats are counted
# with the arithmetic they serve; "other" has no rate of its own: moves, shuffles, barriers and branches.
PIPES = {
    "matrix": ("HGMMA", "HMMA", "UTCHMMA"),
    "mufu": ("MUFU",),
    "fp32": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSET", "F2FP", "HADD2", "HMUL2", "HFMA2", "HMNMX2"),
    "memory": ("LD", "ST", "RED", "ATOM", "UTMA", "UBLK"),
    "other": ("U", "R2UR", "S2", "BRA", "BAR", "WARP", "SYNC", "NOP", "DEPBAR", "MOV", "SHFL", "CS2R", "FENCE", "B"),
    "int": ("I", "LOP3", "LEA", "SHF", "SEL", "PRMT", "PLOP3", "P2R", "R2P", "VOTE", "SGXT", "VIADD", "VIMNMX"),
}  # fmt: skip

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[\w.]+)?)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly: "FFMA.FTZ R1, R2, R3, R4" at an address."""

    address: int
    opcode: str
    operands: str

    @property
    def pipe(self) -> str:
        """Which unit takes it."""
        found = (pipe for pipe, names in PIPES.items() if self.opcode.startswith(names))
        return next(found, "other")

    @property
    def flops(self) -> int:
        """Of a matrix instruction, by the warp (HMMA) or the four warps (HGMMA) that it is an instruction of."""
        shape = re.search(r"^HGMMA\.(\d+)x(\d+)x(\d+)", self.opcode)
        if shape:
            m, n, k = map(int, shape.groups())
            return 2 * m * n * k
        digits = re.search(r"^HMMA\.(16)(8)(\d+)", self.opcode)
        return 2 * int(digits[1]) * int(digits[2]) * int(digits[3]) if digits else 0


def instructions(disassembly: str) -> list[Instruction]:
    """What `cuobjdump --dump-sass` prints of one kernel."""
    return [Instruction(int(a, 16), opcode, rest.strip()) for a, opcode, rest in _LINE.findall(disassembly)]


def loops(code: list[Instruction], having: str) -> list[list[Instruction]]:
    """The innermost loops that have an instruction of a pipe, in the order of the code."""
    spans = []
    for jump in code:
        target = re.search(r"0x([0-9a-f]+)", jump.operands) if jump.opcode.startswith("BRA") else None
        if target and int(target[1], 16) < jump.address:
            spans.append((int(target[1], 16), jump.address))
    spans = [s for s in spans if any(i.pipe == having for i in _within(code, s))]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [_within(code, s) for s in sorted(set(inner))]


def _within(code: list[Instruction], span: tuple[int, int]) -> list[Instruction]:
    return [i for i in code if span[0] <= i.address <= span[1]]


def profile(
    body: list[Instruction], warps: int, elements: float, flops: float, arch: str
) -> dict[str, float]:
    """Instructions a thread per element of the pipes, and the two bounds on the share of the matrix units' peak.

    Args:
        elements: that an iteration of the loop brings forth, all warps together.
        flops: of the matrix products of an iteration.

    Returns:
        matrix, mufu, fp32, int, memory, other: instructions of 32 results, times 32, per element; and "overlapped", the
        share of peak if the slowest pipe alone counted, "serial", if all pipes waited for each other.
    """
    count = Counter(i.pipe for i in body)
    each = {pipe: count[pipe] * 32 * warps / elements for pipe in (*PIPES,)}
    cycles = {pipe: each[pipe] * elements / rate for pipe, rate in RATES[arch].items()}
    matrix = flops / MATRIX_FLOPS[arch]
    bounds = {
        "overlapped": matrix / max(matrix, *cycles.values()),
        "serial": matrix / (matrix + sum(cycles.values())),
    }
    return {key: round(value, 4) for key, value in (each | bounds).items()}
