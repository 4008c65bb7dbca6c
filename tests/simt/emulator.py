"""The CUDA kernels on the CPU: csrc/cuda compiled by the host's compiler against the emulator in this folder.

For tests alone. Inside `running()` the backend "cuda" takes CPU tensors, whose ops are then those of the emulator; what
it finds wrong with a kernel is a RuntimeError that begins with "simt:".
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import functools
import platform
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
    *(
        "-std=c++20",
        "-O2",
        "-g0",
        "-fPIC",
        "-fvisibility=hidden",
        "-x",
        "c++",
        "-Wno-unknown-pragmas",
        "-ffp-contract=off",
    ),
    # A register array has bounds too; what is outside of one ends the process, with a sentence.
    *("-fsanitize=bounds", "-fno-sanitize-recover=bounds"),
    *("-DTORCH_TARGET_VERSION=0x020b000000000000", f"-I{FOLDER}", f"-isystem{TORCH}/include"),
)


def problem() -> str:
    """Why kernels cannot be emulated here, or nothing."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return "the emulator switches stacks in x86-64 assembly"
    if shutil.which("g++") is None:
        return "the emulator is compiled with g++, which is not installed"
    return ""


def build(folder: Path, sources: list[Path]) -> Path:
    """Compiles what has changed; returns the library.

    Raises:
        RuntimeError: the compiler refuses a source; its words are in the message.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # of several test processes one builds
        return _build(folder, sources)


def _build(folder: Path, sources: list[Path]) -> Path:
    flags = " ".join(FLAGS)
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
    """All of csrc/cuda, compiled at the first call of a process and registered for CPU tensors."""
    path = build(ROOT / "build" / "simt", [FOLDER / "emulator.cpp", *sorted(SOURCES.glob("*.cu"))])
    torch.ops.load_library(path)
    return ctypes.CDLL(str(path))


def seed(number: int) -> None:
    """Of the order in which warps run in the next launches."""
    library().simt_seed(ctypes.c_uint64(number % 2**64))


def launches() -> int:
    """How many kernels have run in this process."""
    library().simt_launches.restype = ctypes.c_uint64
    return int(library().simt_launches())


@contextlib.contextmanager
def running() -> Iterator[None]:
    """The backend "cuda" serves CPU tensors."""
    library()
    real = backends._cached_machine_refusal

    def refusal(backend: str, device: str, number: int | None) -> str | None:
        return None if (backend, device) == ("cuda", "cpu") else real(backend, device, number)

    with mock.patch.object(backends, "_cached_machine_refusal", refusal):
        yield
