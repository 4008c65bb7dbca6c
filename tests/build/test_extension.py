"""The compiled libraries: one per instruction set, each right, none with instructions of another; that for CUDA."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import extension

ROOT = Path(__file__).parents[2]
PACKAGE = Path(fastgpt.__file__).parent

needs_cpp = pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are not built")

# ATEN_CPU_CAPABILITY and the variants it allows, the best first.
CAPS = {"default": ("plain",), "avx2": ("avx2", "plain"), "avx512": extension.VARIANTS}

EVERY_OP = '''
import sys
import torch, fastgpt
from tests.support import every_op
from tests.support.dropin import NAMES, check_same, example, leaf
from fastgpt import extension
from fastgpt.testing import check_error_rule
torch.set_num_threads(2)

def pytorch_can(name, *arguments, **options):
    """On CPUs with AMX, PyTorch's own attention in 16 bits fails where ATEN_CPU_CAPABILITY hides AVX-512 from it."""
    try:
        getattr(torch.nn.functional, name)(*arguments, **options)
    except RuntimeError as error:
        assert name == "scaled_dot_product_attention" and "pack_vnni2 is only supported" in str(error)
        return False
    return True

with fastgpt.use_backend("cpp"):
    for name in NAMES:
        for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            arguments, options = example(name, dtype)
            if pytorch_can(name, *arguments, **options):
                check_same(name, *arguments, **options)
    # Longer than a vector and a tile, with tails.
    check_same("gelu", leaf(7, 67))
    check_same("layer_norm", leaf(5, 131), [131], leaf(131), leaf(131))
    check_same("cross_entropy", leaf(5, 1031), torch.arange(5), reduction="none")
    check_same("linear_cross_entropy", leaf(70, 67), leaf(131, 67), torch.arange(70), reduction="none")
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = (leaf(1, 2, 131, 67, dtype=dtype) for _ in "qkv")
        if pytorch_can("scaled_dot_product_attention", q, k, v, is_causal=True):
            check_same("scaled_dot_product_attention", q, k, v, is_causal=True)
    for name in every_op.NAMES:
        for dtype in (torch.float32, torch.bfloat16):
            check_error_rule(*every_op.case(name, dtype))
