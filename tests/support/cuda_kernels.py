"""The CUDA kernels as tests see them: on a GPU themselves, on the CPU in the emulator (simt)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.simt import emulator


def on_gpu() -> bool:
    """Whether tests make their tensors on a GPU (--device cuda)."""
    return torch.get_default_device().type == "cuda"


def other_order(seed: int) -> None:
    """Let the warps of the next launches run in another order; a GPU has its own."""
    if not on_gpu():
        emulator.seed(seed)


def has_clusters() -> bool:
    """Whether the blocks of a launch form clusters on this GPU, or on the emulated one."""
    return torch.cuda.get_device_capability() >= (9, 0) if on_gpu() else emulator.profile().clusters


def launches(call: Callable[[], Any]) -> int:
    """How many of our kernels a call launches."""
    if not on_gpu():
        before = emulator.launches()
        call()
        return emulator.launches() - before
    call()  # what is done once is not counted
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    return sum("fastgpt::" in event.name for event in profile.events())
