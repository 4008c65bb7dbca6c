"""The measured machine: its description, time and peak memory of a call, and its roofline bounds."""

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
from collections.abc import Callable, Hashable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.harness.gpu_clock import Call, GpuClock, Times
from bench.harness.records import EMPTY, Record
from fastgpt.device import peak_memory
from fastgpt.malloc import is_glibc, keep_freed_memory

ROOT = Path(__file__).parents[2]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# Peak FLOP/s of dense matrix products from NVIDIA's datasheets.
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

BOUND_ROUNDS = 9
_MMAP_THRESHOLD = 1 << 20  # bytes
_M_MMAP_THRESHOLD = -3  # of malloc.h


class Machine:
    """A device with its timer, memory measurement and roofline bounds.

    On a CPU malloc trimming is disabled for the process, and so for every implementation.

    Args:
        device: "cpu" or "cuda".
    """

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.is_gpu = self.device.type == "cuda"
        self._gpu_clock = GpuClock(self.device) if self.is_gpu else None
        # Rows of the square matrices and bytes of the copy that give the roofline bounds.
        self.bound_sizes = (8192, 1 << 30) if self.is_gpu else (2048, 1 << 28)
        self._bounds: dict[str, tuple[float, float]] = {}
        if not self.is_gpu:
            keep_freed_memory()

    def synchronize(self) -> None:
        """Wait for the work of the device."""
        if self.is_gpu:
            torch.cuda.synchronize()

    def time_round(
        self, calls: Sequence[Call], names: Sequence[Hashable] | None = None, *, whole: bool = False
    ) -> list[Times]:
        """Time each (prepare, call) pair in turn; prepare is not timed.

        Args:
            names: names of the calls, for `GpuClock.time_round`.
            whole: on a GPU, include the host time in `Times.seconds`.
        """
        if self._gpu_clock is None:  # a CPU is host and device
            return [_time(prepare, call) for prepare, call in calls]
        return self._gpu_clock.time_whole(calls) if whole else self._gpu_clock.time_round(calls, names)

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Measure the peak memory of a call, as `peak_memory` does; glibc returns large blocks during the call."""
        if self.is_gpu or not is_glibc():
            return peak_memory(call, self.device)
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MMAP_THRESHOLD)
        try:
            return peak_memory(call, self.device)
        finally:
            keep_freed_memory()

    def cache_bytes(self) -> int:
        """Return the size of the last-level cache; 32 MiB if it is unknown."""
        if self.is_gpu:
            return int(torch.cuda.get_device_properties(self.device).L2_cache_size)
        path = Path("/sys/devices/system/cpu/cpu0/cache/index3/size")
        size = re.fullmatch(r"(\d+)([KM])", path.read_text().strip()) if path.exists() else None
        return int(size[1]) * {"K": 1 << 10, "M": 1 << 20}[size[2]] if size else 32 << 20

    def roofline_bounds(self, dtype: str) -> tuple[float, float]:
        """Return the roofline bounds, measured once for each dtype.

        Returns:
            Memory bandwidth of a copy in bytes/s (read + written), and the matmul peak in FLOP/s.
        """
        if dtype not in self._bounds:
            self._bounds[dtype] = self._measure_bounds(dtype)
        return self._bounds[dtype]

    @torch.no_grad()
    def _measure_bounds(self, dtype: str) -> tuple[float, float]:
        # `fastgpt.device.peak_flops` measures something else: it multiplies smaller matrices, allocates the result in
        # the timed region and uses the host's clock. The bounds need the timer and the rounds of the measured calls.
        n, size = self.bound_sizes
        a, b = (torch.randn(n, n, device=self.device).to(DTYPES[dtype]) for _ in range(2))
        product = torch.empty_like(a)
        source = torch.ones(size, dtype=torch.int8, device=self.device)
        target = torch.zeros_like(source)
        calls = [(_nothing, lambda: torch.mm(a, b, out=product)), (_nothing, lambda: target.copy_(source))]
        self.time_round(calls)
        rounds = [self.time_round(calls) for _ in range(BOUND_ROUNDS)]
        matmul, copy = (min(t.seconds for t in times) for times in zip(*rounds, strict=True))
        return 2 * size / copy, 2 * n**3 / matmul

    def facts(self, *, command: str, rehearsal: bool = False, commit: str | None = None) -> dict[str, Any]:
        """Describe the machine, the software and the commit: the additional fields of the first record."""
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
            "malloc": "PyTorch's caching allocator" if self.is_gpu else _malloc(),
            "driver": _nvidia_smi("driver_version") if self.is_gpu else None,
            "cuda": torch.version.cuda if self.is_gpu else None,
            "cudnn": str(torch.backends.cudnn.version()) if self.is_gpu else None,
            "clocks": self._clocks(),
            "packages": {package: _version(package) for package in PACKAGES},
            "rehearsal": rehearsal,
            "datasheet_flops": self.datasheet_flops(),
        }

    def datasheet_flops(self) -> dict[str, float] | None:
        """Return the peak FLOP/s by dtype from the vendor's datasheet; None for a device without an entry."""
        return next((rates for key, rates in DATASHEET.items() if key in self.name()), None)

    def name(self) -> str:
        """Return the name of the device."""
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


def bound_records(machine: Machine, dtypes: Sequence[str]) -> Iterator[Record]:
    """Yield the records of the roofline bounds of each dtype: copy bandwidth and matmul peak."""
    for dtype in dtypes:
        bandwidth, matmul_peak = machine.roofline_bounds(dtype)
        n, size = machine.bound_sizes
        for direction, name, flops, moved, seconds in (
            ("copy", f"copy of {size >> 20} MiB", 0, 2 * size, 2 * size / bandwidth),
            ("matmul", f"matmul {n}³", 2 * n**3, 3 * n * n * DTYPES[dtype].itemsize, 2 * n**3 / matmul_peak),
        ):
            yield EMPTY | {
                "op": "roofline",
                "group": "roofline",
                "case": name,
                "dims": {"N": n} if direction == "matmul" else {},
                "dtype": dtype,
                "direction": direction,
                "backend": "torch",
                "peer": "PyTorch",
                "status": "ok",
                "verified": True,
                "seconds": seconds,
                "spread": 0.0,
                "rounds": BOUND_ROUNDS,
                "flops": flops,
                "bytes": moved,
                "roofline_seconds": seconds,
                "share_of_roofline": 1.0,
                "bound": "memory" if direction == "copy" else "compute",
            }


def percentile(values: list[float], share: float) -> float:
    """Return the quantile of `values` at `share` (0 to 1), with linear interpolation."""
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


def _malloc() -> str:
    disabled = "malloc trimming disabled, for every implementation"
    return disabled if keep_freed_memory() else "malloc: default settings"


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
        print(f"{command[0]} failed: {error}", file=sys.stderr)
        return None


def _commit() -> tuple[str | None, bool | None]:
    """Return the commit and True if files other than results differ from it; (None, None) outside a checkout."""
    if not (ROOT / ".git").exists():
        return None, None
    status = _output(["git", "status", "--porcelain", "--", ".", ":!bench/results", ":!README.md"])
    return _output(["git", "rev-parse", "HEAD"]), None if status is None else bool(status)


def _nvidia_smi(query: str) -> str | None:
    return _output(["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "--id=0"])
