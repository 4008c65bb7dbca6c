"""Compiles the Triton kernels ahead of time, as a GPU would get them, and reads what came out. Needs no GPU.

The launchers run with a recorder in the place of the launch, so that what is compiled is what they would
launch: their tile sizes, their specialisations. Each kernel must give a cubin without spills and, on Hopper,
the attention kernels must use the warpgroup matrix instruction. Triton's interpreter and its compiler exclude
each other in one process; hence the compilation is a process of its own, this file run as a script.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")

ARCHITECTURES = (80, 90, 100)


def _compile(sweep: str) -> dict[str, dict[str, Any]]:
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, __file__, sweep], env=env, capture_output=True, text=True, check=False, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return {record["name"]: record for record in json.loads(done.stdout.splitlines()[-1])}


@pytest.fixture(scope="module")
def quick() -> dict[str, dict[str, Any]]:
    return _compile("quick")


def _check(records: dict[str, dict[str, Any]]) -> None:
    assert records
    for name, record in records.items():
        assert record["cubin"] > 0, name
        if record["exempt"] is None:
            assert record["stack"] == record["local"] == 0, f"{name} spills: {record}"


def test_kernels_compile_without_spills(quick: dict[str, dict[str, Any]]) -> None:
    _check(quick)
    kernels = {record["kernel"] for record in quick.values()}
    assert len(kernels) == 14, sorted(kernels)  # every kernel of every file


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("kernel", ["_attention_fwd", "_attention_bwd_dkv", "_attention_bwd_dq"])
def test_attention_uses_warpgroup_products_on_hopper(
    quick: dict[str, dict[str, Any]], kernel: str, head_dim: int
) -> None:
    record = quick[f"attention bf16 d{head_dim} causal sm_90 {kernel}"]
    assert record["wgmma"] > 0
    assert record["mma"] == 0  # no product fell back to the instruction of the generation before


@pytest.mark.parametrize("classes", [50304, 50257])
@pytest.mark.parametrize("kernel", ["_cross_entropy_fwd", "_cross_entropy_bwd"])
def test_cross_entropy_moves_16_bytes_at_a_time(
    quick: dict[str, dict[str, Any]], kernel: str, classes: int
) -> None:
    """Also where the rows have an odd length and start at odd addresses."""
    record = quick[f"cross_entropy bf16 V{classes} sm_90 {kernel}"]
    assert record["wide_loads"] > 0
    if kernel == "_cross_entropy_bwd":
        assert record["wide_stores"] > 0


@pytest.mark.slow
def test_sweep_compiles_without_spills() -> None:
    _check(_compile("sweep"))


# What follows runs in the process of its own.

Case = tuple[str, Callable[[], None]]


def _cases(sweep: bool) -> list[Case]:
    import torch

    from fastgpt.kernels import add_layer_norm, attention, cross_entropy, gelu

    def run_attention(
        dtype: torch.dtype,
        head_dim: int,
        *,
        dv: int | None = None,
        kv_heads: int = 2,
        left: int = -1,
        right: int = 0,
        softcap: float = 0.0,
        dropout: float = 0.0,
        mask: torch.dtype | None = None,
        alibi: bool = False,
    ) -> None:
        length, heads = 256, 2
        q = torch.empty(1, length, heads, head_dim, dtype=dtype).transpose(1, 2)
        k = torch.empty(1, length, kv_heads, head_dim, dtype=dtype).transpose(1, 2)
        v = torch.empty(1, length, kv_heads, dv or head_dim, dtype=dtype).transpose(1, 2)
        attn_mask = (
            None if mask is None else torch.zeros(length, length, dtype=mask).expand(1, heads, length, length)
        )
        slopes = torch.ones(heads) if alibi else None
        seed = torch.zeros(1, dtype=torch.int64) if dropout else None
        options = (attn_mask, slopes, seed, head_dim**-0.5, True, left, right, softcap, dropout)
        out, lse = attention.attention_fwd(q, k, v, *options)
        attention.attention_bwd(out, None, q, k, v, out, lse, *options, False)

    def run_cross_entropy(
        dtype: torch.dtype, classes: int, smoothing: float = 0.0, softcap: float = 0.0
    ) -> None:
        logits, target = torch.empty(4, classes, dtype=dtype), torch.zeros(4, dtype=torch.int64)
        weight = torch.ones(classes) if smoothing else None
        options = (weight, -100, smoothing, 0.0, softcap)
        loss, lse = cross_entropy.cross_entropy_fwd(logits, target, *options)
        cross_entropy.cross_entropy_bwd(loss, None, logits, target, lse, *options)

    def run_gelu(dtype: torch.dtype, tanh: bool) -> None:
        x, bias = torch.empty(256, 3072, dtype=dtype), torch.empty(3072, dtype=dtype)
        gelu.gelu_fwd(x, tanh)
        gelu.gelu_bwd(x, x, tanh)
        gelu.bias_gelu_fwd(x, bias, tanh)
        gelu.bias_gelu_bwd(x, x, bias, tanh)
        gelu.geglu_fwd(x, x, tanh)
        gelu.geglu_bwd(x, x, x, tanh)

    def run_layer_norm(dtype: torch.dtype, size: int) -> None:
        x, weight = torch.empty(64, size, dtype=dtype), torch.empty(size)
        normed, total, mean, rstd = add_layer_norm.add_layer_norm_fwd(x, x, weight, weight, 1e-5)
        add_layer_norm.add_layer_norm_bwd(normed, normed, total, weight, mean, rstd)

    bf16, fp16, fp32 = torch.bfloat16, torch.float16, torch.float32
    everything = {"left": 256, "softcap": 30.0, "dropout": 0.1, "mask": fp32, "alibi": True, "kv_heads": 1}
    if not sweep:
        return [
            ("attention bf16 d64 causal", lambda: run_attention(bf16, 64)),
            ("attention bf16 d128 causal", lambda: run_attention(bf16, 128)),
            (
                "attention bf16 d64 dropout mask",
                lambda: run_attention(bf16, 64, dropout=0.1, mask=torch.bool),
            ),
            ("cross_entropy bf16 V50304", lambda: run_cross_entropy(bf16, 50304)),
            ("cross_entropy bf16 V50257", lambda: run_cross_entropy(bf16, 50257)),
            ("gelu bf16 erf", lambda: run_gelu(bf16, False)),
            ("gelu bf16 tanh", lambda: run_gelu(bf16, True)),
            ("add_layer_norm bf16 D768", lambda: run_layer_norm(bf16, 768)),
        ]
    return [
        *(
            (f"attention bf16 d{d} everything", lambda d=d: run_attention(bf16, d, **everything))
            for d in (64, 128, 256)
        ),
        *(
            (f"attention fp16 d{d} full", lambda d=d: run_attention(fp16, d, right=-1))
            for d in (64, 96, 128, 256)
        ),
        *((f"attention fp32 d{d} causal", lambda d=d: run_attention(fp32, d)) for d in (64, 128, 256)),
        ("attention bf16 d128 dv64 window", lambda: run_attention(bf16, 128, dv=64, left=128, kv_heads=1)),
        *((f"attention bf16 d{d} alibi", lambda d=d: run_attention(bf16, d, alibi=True)) for d in (64, 128)),
        ("cross_entropy fp32 V50257 all", lambda: run_cross_entropy(fp32, 50257, 0.1, 30.0)),
        ("cross_entropy bf16 V50304 all", lambda: run_cross_entropy(bf16, 50304, 0.1, 30.0)),
        ("gelu fp32 erf", lambda: run_gelu(fp32, False)),
        *(
            (f"add_layer_norm bf16 D{n}", lambda n=n: run_layer_norm(bf16, n))
            for n in (64, 1600, 4096, 16384)
        ),
        ("add_layer_norm fp32 D768", lambda: run_layer_norm(fp32, 768)),
    ]


def _exempt(name: str, resources: dict[str, int]) -> str | None:
    """Why a spill is accepted, or None."""
    if resources["registers"] == 128 and resources["stack"] <= 8:
        return "one register that ptxas gives up by itself, so that two programs fit into a multiprocessor"
    if "fp32 d128" in name or "fp32 d256" in name:
        return "IEEE fp32 has no tensor core: whole operands stand in registers; a path for correctness"
    if "everything" in name:
        return "all options at once: a tile that has room for that is too small for each of them alone"
    if "add_layer_norm bf16 D16384" in name:
        return "a row of 16384 and its two sums are 96 registers a thread"
    return None


def _source(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The source and the options that Triton would compile for a launch with these arguments.

    As its launch does: 1 and None become constants, and what is divisible by 16 is said to be.
    """
    import torch
    from triton.compiler import ASTSource
    from triton.runtime.jit import mangle_type

    options = {k: kwargs[k] for k in ("num_warps", "num_stages") if k in kwargs}
    values = dict(zip((p.name for p in fn.params), args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, p in enumerate(fn.params):
        value = values[p.name]
        is_one = type(value) is int and value == 1 and not p.do_not_specialize
        if p.is_constexpr or value is None or is_one:
            signature[p.name] = "constexpr"
            constants[p.name] = value
            continue
        signature[p.name] = mangle_type(value)
        number = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(number, int) and number % 16 == 0 and not p.do_not_specialize:
            attributes[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(fn, signature, constants, attributes), options


def _resources(cubin: bytes) -> dict[str, int]:
    import triton

    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        done = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        )
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    assert found, done.stdout
    return dict(zip(("registers", "stack", "static_shared", "local"), map(int, found.groups()), strict=True))


def _main(sweep: bool) -> list[dict[str, Any]]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from fastgpt.kernels import attention_tiles

    launches: list[tuple[Any, ...]] = []
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append((self, args, kwargs))
    records: dict[str, dict[str, Any]] = {}
    for case, run in _cases(sweep):
        for arch in ARCHITECTURES:
            # Only attention's tiles go by the device; the rest is compiled for one.
            if not case.startswith("attention") and arch != 90:
                continue
            attention_tiles.capability = lambda _, arch=arch: divmod(arch, 10)
            launches.clear()
            run()
            for fn, args, kwargs in launches:
                source, options = _source(fn, args, kwargs)
                kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
                ptx = kernel.asm["ptx"]
                name = f"{case} sm_{arch} {fn.__name__}"
                resources = _resources(kernel.asm["cubin"])
                records[name] = {
                    "name": name,
                    "kernel": fn.__name__,
                    "cubin": len(kernel.asm["cubin"]),
                    "shared": kernel.metadata.shared,
                    "wgmma": ptx.count("wgmma.mma_async"),
                    "mma": ptx.count("mma.sync"),
                    "wide_loads": len(re.findall(r"ld\.global[\w.:]*\.v4", ptx)),
                    "wide_stores": len(re.findall(r"st\.global[\w.:]*\.v4", ptx)),
                    "exempt": _exempt(name, resources),
                    **resources,
                }
    return list(records.values())


if __name__ == "__main__":
    print(json.dumps(_main(sys.argv[1] == "sweep")))
