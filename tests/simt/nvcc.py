"""The kernels of sound.cu, compiled for GPUs, to compare a GPU with the emulator.

python -m tests.simt.nvcc sm_90a    compile them for a GPU machine without nvcc
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import torch

from bench.codegen import cubins
from bench.harness.machine import ROOT

FOLDER = Path(__file__).parent
LIBRARY = ROOT / "build" / "primitives" / "primitives.so"


def build(library: Path, architecture: str) -> None:
    """Compile for an architecture such as "sm_90a".

    Raises:
        RuntimeError: nvcc is missing or fails. The message has its output.
    """
    if problem := cubins.problem():
        raise RuntimeError(problem)
    library.parent.mkdir(parents=True, exist_ok=True)
    include = Path(torch.__file__).parent / "include"
    code = f"-gencode=arch={architecture.replace('sm', 'compute')},code={architecture}"
    command = [
        *(str(cubins._nvcc()), "-shared", *cubins._flags(), code, f"-I{cubins.SOURCES}", f"-I{include}"),
        *("-o", str(library), str(FOLDER / "sound.cu")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stdout + done.stderr)


def load() -> ctypes.CDLL:
    """Load the library for the GPU of this machine. Compiles it if it does not exist."""
    if not LIBRARY.exists():
        build(LIBRARY, "sm_{}{}".format(*torch.cuda.get_device_capability()))
    # The library uses functions of these two, but is not linked to them.
    for name in ("torch_cpu", "torch_cuda"):
        ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"lib{name}.so"), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(LIBRARY))


if __name__ == "__main__":
    build(LIBRARY, sys.argv[1])
