"""Resources of each GPU kernel, from its machine code: `python -m bench resources`.

Every kernel is compiled ahead of time in every configuration for every architecture; no GPU is needed. The CUDA C++
kernels need nvcc (`bench.codegen.cubins`). A record has:
- registers, shared memory, stack, spills, and the number of programs that fit into a multiprocessor;
- for attention the instructions per score in the innermost loop, for a linear layer the instructions per result, and
  the bounds that they set on the share of the matrix units' peak (`bench.codegen.sass`);
- for the other kernels the bytes moved per element with their lower bound, and the bound that the instructions set on
  the share of the memory bandwidth.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import chain
from math import prod
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from bench.codegen import cubins
from bench.codegen.launches import Compiled, Configuration, compiled, configurations
from bench.codegen.occupancy import LEAST, blocks, least, tool, width
from bench.codegen.sass import ARCHITECTURES, Instruction, instructions, loops, profile, streaming
from bench.harness.machine import ROOT
from bench.harness.records import save

PATH = ROOT / "bench" / "results" / "resources.json"

# Matrix products over D and over DV for one tile of scores.
PRODUCTS = {
    "attention_fwd": (1, 1),
    "attention_bwd": (3, 2),
    "attention_bwd without dq": (2, 2),
    "attention_bwd_dq": (2, 1),
}


def resources(
    chosen: Iterable[Configuration], architectures: Iterable[str] = ARCHITECTURES
) -> Iterator[list[dict[str, Any]]]:
    """Yield the records of each configuration and architecture in order of completion; one process runs per core."""
    jobs = [(c.op, c.name, arch) for c in chosen for arch in architectures]
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        for done in as_completed([pool.submit(_records, *job) for job in jobs]):
            yield done.result()


def _records(op: str, name: str, arch: str) -> list[dict[str, Any]]:
    configuration = next(c for c in configurations() if (c.op, c.name) == (op, name))
    return [_record(configuration, kernel, arch) for kernel in compiled(configuration, arch)]


def _record(configuration: Configuration, kernel: Compiled, arch: str) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.cubin)
        file.flush()
        usage = tool("--dump-resource-usage", file.name)
        code = instructions(tool("--dump-sass", file.name))
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found, usage
    registers, stack = map(int, found.groups())
    tiles = {k: v for k, v in kernel.constants.items() if k.startswith("BLOCK") and v is not None}
    sizes = " ".join(f"{k}={v}" for k, v in tiles.items())
    body = _streamed(code) if kernel.kernel in LEAST else []
    record: dict[str, Any] = {
        "kernel": kernel.kernel,
        "op": configuration.op,
        "direction": "fwd" if kernel.kernel.endswith("_fwd") else "bwd",
        "source": "triton",
        "config": f"{configuration.name}; {sizes}; {kernel.warps} warps, {kernel.stages} stages",
        "arch": arch,
        "registers": registers,
        "spills": sum(i.opcode.startswith(("LDL", "STL")) for i in code),
        "stack": stack,
        "shared": kernel.shared,
        "blocks_per_sm": blocks(registers, kernel.warps, kernel.shared, arch),
        "hgmma": sum(i.opcode.startswith("HGMMA") for i in code),
        "utchmma": sum(i.opcode.startswith("UTCHMMA") for i in code),
        "hmma": sum(i.opcode.startswith("HMMA") for i in code),
        "wide_loads": sum(i.opcode.startswith("LDG") and ".128" in i.opcode for i in code),
        "wide_stores": sum(i.opcode.startswith("STG") and ".128" in i.opcode for i in code),
        "loop": _streaming(kernel, body, arch) if body else _loop(kernel, code, arch),
        "bytes_per_element": _moved(kernel, body) if body else None,
    }
    return record | {"exempt": _exempt(record)}


def _loop(kernel: Compiled, code: list[Instruction], arch: str) -> dict[str, float] | None:
    """Profile attention's innermost loop without masks, per score.

    It is the loop with the fewest instructions of those with an exponential per score: tcgen05 products come with
    smaller loops for preparation.
    """
    name = kernel.kernel
    if name == "linear_gelu_fwd":
        return _product(kernel, code, arch)
    if name not in PRODUCTS:
        return None
    products = PRODUCTS[name if kernel.constants.get("p_dq", 0) is not None else f"{name} without dq"]
    over_d, over_dv = products
    flops_of_element = 2 * (over_d * kernel.constants["BLOCK_D"] + over_dv * kernel.constants["BLOCK_DV"])
    found = []
    for body in loops(code, "matrix", "mufu"):
        per_warp = sum(i.flops / (4 if i.opcode.startswith("HGMMA") else 1) for i in body)
        # The opcode of a tcgen05 product does not contain the shape; an iteration is one tile.
        tile = kernel.constants["BLOCK_M"] * kernel.constants["BLOCK_N"]
        flops = per_warp * kernel.warps or tile * flops_of_element
        found.append(profile(body, kernel.warps, flops / flops_of_element, flops, arch))
    whole = (p for p in found if p["mufu"] >= 1)
    return min(whole, key=lambda p: p["fp32"] + p["int"], default=None)


def _product(kernel: Compiled, code: list[Instruction], arch: str) -> dict[str, float] | None:
    """Profile a tile of a product, per result: the loop as often as K requires, and the other code once."""
    found = loops(code, "matrix")
    if not found:
        return None
    body, size, inner = found[0], kernel.constants, kernel.numbers["K"]
    inside = {i.address for i in body}
    once = [i for i in code if i.address not in inside]
    tile = size["BLOCK_M"] * size["BLOCK_N"]
    steps = -(-inner // size["BLOCK_K"])
    return profile(body * steps + once, kernel.warps, tile, 2.0 * tile * inner, arch)


def _streamed(code: list[Instruction]) -> list[Instruction]:
    """Return the loop over rows without masks, the one with the fewest instructions; without a loop, all code."""
    found = [b for b in loops(code, "memory") if any(i.opcode.startswith("LDG") for i in b)]
    return min(found, key=len, default=code)


def _streaming(kernel: Compiled, body: list[Instruction], arch: str) -> dict[str, float]:
    """Profile a memory-bound kernel per element; the part of a tile beyond the end of a row does not count."""
    elements = prod(v for k, v in kernel.constants.items() if k.startswith("BLOCK"))
    width, row = kernel.constants.get("BLOCK_D", 0), kernel.numbers.get("D", 0)
    if width >= row > 0:
        elements *= row / width
    moved = sum(least(kernel.kernel, kernel.constants)) * kernel.itemsize
    return streaming(body, kernel.warps, elements, moved, arch)


def _moved(kernel: Compiled, body: list[Instruction]) -> dict[str, float]:
    """Count the bytes that a kernel moves per element, with the parameters of its rows, and their lower bound."""
    moved = sum(width(i) for i in body if i.opcode.startswith(("LDG", "STG"))) * 32 * kernel.warps
    tile = prod(v for k, v in kernel.constants.items() if k.startswith("BLOCK"))
    return {
        "moved": moved / tile,
        "least": float(sum(least(kernel.kernel, kernel.constants)) * kernel.itemsize),
    }


def _exempt(record: dict[str, Any]) -> str | None:
    """Return the reason why a kernel needs no matrix instruction of its architecture; None if it needs one."""
    config, kernel = record["config"], record["kernel"]
    if not kernel.startswith("attention") or kernel.endswith(("_preprocess", "_combine_fwd")):
        return None
    if "fp32" in config:
        return "IEEE fp32 has no matrix instruction"
    if "tf32" in config:
        return "fp32 operands leave room for tiles of 32 rows, the matrix instruction of a warpgroup wants 64"
    if "decoding" in config:
        return "decoding: 16 rows are a tile of a warp's matrix instruction, and k and v are read once"
    return None


# ---- the command ----


def run(
    chosen: list[Configuration],
    files: list[Path],
    ops: Sequence[str],
    architectures: Sequence[str],
    *,
    as_json: bool,
    write: bool,
) -> int:
    """Compile kernels, print the table or the records, and return 0.

    Args:
        chosen: configurations of the Triton kernels.
        files: files of csrc/cuda.
        ops: ops whose kernels in these files are selected; all if empty.
        as_json: print the records instead of the table.
        write: save the records; the saved records of a source ("triton", "cuda") without a selection are kept.
    """
    from tqdm import tqdm

    records: list[dict[str, Any]] = []
    with tqdm(total=(len(chosen) + len(files)) * len(architectures), unit="config", disable=None) as bar:
        for found in chain(resources(chosen, architectures), cubins.records(files, architectures, ops)):
            records += found
            bar.update()
    records = in_order(records)
    if write:
        new = {"triton": bool(chosen), "cuda": bool(files)}
        kept = [r for r in json.loads(PATH.read_text()) if not new[r["source"]]] if PATH.exists() else []
        save(PATH, in_order([*kept, *records]))
    print(json.dumps(records, indent=1) if as_json else table(records))
    return 0


def in_order(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort records independently of the order of compilation: Triton kernels first, then CUDA C++ kernels."""
    order = {(c.op, c.name): n for n, c in enumerate(configurations())}

    def place(r: dict[str, Any]) -> tuple[Any, ...]:
        if r["source"] == "cuda":
            return (1, r["kernel"], r["config"], r["arch"])
        return (0, order[r["op"], r["config"].split(";")[0]], r["arch"], r["kernel"])

    return sorted(records, key=place)


def table(records: list[dict[str, Any]]) -> str:
    """Format records as text, one line per record."""
    head = f"{'kernel':<22}{'config':<78}{'arch':<9}{'regs':>5}{'spills':>7}{'shared':>8}{'a SM':>5}"
    lines = [head + "  inner loop, per element"]
    for r in records:
        loop, moved = r["loop"], r["bytes_per_element"]
        said = ""
        if loop:
            said = f"mufu {loop['mufu']:.2f} fp32 {loop['fp32']:.2f} int {loop['int']:.2f}"
        if moved:
            said += (
                f" of {loop['issue']:.1f}; {moved['moved']:g} bytes, at least {moved['least']:g};"
                f" at most {loop['bandwidth']:.0%} of the bandwidth"
            )
        elif loop:
            said += f"; at most {loop['overlapped']:.0%} of peak overlapped, {loop['serial']:.0%} serial"
        lines.append(
            f"{r['kernel']:<22}{r['config']:<78}{r['arch']:<9}{r['registers']:>5}{r['spills']:>7}{r['shared']:>8}"
            f"{r['blocks_per_sm']:>5}  {said}" + (f"  exempt: {r['exempt']}" if r["exempt"] else "")
        )
    return "\n".join(lines)
