"""The machine under measurement: what it is, how to time and weigh a call on it, and its roofs."""

from __future__ import annotations

import ctypes
import datetime
import importlib.metadata
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.gpu_clock import Call, GpuClock, Times
from fastgpt.malloc import disable_malloc_trimming

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Dense matrix products, operations a second, from NVIDIA's datasheets (without sparsity).
DATASHEET = {
    "H200": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "H100": {"bf16": 989e12, "fp16": 989e12, "fp32": 67e12},
    "A100": {"bf16": 312e12, "fp16": 312e12, "fp32": 19.5e12},
    "B200": {"bf16": 2250e12, "fp16": 2250e12, "fp32": 75e12},
}
PACKAGES = (
    "fastgpt", "torch", "triton", "transformers", "liger-kernel", "cut-cross-entropy", "quack-kernels", "flash-attn",
    "flash-attn-4",
)  # fmt: skip

ROOF_ROUNDS = 9
_MMAP_THRESHOLD = 1 << 20


class Machine:
    """A device with a clock and a scale.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_gpu = self.device.type == "cuda"
        self._gpu_clock = GpuClock(self.device) if self.is_gpu else None
        # Rows of the square product and bytes of the copy that are the roofs.
        self.roof_sizes = (8192, 1 << 30) if self.is_gpu else (2048, 1 << 28)
        self._roofs: dict[str, tuple[float, float]] = {}
        if not self.is_gpu:
            disable_malloc_trimming()

    def synchronize(self) -> None:
        """Wait until the device has done what it was given."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def time_round(
        self, calls: Sequence[Call], names: Sequence[Hashable] | None = None, *, whole: bool = False
    ) -> list[Times]:
        """Times of each (prepare, call) pair, one after the other; prepare is not timed.

        Args:
            names: of the calls, for `GpuClock.time_round`.
            whole: on a GPU, with the host's part, where users wait for it too.
        """
        if self._gpu_clock is None:  # a CPU is host and device in one
            return [_time(prepare, call) for prepare, call in calls]
        return self._gpu_clock.time_whole(calls) if whole else self._gpu_clock.time_round(calls, names)

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Memory that a call takes at its peak beyond what was held before it; None where nobody says.

        On a GPU PyTorch's allocator says. On Linux the kernel does (VmHWM), for which the heap gives large
        blocks back while this runs; the result is in whole pages of resident memory, whoever asked for it.
        """
        if self.is_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call()
            torch.cuda.synchronize()
            return torch.cuda.max_memory_allocated() - before
        if not Path("/proc/self/clear_refs").exists() or platform.libc_ver()[0] != "glibc":
            return None
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, _MMAP_THRESHOLD)  # M_MMAP_THRESHOLD
        libc.malloc_trim(0)
        try:
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
            before = _status_bytes("VmRSS")
            call()
            return max(0, _status_bytes("VmHWM") - before)
        except OSError:
            return None
        finally:
            disable_malloc_trimming()

    def cache_bytes(self) -> int:
        """The size of the last cache before memory; 32 MiB where it is not known."""
        if self.is_gpu:
            return int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        size = re.fullmatch(r"(\d+)([KM])", path.read_text().strip()) if path.exists() else None
        return int(size[1]) * {"K": 1 << 10, "M": 1 << 20}[size[2]] if size else 32 << 20

    def roofs(self, dtype: str) -> tuple[float, float]:
        """(bytes a second of a copy, read and written; operations a second of a square matrix product).

        The best of several calls, measured once for each dtype and kept.
        """
        if dtype not in self._roofs:
            self._roofs[dtype] = self._measure_roofs(dtype)
        return self._roofs[dtype]

    @torch.no_grad()
    def _measure_roofs(self, dtype: str) -> tuple[float, float]:
        n, size = self.roof_sizes
        a, b = (torch.randn(n, n, device=self.device).to(DTYPES[dtype]) for _ in range(2))
        product = torch.empty_like(a)
        source = torch.ones(size, dtype=torch.int8, device=self.device)
        target = torch.zeros_like(source)
        calls = [(_nothing, lambda: torch.mm(a, b, out=product)), (_nothing, lambda: target.copy_(source))]
        self.time_round(calls)
        rounds = [self.time_round(calls) for _ in range(ROOF_ROUNDS)]
        gemm, copy = (min(t.seconds for t in times) for times in zip(*rounds, strict=True))
        return 2 * size / copy, 2 * n**3 / gemm

    def facts(self, *, command: str, rehearsal: bool = False, commit: str | None = None) -> dict[str, Any]:
        """What the first record of a result says of the machine, the software and the commit."""
        found_commit, dirty = _commit()
        return {
            "device": self.name(),
            "torch": torch.__version__,
            "triton": _version("triton"),
            "commit": found_commit or commit,
            "dirty": dirty,
            "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "command": command,
            "python": platform.python_version(),
            "threads": torch.get_num_threads(),
            "heap": "PyTorch's caching allocator" if self.is_gpu else _heap(),
            "driver": _nvidia_smi("driver_version") if self.is_gpu else None,
            "cuda": torch.version.cuda if self.is_gpu else None,
            "cudnn": str(torch.backends.cudnn.version()) if self.is_gpu else None,
            "clocks": self._clocks(),
            "packages": {package: _version(package) for package in PACKAGES},
            "rehearsal": rehearsal,
            "datasheet_flops": self.datasheet_flops(),
        }

    def datasheet_flops(self) -> dict[str, float] | None:
        """Operations a second by dtype that the vendor states; None for a device that is not in the table."""
        return next((rates for key, rates in DATASHEET.items() if key in self.name()), None)

    def name(self) -> str:
        """The device in words."""
        if self.is_gpu:
            return torch.cuda.get_device_name(self.device)
        cpuinfo = Path("/proc/cpuinfo")
        model = re.search(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else None
        isa = torch.backends.cpu.get_cpu_capability()
        return f"{model[1].strip() if model else platform.machine()}, {os.cpu_count()} cores, {isa}"

    def _clocks(self) -> str | None:
        if self.is_gpu:
            return _nvidia_smi(
                "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"
            )
        cpuinfo = Path("/proc/cpuinfo")
        mhz = re.findall(r"cpu MHz\s*: ([\d.]+)", cpuinfo.read_text()) if cpuinfo.exists() else []
        return f"{statistics.mean(map(float, mhz)):.0f} MHz" if mhz else None


def percentile(values: list[float], share: float) -> float:
    """The value below which a share of the values lies, with linear interpolation."""
    ranked = sorted(values)
    place = share * (len(ranked) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ranked) - 1)
    return ranked[low] + (place - low) * (ranked[high] - ranked[low])


def _nothing() -> None: ...


def _time(prepare: Callable[[], Any], call: Callable[[], Any]) -> Times:
    prepare()
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return Times(seconds, seconds, hidden=True)


def _heap() -> str:
    kept = "kept (glibc gives no freed memory back), for all contenders"
    return kept if disable_malloc_trimming() else "as the C library has it"


def _status_bytes(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(command: list[str]) -> str | None:
    try:
        return subprocess.run(
            command, capture_output=True, text=True, check=True, cwd=ROOT, timeout=30
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError) as error:
        print(f"{command[0]} did not answer: {error}", file=sys.stderr)
        return None


def _commit() -> tuple[str | None, bool | None]:
    """The commit and whether anything but results differs from it; (None, None) outside a checkout."""
    if not (ROOT / ".git").exists():
        return None, None
    status = _output(["git", "status", "--porcelain", "--", ".", ":!bench/results", ":!README.md"])
    return _output(["git", "rev-parse", "HEAD"]), None if status is None else bool(status)


def _nvidia_smi(query: str) -> str | None:
    return _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"])
