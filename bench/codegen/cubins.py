"""Resources of the CUDA C++ kernels: compilation of csrc/cuda with nvcc, with the flags of setup.py, and analysis.

New sources and kernels need no registration. The configuration of a kernel is its template arguments by name; the
number of its threads is that of its launch bounds. The tables below have the facts that the machine code does not
contain.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.codegen.occupancy import LEAST, SHARED_PER_BLOCK, blocks, tool, width
from bench.codegen.sass import (
    ARCHITECTURES,
    Instruction,
    basic_blocks,
    instructions,
    loops,
    profile,
    streaming,
)
from bench.harness.machine import ROOT

SOURCES = ROOT / "csrc" / "cuda"
TYPES = {"float": "fp32", "__nv_bfloat16": "bf16", "__half": "fp16"}
ITEMSIZE = {"fp32": 4, "bf16": 2, "fp16": 2}

Arguments = dict[str, int | str]

# Matrix products of ROWS × COLUMNS × HEAD for one tile of scores.
PRODUCTS = {"attention_fwd": 2, "attention_bwd": 5}


def _of_attention_bwd(a: Arguments) -> int:
    rows, columns, stages = int(a["ROWS"]), int(a["COLUMNS"]), 1 if a["COLUMNS"] == 32 else 2
    scores = 2 * rows * (columns * _itemsize(a) + 16)
    return 2 * (columns + stages * rows) * int(a["HEAD"]) * _itemsize(a) + scores


# Bytes of shared memory of a block, by template arguments, for kernels whose occupancy it limits. The launchers of
# attention choose a tile that fits the GPU: a GPU without room for a tile has no record of its kernel.
SHARED: dict[str, Callable[[Arguments], int]] = {
    "attention_fwd": lambda a: (int(a["ROWS"]) + 4 * int(a["COLUMNS"])) * int(a["HEAD"]) * _itemsize(a),
    "attention_bwd": _of_attention_bwd,
}


@dataclass(frozen=True)
class Kernel:
    """One compiled instance of a kernel template.

    Attributes:
        name: name without namespace and "_kernel".
        arguments: template arguments by name: a type such as "bf16", a number, or 0 and 1 for a bool.
        threads: maximum number of threads of a block.
        registers, stack: registers and bytes of stack of a thread.
        code: the machine code.
    """

    name: str
    arguments: Arguments
    threads: int
    registers: int
    stack: int
    code: list[Instruction]

    @property
    def op(self) -> str:
        """The op of the kernel: "gelu" for "gelu_fwd"."""
        return re.sub(r"_(fwd|bwd|with_grad)(_\w+)?$", "", self.name)

    @property
    def config(self) -> str:
        """The template arguments, such as "bf16 HEAD=64 options": types, numbers and true flags."""
        said = [str(v) for v in self.arguments.values() if v in ITEMSIZE]
        said += [f"{k}={v}" for k, v in self.arguments.items() if isinstance(v, int) and k not in _FLAGS]
        said += [k.lower() for k, v in self.arguments.items() if k in _FLAGS and v]
        return " ".join(said)

    @property
    def is_fallback(self) -> bool:
        """True for the variant for tensors without alignment to 16 bytes."""
        return self.arguments.get("WIDE") == 0


_FLAGS: set[str] = set()  # template parameters of type bool


def problem() -> str:
    """Return the reason why nothing can be compiled here, or an empty string."""
    missing = [name for name, path in (("nvcc", _nvcc()), ("c++filt", shutil.which("c++filt"))) if not path]
    return f"{' and '.join(missing)} not found" if missing else ""


def _nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def sources(ops: Iterable[str] = ()) -> list[Path]:
    """List the files with the kernels of these ops; all files without ops."""
    found = sorted(SOURCES.glob("*.cu"))
    wanted = set(ops)
    return [path for path in found if not wanted or any(f"{op}_" in path.read_text() for op in wanted)]


def compile_source(source: Path, arch: str) -> list[Kernel]:
    """Compile every kernel of one file for an architecture such as "sm_90a".

    Raises:
        RuntimeError: nvcc failed; its output is in the message.
    """
    import torch

    include = Path(torch.__file__).parent / "include"
    code = f"-gencode=arch={arch.replace('sm', 'compute')},code={arch}"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernels.cubin"
        command = [
            str(_nvcc()),
            "-cubin",
            *_flags(),
            code,
            f"-I{SOURCES}",
            f"-I{include}",
            "-o",
            str(cubin),
            str(source),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{source.name} for {arch}: {(done.stdout + done.stderr)[:4000]}")
        return _read(cubin, parameters(source))


def _flags() -> list[str]:
    """Read NVCC_FLAGS from setup.py."""
    for statement in ast.parse((ROOT / "setup.py").read_text()).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "NVCC_FLAGS":
            return list(eval(compile(ast.Expression(statement.value), "setup.py", "eval")))
    raise RuntimeError("setup.py has no NVCC_FLAGS. Define the list at the top level of setup.py.")


def parameters(source: Path) -> dict[str, list[str]]:
    """Find the template parameters, such as "typename T", of each kernel in a file and in the headers next to it."""
    text = "\n".join(path.read_text() for path in (source, *sorted(source.parent.glob("*.cuh"))))
    found = re.findall(r"template <([^<>]*)>\s*__global__[^;{]*?(\w+)_kernel\(", text)
    return {name: [word.strip() for word in words.split(",")] for words, name in found}


def _read(cubin: Path, templates: dict[str, list[str]]) -> list[Kernel]:

    usage = tool("--dump-resource-usage", str(cubin))
    taken = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", usage)
    sass = dict(
        re.findall(r"Function : (\S+)\n(.*?)(?=\n\s*Function : |\Z)", tool("--dump-sass", str(cubin)), re.S)
    )
    bounds = re.findall(
        r"^\.nv\.info\.(\S+)\n(.*?)(?=^\.nv|^\.section|\Z)", tool("-elf", str(cubin)), re.S | re.M
    )
    threads = {}
    for name, attributes in bounds:
        found = re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\S+\s+Value:\s+(0x[0-9a-f]+)", attributes)
        assert found, f"{name} has no __launch_bounds__"
        threads[name] = int(found[1], 16)
    names = "\n".join(name for name, *_ in taken)
    plain = subprocess.run(
        ["c++filt"], input=names, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    kernels = []
    for (name, registers, stack), said in zip(taken, plain, strict=True):
        found = re.search(r"(\w+)_kernel(?:<(.*?)>)?\(", said)
        assert found, said
        arguments = _arguments(templates.get(found[1], []), found[2] or "")
        code = instructions(sass[name])
        kernels.append(Kernel(found[1], arguments, threads[name], int(registers), int(stack), code))
    return kernels


def _arguments(names: list[str], values: str) -> Arguments:
    found: Arguments = {}
    for parameter, value in zip(names, values.split(", ") if values else [], strict=True):
        kind, _, name = parameter.partition(" ")
        if kind == "bool":
            _FLAGS.add(name)
        plain = value.split(")")[-1]  # "(int)64"
        found[name] = TYPES.get(plain) or int({"true": 1, "false": 0}.get(plain, plain))
    return found


def _itemsize(arguments: Arguments) -> int:
    return next(ITEMSIZE[str(v)] for v in arguments.values() if v in ITEMSIZE)


# ---- records ----


def records(
    files: Iterable[Path], architectures: Iterable[str] = ARCHITECTURES, ops: Iterable[str] = ()
) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of each file and architecture in order of completion; one compiler runs per core.

    Args:
        ops: ops whose records are selected; all ops if empty.
    """
    wanted = set(ops)
    jobs = [(path, arch) for path in files for arch in architectures]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for done in as_completed([pool.submit(_records, *job) for job in jobs]):
            yield [r for r in done.result() if not wanted or r["op"] in wanted]


