"""What a kernel's machine code (SASS) says of its speed: the instructions of its innermost loops, by pipe.

Rates are results a cycle and multiprocessor; an instruction of a warp is 32 results. Those of "mufu", "fp32" and
"int" are from the table "Throughput of Native Arithmetic Instructions" in NVIDIA's CUDA C++ Programming Guide,
columns 8.0, 8.6, 8.9, 9.0, 10.0 and 12.0: mufu its row for reciprocal, base-2 logarithm and exponential; fp32 that
for 32-bit add, multiply and multiply-add, of which FADD2, FMUL2 and FFMA2 are two; int that for 32-bit compare,
minimum and maximum (add and logic are no slower anywhere). Four schedulers issue an instruction of a warp a cycle
each. Matrix units and memory are the data sheets' dense bfloat16 FLOP/s and bytes/s by multiprocessors and boost
clock: A100 80 GB 312e12 and 2.04e12 / 108 / 1.41 GHz; H100 989e12 and (H200, the faster memory) 4.8e12 / 132 / 1.83
GHz; B200 2250e12 and 8e12 / 148 / 1.85 GHz; RTX 3090 (sm_86) 71.2e12 and 936e9 / 82 / 1.695 GHz; RTX 4090 (sm_89)
165.2e12 and 1008e9 / 128 / 2.52 GHz; RTX 5090 (sm_120) 209.5e12 and 1792e9 / 170 / 2.407 GHz.
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass

ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100a", "sm_120")
MATRIX_FLOPS = {  # a cycle and multiprocessor
    "sm_80": 2048, "sm_86": 512, "sm_89": 512, "sm_90a": 4096, "sm_100a": 8192, "sm_120": 512,
}  # fmt: skip
BYTES = {  # a cycle and multiprocessor, from memory and to it
    "sm_80": 13.4, "sm_86": 6.7, "sm_89": 3.1, "sm_90a": 19.9, "sm_100a": 29.2, "sm_120": 4.4,
}  # fmt: skip
ISSUED = 128  # instructions of a thread
RATES = {
    "sm_80": {"mufu": 16, "fp32": 64, "int": 64},
    "sm_86": {"mufu": 16, "fp32": 128, "int": 64},
    "sm_89": {"mufu": 16, "fp32": 128, "int": 64},
    "sm_90a": {"mufu": 16, "fp32": 128, "int": 64},
    "sm_100a": {"mufu": 16, "fp32": 128, "int": 64},
    "sm_120": {"mufu": 16, "fp32": 128, "int": 64},
}

# The pipe of an opcode: the first whose names one begins with. Selections and conversions between floats are counted
# with the arithmetic they serve; "other" has no rate of its own: moves, shuffles, barriers, branches, and what the
# uniform datapath does once for all threads of a warp, beside the pipes that are counted (U..., R2UR, VOTEU).
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
        """Which unit takes it."""
        found = (pipe for pipe, names in PIPES.items() if self.opcode.startswith(names))
        return next(found, "other")

    @property
    def results(self) -> int:
        """Of a thread."""
        return 2 if self.opcode.startswith(("FADD2", "FMUL2", "FFMA2")) else 1

    @property
    def target(self) -> int | None:
        """Where it jumps to, if it is a branch."""
        found = re.search(r"0x([0-9a-f]+)", self.operands) if self.opcode.startswith("BRA") else None
        return int(found[1], 16) if found else None

    @property
    def is_conditional(self) -> bool:
        """Whether it may do nothing; Blackwell's uniform branches name their predicate among the operands."""
        return self.predicated or bool(re.match(r"!?UP\d", self.operands) and self.opcode.startswith("BRA"))

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
    return [
        Instruction(int(address, 16), opcode, operands.strip(), bool(predicate))
        for address, predicate, opcode, operands in _LINE.findall(disassembly)
    ]


def loops(code: list[Instruction], *having: str) -> list[list[Instruction]]:
    """The innermost natural loops that have instructions of certain pipes, in the order of the code.

    A jump backwards alone is no loop: waiting for memory is done in blocks at the end of the code that jump back.
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
    """The basic blocks, and the numbers of those that may follow each."""
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
    """For each block those that every way from the first one to it goes through; all, where there is no way."""
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
    """The blocks from which a jump to the head is reached without passing the head."""
    body, waiting = {head}, list(tails)
    while waiting:
        block = waiting.pop()
        if block not in body:
            body.add(block)
            waiting += [b for b, follow in enumerate(successors) if block in follow]
    return body


def _each(body: list[Instruction], warps: int, elements: float) -> dict[str, float]:
    """Results a thread per element of the pipes."""
    count: Counter[str] = Counter()
    for i in body:
        count[i.pipe] += i.results
    return {pipe: count[pipe] * 32 * warps / elements for pipe in PIPES}


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
    """Instructions a thread per element of the pipes, and the bound on the share of the memory's bandwidth.

    Args:
        elements: that are read or written, all warps together.
        moved: bytes of each, at least.

    Returns:
        the pipes as in `profile`; "issue": all instructions; "bandwidth": the share of the data sheet's bandwidth if
        the slower of the busiest pipe and the schedulers alone counted, at most 1.
    """
    each = _each(body, warps, elements)
    issue = len(body) * 32 * warps / elements
    cycles = max(issue / ISSUED, *(each[pipe] / rate for pipe, rate in RATES[arch].items()))
    bounds = {"issue": issue, "bandwidth": min(moved / BYTES[arch] / cycles, 1.0)}
    return {key: round(value, 4) for key, value in (each | bounds).items()}
