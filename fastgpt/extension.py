"""Loads the compiled ops: `fastgpt._C` (build info), the library for this CPU, and that of the CUDA kernels.

The kernels in csrc/cpu are compiled several times, each time for another instruction set, into a
library of its own; exactly one of them is loaded, so that code for one CPU can never leak into
another. PyTorch's own ATEN_CPU_CAPABILITY (default, avx2, avx512) caps the choice, as it does
for PyTorch's kernels. The kernels in csrc/cuda are one library, `_cuda.so`, for several architectures of GPUs. It is
loaded where a GPU is that it has kernels for; a GPU without is refused by name, before any launch.

All libraries are for any PyTorch from 2.11 on, by its stable ABI. A file that is not whole or of another build is
refused by name: the system's loader would end the process.
"""

from __future__ import annotations

import ctypes
import functools
import os
import re
import struct
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

from fastgpt.build_tools import rebuild_hint

# From the most to the least demanding; csrc/bindings.cpp knows what each one needs.
VARIANTS = ("amx", "avx512_bf16", "avx512", "avx2", "plain")

_CAPS = {"default": ("plain",), "avx2": ("avx2", "plain")}

OLDEST_TORCH = (2, 11)


def _torch_problem() -> str:
    """Return why this PyTorch cannot run the kernels, or an empty string."""
    if tuple(map(int, re.findall(r"\d+", torch.__version__)[:2])) >= OLDEST_TORCH:
        return ""
    oldest = ".".join(map(str, OLDEST_TORCH))
    return (
        f"the compiled kernels are for torch {oldest} and later and this is torch {torch.__version__}; "
        f"update it: pip install --upgrade 'torch>={oldest}'"
    )


def _file_problem(library: Path) -> str:
    """Return why a library of ELF's 64-bit kind is not whole, or an empty string."""
    if sys.platform != "linux":
        return ""
    size = library.stat().st_size
    with library.open("rb") as file:
        header = file.read(64)
        if header[:5] != b"\x7fELF\2":
            return "it is no 64-bit ELF library"
        if len(header) < 64:
            return "it is not whole"
        programs, sections = struct.unpack_from("<QQ", header, 32)
        program_size, program_count, section_size, section_count = struct.unpack_from("<4H", header, 54)
        ends = [sections + section_size * section_count, programs + program_size * program_count]
        file.seek(programs)
        for _ in range(program_count):
            program = file.read(program_size)
            if len(program) == program_size:  # or the end of all of them is beyond the file's
                offset, in_file = struct.unpack_from("<Q16xQ", program, 8)
                ends.append(offset + in_file)
    return "" if max(ends) <= size else f"it is not whole: {size} of at least {max(ends)} bytes"


def _library_problem(library: Path, version: str) -> str:
    """Return why a file is no library of CPU kernels of this version, or an empty string."""
    if problem := _file_problem(library):
        return problem
    found = re.search(rb"fastgpt kernels: \w+; version: ([^;]+);", library.read_bytes())
    if not found:
        return "it is of another program or of an older fastgpt"
    return "" if found[1].decode() == version else f"it is of fastgpt {found[1].decode()}, not {version}"


@functools.cache
def _load() -> tuple[str | None, str]:
    """(variant, "") once a library is loaded, else (None, the reason and what mends it)."""
    if problem := _torch_problem():
        return None, problem
    folder = Path(__file__).parent
    module = folder / "_C.so"
    if module.exists() and (problem := _file_problem(module)):
        return None, f"{module.name} is refused ({problem}); rebuild with: {rebuild_hint()}"
    try:
        import fastgpt._C as _C
    except ImportError as error:
        return None, f"the compiled extension is missing ({error}); build it with: {rebuild_hint()}"
    version = str(_C.build_info().get("version", "an unknown version"))
    allowed = _CAPS.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), VARIANTS)
    usable = set(_C.cpu_variants())
    problems = []
    for variant in VARIANTS:
        library = folder / f"_cpu_{variant}.so"
        if variant not in allowed or variant not in usable or not library.exists():
            continue
        if problem := _library_problem(library, version):
            problems.append(f"{library.name} is refused ({problem})")
            continue
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            problems.append(f"{library.name} does not load ({error})")
            continue
        if problems:
            warnings.warn(
                f"fastgpt: {'; '.join(problems)}; {library.name} serves instead; rebuild with: {rebuild_hint()}",
                RuntimeWarning,
                stacklevel=2,
            )
        return variant, ""
    found = "; ".join(problems) or "no library for this CPU was built"
    return None, f"{found}; rebuild with: {rebuild_hint()}"


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
        f"update the driver, or rebuild with a toolkit of the driver's version: {rebuild_hint()}"
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
        return f"the CUDA kernels are not built; with nvcc and a PyTorch with CUDA, build them with: {rebuild_hint()}"
    if torch.version.cuda is None:
        return (
            f"torch {torch.__version__} is a build without CUDA; install one with it (https://pytorch.org), "
            f"then: {rebuild_hint()}"
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
        return f"{CUDA_LIBRARY.name} does not load ({error}); rebuild with: {rebuild_hint()}"
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
    return f"{unfit} and the CUDA kernels are compiled for {', '.join(built) or 'nothing'}; {mend}{rebuild_hint()}"


def cuda_loaded(device: int | None = None) -> bool:
    """Return whether the CUDA ops are registered, with kernels for the GPU of this number (default: for any GPU)."""
    return not cuda_problem(device)


def build_info() -> dict[str, Any]:
    """Return how the extension was built (version, torch, compiler, variants, CUDA architectures); empty without it."""
    _load()  # which refuses a file that is not whole
    try:
        import fastgpt._C as _C
    except ImportError:
        return {}
    return dict(_C.build_info())