def _records(source: Path, arch: str) -> list[dict[str, Any]]:

    found = [record(kernel, arch) for kernel in compile_source(source, arch)]
    return [r for r in found if r["shared"] <= SHARED_PER_BLOCK[arch]]


def record(kernel: Kernel, arch: str) -> dict[str, Any]:
    """Create the record of a kernel, with the same fields as for a Triton kernel."""
    warps, code = kernel.threads // 32, kernel.code
    shared = SHARED[kernel.name](kernel.arguments) if kernel.name in SHARED else 0
    # The norms have several passes over a row in registers, so no single loop represents their cost. rope reads cos and
    # sin from the cache beside what it moves.
    least = None if kernel.op in ("add_layer_norm", "rms_norm", "rope") else LEAST.get(kernel.name)
    loop, moved = None, None
    if least and not kernel.is_fallback:
        body, itemsize = streamed(code), _itemsize(kernel.arguments)
        elements = _elements(body, least, itemsize) * 32 * warps
        if elements:
            through = sum(width(i) for i in body if i.opcode.startswith(("LDG", "STG"))) * 32 * warps
            loop = streaming(body, warps, elements, sum(least) * itemsize, arch)
            moved = {"moved": round(through / elements, 4), "least": float(sum(least) * itemsize)}
    elif (
        kernel.name in PRODUCTS and not kernel.arguments["OPTIONS"]
    ):  # with OPTIONS the loop contains the code of all options
        loop = scores(kernel, arch)
    found: dict[str, Any] = {
        "kernel": kernel.name,
        "op": kernel.op,
        "direction": "fwd" if kernel.name.endswith("_fwd") else "bwd",
        "source": "cuda",
        "config": kernel.config,
        "arch": arch,
        "registers": kernel.registers,
        "spills": sum(i.opcode.startswith(("LDL", "STL")) for i in code),
        "stack": kernel.stack,
        "shared": shared,
        "blocks_per_sm": blocks(kernel.registers, warps, shared, arch),
        "hgmma": sum(i.opcode.startswith("HGMMA") for i in code),
        "utchmma": sum(i.opcode.startswith("UTCHMMA") for i in code),
        "hmma": sum(i.opcode.startswith("HMMA") for i in code),
        "wide_loads": sum(i.opcode.startswith("LDG") and ".128" in i.opcode for i in code),
        "wide_stores": sum(i.opcode.startswith("STG") and ".128" in i.opcode for i in code),
        "loop": loop,
        "bytes_per_element": moved,
    }
    return found | {"exempt": _exempt(found)}


