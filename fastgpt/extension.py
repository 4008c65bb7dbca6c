"""Loads the compiled ops: `fastgpt._C` (build info), the library for this CPU, and that of the CUDA kernels.

The kernels in csrc/cpu are compiled several times, each time for another instruction set, into a
library of its own; exactly one of them is loaded, so that code for one CPU can never leak into
another. PyTorch's own ATEN_CPU_CAPABILITY (default, avx2, avx512) caps the choice, as it does
for PyTorch's kernels.

The kernels in csrc/cuda are one library, `_cuda.so`, for several architectures of GPUs and for any PyTorch from
2.11 on. It is loaded where a GPU is that it has kernels for; a GPU without is refused by name, before any launch.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
from pathlib import Path
from typing import Any

import torch

REBUILD_HINT = (
    "pip install --no-build-isolation -e . (in the checkout), or reinstall fastgpt with --no-build-isolation"
)

# From the most to the least demanding; csrc/bindings.cpp knows what each one needs.
VARIANTS = ("avx512_bf16", "avx512", "avx2", "plain")

_CAPS = {"default": ("plain",), "avx2": ("avx2", "plain")}


@functools.cache
def _load() -> tuple[str | None, str]:
    """(variant, "") once a library is loaded, else (None, the reason and what mends it)."""
    try:
        import fastgpt._C as _C
    except ImportError as error:
        return None, f"the compiled extension is missing ({error}); build it with: {REBUILD_HINT}"
    built = str(_C.build_info()["torch"])
    if built != torch.__version__:
        return None, (
            f"the compiled extension was built for torch {built} and this is torch {torch.__version__}; "
            f"rebuild it with: {REBUILD_HINT}"
        )
    allowed = _CAPS.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), VARIANTS)
    usable = set(_C.cpu_variants())
    problem = "no library for this CPU was built"
    for variant in VARIANTS:
        library = Path(__file__).parent / f"_cpu_{variant}.so"
        if variant not in allowed or variant not in usable or not library.exists():
            continue
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            problem = f"{library.name} does not load ({error})"
            continue
        return variant, ""
    return None, f"{problem}; rebuild with: {REBUILD_HINT}"


def loaded() -> bool:
    """Return whether the C++ ops are registered."""
    return _load()[0] is not None


def variant() -> str | None:
    """The instruction-set variant in use ("plain", "avx2", "avx512", "avx512_bf16"), or None."""
    return _load()[0]


def problem() -> str:
    """Return why the C++ ops are missing, with the command that repairs it; empty if they are registered."""
    return _load()[1]


# ---- CUDA ----

CUDA_LIBRARY = Path(__file__).parent / "_cuda.so"


def cuda_architectures() -> tuple[str, ...]:
    """Read the architectures of the CUDA kernels without loading them: "sm_80" for code, "compute_90" for PTX."""
    if not CUDA_LIBRARY.exists():
        return ()
    found = re.search(rb"fastgpt architectures: ([a-z0-9_ ]*);", CUDA_LIBRARY.read_bytes())
    return tuple(found[1].decode().split()) if found else ()


def cuda_toolkit() -> tuple[int, int] | None:
    """The version of CUDA that the kernels were compiled with, which their library says beside the architectures."""
    if not CUDA_LIBRARY.exists():
        return None
    found = re.search(
        rb"fastgpt architectures: [a-z0-9_ ]*; toolkit: (\d+)\.(\d+);", CUDA_LIBRARY.read_bytes()
    )
    return (int(found[1]), int(found[2])) if found else None


def _driver_problem(capability: tuple[int, int], architectures: tuple[str, ...]) -> str:
    """Return why the driver cannot run the kernels on such a GPU, or an empty string.

    A driver serves every toolkit of its major version, and compiles the PTX of toolkits that are no newer.
    """
    toolkit = cuda_toolkit()
    if toolkit is None:
        return ""
    number = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]  # of builds with CUDA
    driver = (number // 1000, number % 1000 // 10)
    compiled = tuple(name for name in architectures if name.startswith("sm_"))
    from_ptx = not has_kernels_for(capability, compiled)
    if driver >= toolkit or (driver[0] == toolkit[0] and not from_ptx):
        return ""
    versions = [".".join(map(str, version)) for version in (toolkit, driver)]
    ptx = ", as PTX for this GPU," if from_ptx else ""
    return (
        f"the CUDA kernels are compiled{ptx} with CUDA {versions[0]} and the driver is for CUDA {versions[1]}; "
        f"update the driver, or rebuild with a toolkit of the driver's version: {REBUILD_HINT}"
    )


def cublaslt_problem() -> str:
    """Return why GELU is not computed in the epilogues of cuBLASLt's products, or an empty string."""
    if b"cublasLtMatmulAlgoGetHeuristic" not in CUDA_LIBRARY.read_bytes():
        return "compiled without cublasLt.h"
    major = (cuda_toolkit() or (0,))[0]
    name = f"libcublasLt.so.{major}"
    try:
        ctypes.CDLL(name, mode=os.RTLD_NOLOAD)
    except OSError:
        return f"{name} is not loaded, and torch {torch.__version__} is for CUDA {torch.version.cuda}"
    return ""


