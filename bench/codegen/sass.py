"""Speed bounds from a kernel's machine code (SASS): the instructions of its innermost loops, by pipe.

Rates are results per cycle and multiprocessor; an instruction of a warp gives 32 results. The rates of "mufu", "fp32"
and "int" are from the table "Throughput of Native Arithmetic Instructions" in NVIDIA's CUDA C++ Programming Guide,
columns 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0. mufu is the row for reciprocal, base-2 logarithm and exponential. fp32 is the
row for 32-bit add, multiply and multiply-add; FADD2, FMUL2 and FFMA2 count twice. int is the row for 32-bit compare,
minimum and maximum; add and logic are not slower on any architecture. Each of the four schedulers issues one
instruction of a warp per cycle. The rates of matrix units and memory are the datasheets' dense bfloat16 FLOP/s and
bytes/s, divided by multiprocessors and boost clock: A100 80 GB 312e12 and 2.04e12 / 108 / 1.41 GHz; H100 989e12 and
4.8e12 (H200, the faster memory) / 132 / 1.83 GHz; B200 2250e12 and 8e12 / 148 / 1.85 GHz; RTX 3090 (sm_86) 71.2e12 and
936e9 / 82 / 1.695 GHz; RTX 4090 (sm_89) 165.2e12 and 1008e9 / 128 / 2.52 GHz; RTX 5090 (sm_120) 209.5e12 and 1792e9 /
170 / 2.407 GHz.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
MATRIX_FLOPS = {  # per cycle and multiprocessor
    "sm_80": 2048, "sm_86": 512, "sm_89": 512, "sm_90a": 4096, "sm_100a": 8192, "sm_120": 512,
}  # fmt: skip
BYTES = {  # per cycle and multiprocessor, read and written
    "sm_80": 13.4, "sm_86": 6.7, "sm_89": 3.1, "sm_90a": 19.9, "sm_100a": 29.2, "sm_120": 4.4,
}  # fmt: skip
ISSUED = 128  # thread instructions per cycle and multiprocessor
RATES = {
    "sm_80": {"mufu": 16, "fp32": 64, "int": 64},
    "sm_86": {"mufu": 16, "fp32": 128, "int": 64},
    "sm_89": {"mufu": 16, "fp32": 128, "int": 64},
    "sm_90a": {"mufu": 16, "fp32": 128, "int": 64},
    "sm_100a": {"mufu": 16, "fp32": 128, "int": 64},
    "sm_120": {"mufu": 16, "fp32": 128, "int": 64},
}

# The pipe of an opcode is the first one with a matching prefix. Selections and conversions of floats count as fp32.
# "other" has no rate: moves, shuffles, barriers, branches, and instructions of the uniform datapath, which runs once
# per warp in parallel with the other pipes (U..., R2UR, VOTEU).
PIPES = {
    "matrix": ("HGMMA", "HMMA", "UTCHMMA"),
    "mufu": ("MUFU",),
    "fp32": ("FADD", "FMUL", "FFMA", "FMNMX", "FSEL", "FSET", "F2FP", "HADD2", "HMUL2", "HFMA2", "HMNMX2"),
    "memory": ("LD", "ST", "RED", "ATOM", "UTMA", "UBLK"),
    "other": (
        "U", "VOTEU", "R2UR", "S2", "BRA", "BAR", "WARP", "SYNC", "NOP", "DEPBAR", "MOV", "SHFL", "CS2R", "FENCE", "B",
    ),
    "int": ("I", "LOP3", "LEA", "SHF", "SEL", "PRMT", "PLOP3", "P2R", "R2P", "VOTE", "SGXT", "VIADD", "VIMNMX"),
}  # fmt: skip

_LINE = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_]*(?:\.[\w.]+)?)([^;]*);")


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly: "FFMA.FTZ R1, R2, R3, R4" at an address."""

    address: int
    opcode: str
    operands: str
    predicated: bool = False

    @property
    def pipe(self) -> str:
        """The pipe that executes the instruction."""
        found = (pipe for pipe, names in PIPES.items() if self.opcode.startswith(names))
        return next(found, "other")

    @property
    def results(self) -> int:
        """Results per thread."""
        return 2 if self.opcode.startswith(("FADD2", "FMUL2", "FFMA2")) else 1

    @property
    def target(self) -> int | None:
        """Target address of a branch; None for other instructions."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def is_conditional(self) -> bool:
        """True for an instruction with a predicate; Blackwell's uniform branches have it among the operands."""
        return self.predicated or bool(re.match(r"!?UP\d", self.operands) and self.opcode.startswith("BRA"))

    @property
    def flops(self) -> int:
        """Operations of a matrix instruction of a warp (HMMA) or of four warps (HGMMA); 0 for other instructions."""
        shape = re.search(r"^HGMMA\.(\d+)x(\d+)x(\d+)", self.opcode)
        if shape:
            m, n, k = map(int, shape.groups())
            return 2 * m * n * k
        digits = re.search(r"^HMMA\.(16)(8)(\d+)", self.opcode)
        return 2 * int(digits[1]) * int(digits[2]) * int(digits[3]) if digits else 0