def _is_wide(instruction: Instruction) -> bool:
    return instruction.opcode.startswith(("LDG", "STG")) and ".128" in instruction.opcode


def streamed(code: list[Instruction]) -> list[Instruction]:
    """Return the loop with the highest share of 16-byte accesses; without a loop, the basic blocks that have some."""
    found = [body for body in loops(code, "memory") if any(map(_is_wide, body))]
    if found:
        return max(found, key=lambda body: sum(map(_is_wide, body)) / len(body))
    return [i for block in basic_blocks(code)[0] if any(map(_is_wide, block)) for i in block]


def _elements(body: list[Instruction], least: tuple[int, int], itemsize: int) -> float:
    """Count the result elements of a thread from its 16-byte writes, or from its reads if it writes nothing."""
    reads, writes = least
    opcode, each = ("STG", writes) if writes else ("LDG", reads)
    return sum(16 for i in body if _is_wide(i) and i.opcode.startswith(opcode)) / itemsize / each


def scores(kernel: Kernel, arch: str) -> dict[str, float] | None:
    """Profile attention's innermost loop without masks, the one with the fewest instructions, per score.

    A float32 product is three products of tf32, which has half the rate.
    """
    a, warps = kernel.arguments, kernel.threads // 32
    passes, slower = (3, 2) if _itemsize(a) == 4 else (1, 1)
    found = []
    for body in loops(kernel.code, "matrix", "mufu"):
        flops = sum(i.flops for i in body) * warps
        elements = flops / (2 * PRODUCTS[kernel.name] * int(a["HEAD"]) * passes)
        found.append(profile(body, warps, elements, slower * flops, arch))
    whole = (p for p in found if p["mufu"] >= 1)
    return min(whole, key=lambda p: p["fp32"] + p["int"], default=None)


def _exempt(record: dict[str, Any]) -> str | None:
    """Return the reason why a kernel does not use the matrix instruction of its architecture, or None."""
    if record["hmma"] and record["arch"] in ("sm_90a", "sm_100a"):
        return "mma.sync on every architecture: the instructions of Hopper and Blackwell are not driven yet"
    return None