def has_kernels_for(capability: tuple[int, int], architectures: tuple[str, ...]) -> bool:
    """Return whether a GPU of this compute capability runs code for one of these architectures.

    Code for X.Y (sm_XY) runs on X.Z with Z >= Y, PTX (compute_XY) on whatever is no older. What is marked "a" runs
    on exactly that GPU, what is marked "f" on its family, for which X.Z with Z >= Y is taken.
    """
    for name in architectures:
        kind, _, number = name.partition("_")
        mark = number[-1] if number[-1] in "af" else ""
        major, minor = divmod(int(number.rstrip("af")), 10)
        same_major = capability[0] == major and capability[1] >= minor
        if mark == "a":
            fits = capability == (major, minor)
        else:
            fits = capability >= (major, minor) if kind == "compute" and not mark else same_major
        if fits:
            return True
    return False


@functools.cache
def _cuda_problem_of_machine() -> str:
    """Return why no GPU of this machine can have CUDA kernels, or an empty string."""
    if not CUDA_LIBRARY.exists():
        return f"the CUDA kernels are not built; with nvcc and a PyTorch with CUDA, build them with: {REBUILD_HINT}"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA; install one with it (https://pytorch.org), "
            f"then: {REBUILD_HINT}"
        )
    if not torch.cuda.is_available():
        return "no CUDA GPU is visible (see nvidia-smi and CUDA_VISIBLE_DEVICES)"
    return ""


@functools.cache
def _load_cuda() -> str:
    """Loads the library, once; why it does not load, or nothing."""
    try:
        torch.ops.load_library(str(CUDA_LIBRARY))
    except OSError as error:
        return f"{CUDA_LIBRARY.name} does not load ({error}); rebuild with: {REBUILD_HINT}"
    return ""


@functools.cache
def cuda_problem(device: int | None = None) -> str:
    """Return why the CUDA ops are missing, and the repair; empty if they are registered.

    Args:
        device: the GPU's number; without one, any GPU that they run on will do.
    """
    if problem := _cuda_problem_of_machine():
        return problem
    devices = range(torch.cuda.device_count()) if device is None else [device]
    built = cuda_architectures()
    unfit = ""
    for i in devices:
        capability = torch.cuda.get_device_capability(i)
        if has_kernels_for(capability, built):
            return _driver_problem(capability, built) or _load_cuda()
        unfit = unfit or f"{torch.cuda.get_device_name(i)} is sm_{capability[0]}{capability[1]}"
    mend = "rebuild with TORCH_CUDA_ARCH_LIST naming it (8.0 and later): "
    return (
        f"{unfit} and the CUDA kernels are compiled for {', '.join(built) or 'nothing'}; {mend}{REBUILD_HINT}"
    )


def cuda_loaded(device: int | None = None) -> bool:
    """Return whether the CUDA ops are registered, with kernels for the GPU of this number (default: for any GPU)."""
    return not cuda_problem(device)


def build_info() -> dict[str, Any]:
    """Return how the extension was built (torch, compiler, variants, CUDA architectures); empty if it is missing."""
    try:
        import fastgpt._C as _C
    except ImportError:
        return {}
    return dict(_C.build_info())
