"""The CUDA kernels on the CPU: csrc/cuda, compiled by g++ against the emulator in this folder. Only for tests.

Inside `running()` the backend "cuda" accepts CPU tensors and runs their ops in the emulator. A fault in a kernel raises
a RuntimeError that begins with "simt:".
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import fcntl
import functools
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from fastgpt import backends

ROOT = Path(__file__).parent.parent.parent
FOLDER = Path(__file__).parent
SOURCES = ROOT / "csrc" / "cuda"
TORCH = Path(torch.__file__).parent
FLAGS = (
    *("-std=c++20", "-O2", "-g0", "-fPIC", "-fvisibility=hidden", "-x", "c++", "-Wno-unknown-pragmas"),
    # Checks the bounds of register arrays. An access outside ends the process with a message.
    *("-fsanitize=bounds", "-fno-sanitize-recover=bounds"),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{FOLDER}", f"-isystem{TORCH}/include"),
)
EXACT = ("-ffp-contract=off",)
# Contracts multiplications and additions, as nvcc does, and approximates exponentials and reciprocal roots, as GPUs do.
INEXACT = ("-mfma", "-ffp-contract=fast", "-DSIMT_INEXACT")


@dataclasses.dataclass(frozen=True)
class Profile:
    """A GPU to emulate: KiB of shared memory per block, clusters, arithmetic."""

    shared: int
    clusters: bool
    flags: tuple[str, ...] = EXACT


PROFILES = {
    "h100": Profile(227, True),
    "a100": Profile(163, False),
    "rtx4090": Profile(99, False),
    "rtx5090": Profile(99, True),
    "inexact": Profile(227, True, INEXACT),
}
_chosen = ["h100"]  # the profile


def problem() -> str:
    """Return why kernels cannot be emulated on this machine, or an empty string."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulator switches stacks in x86-64 assembly"
    if shutil.which("g++") is None:
        return "the emulator is compiled with g++, which is not installed"
    return ""


def profile() -> Profile:
    """Return the emulated GPU."""
    return PROFILES[_chosen[0]]


def choose(profile: str) -> None:
    """Emulate this GPU of `PROFILES` from now on. Other arithmetic must be chosen before the library is loaded."""
    assert PROFILES[profile].flags == PROFILES[_chosen[0]].flags or not library.cache_info().currsize
    _chosen[0] = profile


def build(folder: Path, sources: list[Path], flags: tuple[str, ...] = EXACT) -> Path:
    """Compile the sources that have changed and return the path of the library.

    Raises:
        RuntimeError: A source does not compile. The message has the output of the compiler.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # only one test process builds at a time
        return _build(folder, sources, flags)


def _with_checked_bounds(folder: Path, source: Path) -> Path:
    """Copy a source and its headers, and make their kernels check their launch bounds."""
    copies = folder / "sources"
    for path in (
        source,
        *source.parent.glob("*.cuh"),
        *source.parent.glob("*.h"),
        *source.parent.parent.glob("*.h"),
    ):
        copy = copies / path.relative_to(source.parent.parent)
        text = re.sub(
            r"__launch_bounds__\(([^()]*)\)(\s+\w+\([^{]*\{)",
            r"\2 ::simt::Machine::get().check_launch_bounds(\1);",
            path.read_text(),
        )
        text = f'#line 1 "{path}"\n{text}'
        if not copy.exists() or copy.read_text() != text:
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(text)
    return copies / source.relative_to(source.parent.parent)


def _build(folder: Path, sources: list[Path], more: tuple[str, ...]) -> Path:
    sources = [_with_checked_bounds(folder, source) for source in sources]
    flags = " ".join((*FLAGS, *more))
    lines = [
        "rule compile",
        f"  command = g++ {flags} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "rule link",
        f"  command = g++ -shared -fsanitize=bounds -o $out $in -L{TORCH}/lib -ltorch_cpu -lc10",
    ]
    objects = [f"{source.stem}.o" for source in sources]
    lines += [f"build {o}: compile {source}" for o, source in zip(objects, sources, strict=True)]
    lines.append(f"build simt.so: link {' '.join(objects)}")
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")
    done = subprocess.run(
        [sys.executable, "-m", "ninja", "-C", str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)
    return folder / "simt.so"


@functools.cache
def library() -> ctypes.CDLL:
    """Return the library of all csrc/cuda sources, registered for CPU tensors. The first call compiles it."""
    flags = PROFILES[_chosen[0]].flags
    folder = ROOT / "build" / ("simt" if flags == EXACT else "simt-inexact")
    path = build(folder, [FOLDER / "emulator.cpp", *sorted(SOURCES.glob("*.cu"))], flags)
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


def seed(number: int) -> None:
    """Set the seed of the order in which warps run."""
    library().simt_seed(ctypes.c_uint64(number % 2**64))


def launches() -> int:
    """Return the number of kernel launches in this process."""
    library().simt_launches.restype = ctypes.c_uint64
    return int(library().simt_launches())


@contextlib.contextmanager
def running(profile: str | None = None) -> Iterator[Profile]:
    """Let the backend "cuda" accept CPU tensors. Emulates a GPU of `PROFILES`, by default the chosen one."""
    before = _chosen[0]
    choose(profile or before)
    gpu = PROFILES[_chosen[0]]
    library().simt_device(ctypes.c_int(gpu.shared << 10), ctypes.c_bool(gpu.clusters))
    real = backends._cached_machine_refusal

    def refusal(backend: str, device: str, number: int | None) -> str | None:
        return None if (backend, device) == ("cuda", "cpu") else real(backend, device, number)

    try:
        with (
            mock.patch.object(backends, "_cached_machine_refusal", refusal),
            mock.patch.object(backends, "_cached_shared_memory", lambda *_: gpu.shared << 10),
        ):
            yield gpu
    finally:
        choose(before)