def instructions(disassembly: str) -> list[Instruction]:
    """Parse the output of `cuobjdump --dump-sass` for one kernel."""
    return [
        Instruction(int(address, 16), opcode, operands.strip(), bool(predicate))
        for address, predicate, opcode, operands in _LINE.findall(disassembly)
    ]


def loops(code: list[Instruction], *having: str) -> list[list[Instruction]]:
    """Find the innermost natural loops with instructions of all pipes `having`, in the order of the code.

    A backward jump alone is not a loop: blocks at the end of the code wait for memory and jump back.
    """
    blocks, successors = basic_blocks(code)
    dominators = _dominators(successors)
    found = []
    for head in range(len(blocks)):
        tails = [b for b in range(len(blocks)) if head in successors[b] and head in dominators[b]]
        body = _natural_loop(head, tails, successors)
        if tails and {i.pipe for b in body for i in blocks[b]}.issuperset(having):
            found.append(body)
    inner = [body for body in found if not any(other < body for other in found)]
    return [[i for b in sorted(body) for i in blocks[b]] for body in inner]


def basic_blocks(code: list[Instruction]) -> tuple[list[list[Instruction]], list[list[int]]]:
    """Split code into basic blocks.

    Returns:
        The blocks, and for each block the numbers of its successors.
    """
    targets = {i.address: i.target for i in code if i.target is not None}
    starts = {code[0].address, *targets.values()} if code else set()
    starts |= {b.address for a, b in itertools.pairwise(code) if a.address in targets or a.opcode == "EXIT"}
    blocks: list[list[Instruction]] = []
    for instruction in code:
        if instruction.address in starts:
            blocks.append([])
        blocks[-1].append(instruction)
    number = {block[0].address: n for n, block in enumerate(blocks)}
    successors = []
    for n, block in enumerate(blocks):
        last = block[-1]
        follow = {number[last.target]} if last.target in number else set()
        falls_through = last.is_conditional or (last.target is None and last.opcode != "EXIT")
        if falls_through and n + 1 < len(blocks):
            follow.add(n + 1)
        successors.append(sorted(follow))
    return blocks, successors


def _dominators(successors: list[list[int]]) -> list[set[int]]:
    """Compute the dominators of each block; an unreachable block has all blocks as dominators."""
    everything = set(range(len(successors)))
    found = [everything if n else {0} for n in range(len(successors))]
    before: list[list[int]] = [[] for _ in successors]
    for n, follow in enumerate(successors):
        for m in follow:
            before[m].append(n)
    changed = True
    while changed:
        changed = False
        for n in range(1, len(successors)):
            new = {n} | set.intersection(*(found[m] for m in before[n])) if before[n] else everything
            changed |= new != found[n]
            found[n] = new
    return found


def _natural_loop(head: int, tails: list[int], successors: list[list[int]]) -> set[int]:
    """Collect the blocks of a natural loop: those that reach a tail without passing the head."""
    body, waiting = {head}, list(tails)
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting += [b for b, follow in enumerate(successors) if block in follow]
    return body


def _each(body: list[Instruction], warps: int, elements: float) -> dict[str, float]:
    """Count the results of each pipe per element."""
    count: Counter[str] = Counter()
    for i in body:
        count[i.pipe] += i.results
    return {pipe: count[pipe] * 32 * warps / elements for pipe in PIPES}


def profile(
    body: list[Instruction], warps: int, elements: float, flops: float, arch: str
) -> dict[str, float]:
    """Count the instructions per element by pipe, and bound the share of the matrix units' peak.

    Args:
        warps: warps that execute the loop.
        elements: results of an iteration of the loop, of all warps together.
        flops: operations of the matrix products of an iteration.

    Returns:
        "matrix", "mufu", "fp32", "int", "memory" and "other": thread instructions per element. "overlapped": share of
        the peak if only the slowest pipe counts. "serial": share of the peak if the pipes never overlap.
    """
    each = _each(body, warps, elements)
    cycles = {pipe: each[pipe] * elements / rate for pipe, rate in RATES[arch].items()}
    matrix = flops / MATRIX_FLOPS[arch]
    bounds = {
        "overlapped": matrix / max(matrix, *cycles.values()),
        "serial": matrix / (matrix + sum(cycles.values())),
    }
    return {key: round(value, 4) for key, value in (each | bounds).items()}


def streaming(
    body: list[Instruction], warps: int, elements: float, moved: float, arch: str
) -> dict[str, float]:
    """Count the instructions per element by pipe, and bound the share of the memory bandwidth.

    Args:
        warps: warps that execute the loop.
        elements: elements of an iteration of the loop, of all warps together.
        moved: lower bound of the bytes moved per element.

    Returns:
        The pipes as in `profile`. "issue": all instructions. "bandwidth": share of the datasheet's bandwidth, at most
        1, if only the slower of the busiest pipe and the schedulers counts.
    """
    each = _each(body, warps, elements)
    issue = len(body) * 32 * warps / elements
    cycles = max(issue / ISSUED, *(each[pipe] / rate for pipe, rate in RATES[arch].items()))
    bounds = {"issue": issue, "bandwidth": min(moved / BYTES[arch] / cycles, 1.0)}
    return {key: round(value, 4) for key, value in (each | bounds).items()}