loaded = {line.split("/")[-1].strip() for line in open("/proc/self/maps") if "_cpu_" in line}
print(extension.variant(), *loaded)
'''


@needs_cpp
@pytest.mark.parametrize("cap", CAPS)
def test_every_op_is_right_on_the_variant_and_no_other_is_loaded(cap):
    from fastgpt import _C

    if cap == "avx512" and "avx512" not in _C.cpu_variants():
        pytest.skip("this CPU has no AVX-512, and PyTorch does not compare ATEN_CPU_CAPABILITY with it")
    best = next(v for v in CAPS[cap] if v in _C.cpu_variants() and (PACKAGE / f"_cpu_{v}.so").exists())
    env = os.environ | {"ATEN_CPU_CAPABILITY": cap}
    done = subprocess.run(
        [sys.executable, "-c", EVERY_OP], cwd=ROOT, env=env, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [best, f"_cpu_{best}.so"]


@needs_cpp
def test_every_variant_in_the_build_is_there():
    """A variant that this CPU cannot run is built all the same."""
    named = extension.build_info()["variants"].split()
    assert set(named) <= set(extension.VARIANTS)
    assert "plain" in named
    assert {path.name for path in PACKAGE.glob("_cpu_*.so")} == {f"_cpu_{name}.so" for name in named}


# Instructions (and registers) that a CPU of the variant's kind does not have.
FORBIDDEN = {
    "plain": r"%[yz]mm\d|\bv(fmadd|cvtph2ps|add[ps]s)",
    "avx2": r"%zmm\d|%k[1-7]\b|\{z\}|vdpbf16ps|vcvtne2?ps2?bf16",
    "avx512": r"vdpbf16ps|vcvtne2?ps2?bf16",
    "avx512_bf16": r"%tmm\d",
}


@needs_cpp
@pytest.mark.parametrize("variant", FORBIDDEN)
def test_library_holds_no_instruction_of_a_better_variant(variant):
    library = PACKAGE / f"_cpu_{variant}.so"
    if shutil.which("objdump") is None:
        pytest.skip("objdump (binutils) is not installed")
    if not library.exists():
        pytest.skip(f"{library.name} is not part of this build")
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert code.count("\n") > 1000
    found = [line for line in code.splitlines() if re.search(FORBIDDEN[variant], line)]
    assert not found, f"{len(found)} lines, such as {found[0]}"


@needs_cpp
@pytest.mark.parametrize(
    ("variant", "own"),
    [("avx2", r"%ymm\d"), ("avx512", r"%zmm\d"), ("avx512_bf16", r"vdpbf16ps"), ("amx", r"%tmm\d")],
)
def test_library_does_use_its_own_instructions(variant, own):
    """Or the variants would all be the plain one, and the test above would pass for nothing."""
    library = PACKAGE / f"_cpu_{variant}.so"
    if shutil.which("objdump") is None or not library.exists():
        pytest.skip(f"objdump is not installed, or {library.name} is not part of this build")
    code = subprocess.run(["objdump", "-d", library], capture_output=True, text=True, check=True).stdout
    assert re.search(own, code)


def test_nothing_is_compiled_for_the_build_machine_or_with_fast_math():
    sources = [ROOT / "setup.py", *(p for p in (ROOT / "csrc").rglob("*") if p.is_file())]
    assert len(sources) > 5
    flag = re.compile(r"-(march=native|mtune=native|ffast-math|Ofast|funsafe-math)|--use_fast_math|native")
    for path in sources:
        comment = "#" if path.suffix == ".py" else "//"
        code = [line.partition(comment)[0] for line in path.read_text().splitlines()]
        if path.suffix == ".py":
            code = [line for line in code if line.startswith(" ") or "=" in line]  # not the docstring's prose
        assert not [line for line in code if flag.search(line)], path


# ---- the CUDA library ----


@pytest.mark.parametrize(
    ("capability", "architectures", "fits"),
    [
        ((8, 0), "sm_80", True),
        ((8, 6), "sm_80", True),
        ((8, 0), "sm_86", False),
        ((7, 5), "sm_80 sm_90a sm_100a compute_90", False),
        ((9, 0), "sm_80 sm_100a", False),
        ((9, 0), "sm_90a", True),
        ((10, 0), "sm_90a", False),
        ((10, 0), "sm_100a", True),
        ((10, 3), "sm_100a", False),
        ((10, 3), "sm_100f", True),
        ((12, 0), "sm_100f compute_100f", False),
        ((12, 0), "sm_80 sm_90a sm_100a compute_90", True),
        ((10, 3), "compute_90", True),
        ((8, 6), "compute_90", False),
        ((12, 0), "compute_90a", False),
        ((9, 0), "", False),
    ],
)
def test_which_gpu_runs_what(capability, architectures, fits):
    assert extension.has_kernels_for(capability, tuple(architectures.split())) is fits


@pytest.fixture
def gpus(monkeypatch, tmp_path):
    """Sets up a machine with GPUs of these compute capabilities and a library compiled for sm_80 and sm_90a."""

    def clear():
        for function in (extension._cuda_problem_of_machine, extension._load_cuda, extension.cuda_problem):
            function.cache_clear()

    def machine(*capabilities, cuda="13.0", built="sm_80 sm_90a; toolkit: 13.0;", driver=13000):
        library = tmp_path / "_cuda.so"
        library.write_bytes(b"\x7fELF...fastgpt architectures: " + built.encode() + b"\0...")
        monkeypatch.setattr(torch._C, "_cuda_getDriverVersion", lambda: driver, raising=False)
        monkeypatch.setattr(extension, "CUDA_LIBRARY", library)
        monkeypatch.setattr(torch.version, "cuda", cuda)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(capabilities))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(capabilities))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: capabilities[i])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: f"NVIDIA X{i}")
        loaded = []
        monkeypatch.setattr(torch.ops, "load_library", loaded.append)
        clear()
        return loaded

    yield machine
    monkeypatch.undo()
    clear()


def test_library_is_loaded_once_for_the_gpus_it_has_kernels_for(gpus):
    loaded = gpus((7, 5), (8, 6), (9, 0))
    assert loaded == []
    assert extension.cuda_loaded() and extension.cuda_problem() == ""
    assert extension.cuda_loaded(1) and extension.cuda_loaded(2)
    assert len(loaded) == 1
    assert not extension.cuda_loaded(0)
    assert extension.cuda_problem(0).startswith(
        "NVIDIA X0 is sm_75 and the CUDA kernels are compiled for sm_80, sm_90a; rebuild with TORCH_CUDA_ARCH_LIST"
    )


def test_unsupported_gpu_is_refused_by_name_and_nothing_is_loaded(gpus):
    loaded = gpus((12, 0))
    assert (
        "NVIDIA X0 is sm_120 and the CUDA kernels are compiled for sm_80, sm_90a" in extension.cuda_problem()
    )
    assert "--no-build-isolation" in extension.cuda_problem()
    assert loaded == []


@pytest.mark.parametrize(
    ("capability", "driver", "said"),
    [
        ((9, 0), 13000, ""),
        ((9, 0), 13010, ""),
        ((12, 0), 13020, ""),
        (
            (9, 0),
            12080,
            "compiled with CUDA 13.1 and the driver is for CUDA 12.8; update the driver, or rebuild",
        ),
        (
            (12, 0),
            13000,
            "compiled, as PTX for this GPU, with CUDA 13.1 and the driver is for CUDA 13.0; update the",
        ),
    ],
)
def test_driver_older_than_the_toolkit_is_refused_where_it_cannot_serve(gpus, capability, driver, said):
    loaded = gpus(capability, built="sm_80 sm_90a compute_90; toolkit: 13.1;", driver=driver)
    assert said in extension.cuda_problem()
    assert bool(loaded) is not bool(said) and extension.cuda_loaded() is not bool(said)


def test_library_without_a_toolkit_is_taken_as_it_is(gpus):
    gpus((9, 0), built="sm_80 sm_90a;", driver=11000)
    assert extension.cuda_toolkit() is None and extension.cuda_problem() == ""


def test_info_says_whether_epilogues_of_cublaslt_serve(gpus, monkeypatch):
    from fastgpt import env_report as info

    gpus()
    assert "cublasLt      compiled without cublasLt.h" in info.report()
    with extension.CUDA_LIBRARY.open("ab") as file:
        file.write(b"cublasLtMatmulAlgoGetHeuristic")
    assert "cublasLt      libcublasLt.so.13 is not loaded, and torch" in info.report()
    monkeypatch.setattr(extension.ctypes, "CDLL", lambda name, mode: None)
    assert "cublasLt      GELU in the epilogues of products" in info.report()


def test_without_a_gpu_the_reason_says_so(gpus):
    loaded = gpus()
    assert extension.cuda_problem().startswith("no CUDA GPU is visible")
    assert loaded == []


def test_under_a_pytorch_without_cuda_the_reason_says_so(gpus):
    gpus((9, 0), cuda=None)
    assert f"torch {torch.__version__} is a build without CUDA" in extension.cuda_problem()


def test_without_the_library_the_reason_says_how_to_build_it(gpus, monkeypatch, tmp_path):
    gpus((9, 0))
    monkeypatch.setattr(extension, "CUDA_LIBRARY", tmp_path / "none.so")
    assert extension.cuda_architectures() == ()
    assert extension.cuda_problem().startswith("the CUDA kernels are not built; with nvcc")
    assert "--no-build-isolation" in extension.cuda_problem()


def test_library_that_does_not_load_is_a_reason_not_an_error(gpus, monkeypatch):
    def fails(path):
        raise OSError("undefined symbol: aoti_torch_of_tomorrow")

    gpus((9, 0))
    monkeypatch.setattr(torch.ops, "load_library", fails)
    assert "_cuda.so does not load (undefined symbol: aoti_torch_of_tomorrow)" in extension.cuda_problem()


def test_availability_and_info_say_what_is_wrong_with_cuda():
    from fastgpt import env_report as info

    available = fastgpt.available_backends("gelu")["cuda"]
    assert (bool(available), available.reason) == (extension.cuda_loaded(), extension.cuda_problem())
    report = info.report()
    assert ", ".join(extension.cuda_architectures()) in report
    reason = available.reason if torch.cuda.is_available() else "it is for GPUs, and none is visible"
    assert available or f"no cuda: {reason}" in report


def test_info_begins_with_whether_the_kernels_are_ready(monkeypatch):
    from fastgpt import env_report as info

    monkeypatch.setattr(info, "_devices", lambda: [torch.device("cpu")])
    assert info.report().startswith(f"ready: cpp ({extension.variant()}) on cpu\n\nfastgpt ")
    monkeypatch.setattr(info, "kernels_off", lambda device: "for a test")
    assert info.report().startswith("NOT READY: for a test\n\n")
