"""How fast a device multiplies matrices."""

from __future__ import annotations

import math
import time

import torch


@torch.no_grad()
def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The operations a second that a square matrix product reaches here: the roof of a training step."""
    n = 8192 if device.type != "cpu" else 128 if dtype == torch.float16 else 1024  # many CPUs have no float16
    # Not ones, which take a GPU less power; nor random numbers, which would change those of the run.
    a = torch.arange(n * n, device=device, dtype=torch.float32).sin().view(n, n).to(dtype)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best
