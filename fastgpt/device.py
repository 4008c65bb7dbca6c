"""Devices and dtypes by their option names; the peak FLOP/s of a device, and the peak memory of a call."""

from __future__ import annotations

import ctypes
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch

from fastgpt.malloc import is_glibc

DTYPES = ("auto", "float32", "bfloat16", "float16")
# Short names of dtypes.
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolve_device(name: str) -> torch.device:
    """Return the torch device of a name; "auto" is a GPU if there is one.

    Raises:
        ValueError: the device cannot be used.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"the device {name!r} cannot be used: the devices are auto, cpu, cuda and cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        if torch.version.cuda is None and name != "cpu":
            reason = f"torch {torch.__version__} is a build without CUDA (https://pytorch.org has others)"
        raise ValueError(f"the device {name!r} cannot be used: {reason}") from None
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the dtype of matrix products for a name; "auto" is bfloat16 if the hardware multiplies in it."""
    if name != "auto":
        return getattr(torch, name)
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return torch.bfloat16 if fast else torch.float32


def cpu_threads() -> str:
    """Describe the number of threads that PyTorch uses on the CPU."""
    count = torch.get_num_threads()
    return f"{count} thread{'s' * (count != 1)}"


@torch.no_grad()
def peak_flops(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the peak rate of matrix products, in FLOP/s: the best of eight square products.

    It is the denominator of MFU (model FLOPs utilization, Chowdhery et al. 2022, PaLM, appendix B).
    """
    n = 8192 if device.type != "cpu" else 128 if dtype == torch.float16 else 1024  # many CPUs have no float16
    # Not ones, which take a GPU less power; nor random numbers, which would change those of the run.
    a = torch.arange(n * n, device=device, dtype=torch.float32).sin().view(n, n).to(dtype)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_memory(call: Callable[[], object], device: torch.device) -> int | None:
    """Measure the peak memory of a call, in bytes beyond the memory in use before it.

    On a GPU the source is PyTorch's allocator. On Linux with glibc it is VmHWM, the peak of the resident pages of the
    process. Elsewhere the result is None.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists() or not is_glibc():
        return None
    ctypes.CDLL(None).malloc_trim(0)
    try:
        reset.write_text("5")  # resets VmHWM
        before = _status_bytes("VmRSS")
        call()
        return max(0, _status_bytes("VmHWM") - before)
    except OSError:
        return None


def _status_bytes(field: str) -> int:
    """Return a size in /proc/self/status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split(f"{field}:")[1].split()[0])
