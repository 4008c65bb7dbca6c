"""Compiles the CUDA C++ kernels as a GPU would get them and reads the machine code. Needs nvcc, and no GPU.

`bench.codegen.cubins` does the work; what it found of every kernel stands in bench/results/resources.json.
"""

import functools
import json
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")  # whose cuobjdump reads the machine code

from bench.__main__ import main
from bench.codegen import cubins
from bench.codegen.occupancy import SHARED_PER_BLOCK
from bench.codegen.resources import PATH
from bench.codegen.sass import ARCHITECTURES, Instruction
from fastgpt.ops.attention import FLOAT32_BYTES

BOUNDS = {"overlapped", "serial", "bandwidth"}
needs_nvcc = pytest.mark.skipif(bool(cubins.problem()), reason=cubins.problem())
FILES = cubins.sources()
QUICK = [path for path in FILES if path.stem == "gelu"]


def key(record):
    return record["kernel"], record["config"], record["arch"]


@functools.cache
def committed():
    return {key(record): record for record in json.loads(PATH.read_text()) if record["source"] == "cuda"}


def check_against_committed(records):
    assert records
    for record in records:
        known = committed().get(key(record))
        assert known, f"{key(record)} is not in {PATH.name}: python -m bench resources --source cuda --write"
        assert record["spills"] == record["stack"] == 0, f"{key(record)} spills"
        for bound in BOUNDS & set(known["loop"] or ()):
            assert record["loop"][bound] >= known["loop"][bound], f"{key(record)}: {bound} bound fell"
        for count in ("wide_loads", "wide_stores"):
            assert bool(record[count]) == bool(known[count]), f"{key(record)}: {count} changed"


@needs_nvcc
@pytest.mark.parametrize("source", QUICK, ids=lambda path: path.stem)
def test_kernels_keep_their_bounds_and_do_not_spill(source):
    check_against_committed(
        [cubins.record(kernel, "sm_90a") for kernel in cubins.compile_source(source, "sm_90a")]
    )


@needs_nvcc
@pytest.mark.slow
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_keeps_its_bounds_and_does_not_spill(architecture):
    records = [record for found in cubins.records(FILES, [architecture]) for record in found]
    check_against_committed(records)
    assert {key(record) for record in records} == {k for k in committed() if k[-1] == architecture}


@needs_nvcc
@pytest.mark.slow
def test_epilogues_compile_against_the_real_cublaslt(tmp_path):
    """Whose header a plain machine lacks; the package that has it is of 420 MB."""
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path]
    done = subprocess.run([*download, "nvidia-cublas==13.*"], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"nvidia-cublas cannot be had: {done.stderr.strip().splitlines()[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path, [name for name in files.namelist() if "/include/" in name])
    (header,) = tmp_path.rglob("cublasLt.h")
    compiled = tmp_path / "compiled.o"
    include = Path(torch.__file__).parent / "include"
    command = [cubins._nvcc(), "-c", *cubins._flags(), "-arch=sm_90a", f"-I{cubins.SOURCES}", f"-I{include}"]
    for op in ("linear_gelu", "mlp"):
        for more in ([], [f"-Xcompiler=-idirafter,{header.parent}"]):
            source = cubins.SOURCES / f"{op}.cu"
            done = subprocess.run(
                [*command, *more, "-o", compiled, source], capture_output=True, text=True, check=False
            )
            assert done.returncode == 0, done.stderr
            assert (b"cublasLtMatmulAlgoGetHeuristic" in compiled.read_bytes()) == bool(more)


@needs_nvcc
@pytest.mark.slow
def test_sources_compile_against_the_oldest_pytorch(tmp_path):
    """Of which setup.py's TORCH_TARGET_VERSION promises the stable ABI; its wheel holds the headers."""
    oldest = re.search(r'"torch>=([\d.]+)"', (cubins.ROOT / "pyproject.toml").read_text())[1]
    download = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", tmp_path]
    cpu = ["--index-url", "https://download.pytorch.org/whl/cpu"]
    tries = [
        subprocess.run([*download, *index, f"torch=={oldest}.0"], capture_output=True, text=True, check=False)
        for index in (cpu, [])
        if not any(tmp_path.glob("*.whl"))
    ]
    if tries[-1].returncode:
        pytest.skip(f"torch {oldest} cannot be had: {tries[-1].stderr.strip().splitlines()[-1]}")
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        files.extractall(tmp_path, [name for name in files.namelist() if name.startswith("torch/include/")])
    command = [cubins._nvcc(), "-c", *cubins._flags(), "-arch=sm_90a", f"-I{cubins.SOURCES}"]
    for op in ("linear_gelu", "gelu"):
        done = subprocess.run(
            [*command, f"-I{tmp_path}/torch/include", "-o", tmp_path / "x.o", cubins.SOURCES / f"{op}.cu"],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr


def test_committed_file_has_every_kernel_for_every_architecture():
    kernels = {name for source in FILES for name in cubins.parameters(source)}
    assert {(kernel, arch) for kernel, _, arch in committed()} == {
        (k, a) for k in kernels for a in ARCHITECTURES
    }


def test_committed_kernels_neither_spill_nor_have_a_stack():
    for record in committed().values():
        assert record["spills"] == record["stack"] == 0, key(record)
        assert record["blocks_per_sm"] >= 1, key(record)


def is_fallback(record):
    """For what does not begin at multiples of 16 bytes, by the template's parameter; two kernels take what comes."""
    return "wide" not in record["config"] and record["kernel"] not in (
        "cross_entropy_fwd",
        "cross_entropy_with_grad",
    )


def test_attention_has_a_tile_for_every_gpu():
    """Both directions, each type and head_dim; but for float32 of 256 columns in 99 KiB, which the op refuses."""
    found = {(r["kernel"], *r["config"].split()[:2], r["arch"]) for r in committed().values()}
    for arch in ARCHITECTURES:
        for dtype in ("bf16", "fp16", "fp32"):
            for head in (64, 128, 256):
                kernels = {kernel for kernel, *what in found if what == [dtype, f"HEAD={head}", arch]}
                refused = (dtype, head) == ("fp32", 256) and SHARED_PER_BLOCK[arch] < FLOAT32_BYTES
                assert kernels == {"attention_fwd"} | (set() if refused else {"attention_bwd"})


def test_memory_bound_kernels_move_16_bytes_at_a_time():
    checked = set()
    for record in committed().values():
        if is_fallback(record) or record["kernel"].startswith("attention"):
            continue
        checked.add(record["kernel"])
        assert record["wide_loads"] > 0, key(record)
        assert record["wide_stores"] > 0 or record["kernel"] == "cross_entropy_fwd", key(record)
    assert len(checked) == 18


def test_streaming_kernels_move_nothing_twice():
    """Options have class weights, which are read beside the logits."""
    checked = set()
    for record in committed().values():
        moved = record["bytes_per_element"]
        if moved is None or "options" in record["config"]:
            continue
        checked.add(record["kernel"])
        assert moved["moved"] == moved["least"], key(record)
    assert checked == {
        *("gelu_fwd", "gelu_bwd", "bias_gelu_fwd", "bias_gelu_bwd", "geglu_fwd", "geglu_bwd"),
        *("swiglu_fwd", "swiglu_bwd", "relu_squared_fwd", "relu_squared_bwd"),
        *("cross_entropy_fwd", "cross_entropy_bwd"),
    }


def test_arithmetic_leaves_time_for_the_memory():
    """All but options could run at nine tenths of the bandwidth of an A100 and an H200."""
    for record in committed().values():
        if record["bytes_per_element"] and "options" not in record["config"] and record["arch"] != "sm_100a":
            assert record["loop"]["bandwidth"] >= 0.85, key(record)


def test_attention_uses_the_matrix_units():
    found = [record for record in committed().values() if record["kernel"].startswith("attention")]
    products = [r for r in found if r["kernel"] in cubins.PRODUCTS]
    assert products
    for record in products:
        assert record["hmma"] + record["hgmma"] + record["utchmma"] > 0, key(record)
        assert record["loop"] is not None or "options" in record["config"], key(record)
        assert record["arch"] not in ("sm_90a", "sm_100a") or record["exempt"], key(record)


def test_attention_without_masks_stays_within_its_instructions():
    """For a score, on every architecture: exponentials, fp32 arithmetic, integers (addresses and the loop's own)."""
    found = [r for r in committed().values() if r["kernel"] in cubins.PRODUCTS and r["loop"]]
    sixteen_bits = [r for r in found if not r["config"].startswith("fp32")]
    heads = {(r["kernel"], r["config"].split()[1], r["arch"]) for r in sixteen_bits}
    large = [arch for arch in ARCHITECTURES if SHARED_PER_BLOCK[arch] > 99 << 10]
    assert heads == {
        (kernel, head, arch)
        for kernel in cubins.PRODUCTS
        for head, architectures in (("HEAD=64", ARCHITECTURES), ("HEAD=128", large))
        for arch in architectures
    }
    for record in sixteen_bits:
        loop = record["loop"]
        assert loop["mufu"] <= 1.1, key(record)
        # One of them keeps large scores exact (docs/perf_log.md).
        assert loop["fp32"] <= 6, key(record)
        # Four numbers a row instead of two take the backward another address.
        assert loop["int"] <= (0.5 if record["direction"] == "fwd" else 0.55), key(record)


@needs_nvcc
@pytest.mark.slow
def test_command_prints_the_committed_records_of_an_op(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which the command takes away
    assert main(["resources", "geglu", "--source", "cuda", "--arch", "sm_90a", "--json"]) == 0
    expected = [r for r in committed().values() if (r["op"], r["arch"]) == ("geglu", "sm_90a")]
    assert json.loads(capsys.readouterr().out) == expected != []


def test_command_without_nvcc_says_so(monkeypatch, capsys):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(cubins, "_nvcc", lambda: None)
    assert main(["resources", "--source", "cuda"]) == 2
    assert "the CUDA kernels cannot be compiled: nvcc" in capsys.readouterr().err


# ---- the reading ----


def test_configuration_is_the_template_arguments_by_name():
    names = ["typename T", "int HEAD", "bool OPTIONS", "bool WIDE"]
    arguments = cubins._arguments(names, "__nv_bfloat16, (int)64, (bool)1, false")
    assert arguments == {"T": "bf16", "HEAD": 64, "OPTIONS": 1, "WIDE": 0}
    kernel = cubins.Kernel("attention_fwd", arguments, 128, 32, 0, [])
    assert (kernel.op, kernel.config, kernel.is_fallback) == ("attention", "bf16 HEAD=64 options", True)


def test_parameters_are_read_from_the_source(tmp_path):
    source = tmp_path / "x.cu"
    source.write_text(
        "template <typename T, bool WIDE>\n__global__ void __launch_bounds__(256, 2) a_fwd_kernel(const T* x) {}\n"
        "template <typename F>\nvoid launch(F f) { a_fwd_kernel<float, true>(0); }\n"
        "template <typename T>\n__global__ void\n    a_bwd_kernel(T* x) {}\n"
    )
    assert cubins.parameters(source) == {"a_fwd": ["typename T", "bool WIDE"], "a_bwd": ["typename T"]}


def test_body_of_a_kernel_without_a_loop_is_what_moves_16_bytes():
    code = [
        Instruction(0x00, "BRA", "0x40", True),
        Instruction(0x10, "LDG.E.128", "R4, [R2.64]"),
        Instruction(0x20, "STG.E.128", "[R2.64], R4"),
        Instruction(0x30, "EXIT", ""),
        Instruction(0x40, "LDG.E.U16", "R4, [R2.64]"),
        Instruction(0x50, "BRA", "0x40", True),
        Instruction(0x60, "EXIT", ""),
    ]
    assert [i.address for i in cubins.streamed(code)] == [0x10, 0x20, 0x30]


def test_flags_are_those_of_setup():
    flags = cubins._flags()
    assert "-std=c++20" in flags and any(re.match("-DTORCH_TARGET_VERSION=", flag) for flag in flags)
