"""Device time of a call on a GPU, independent of the launch time on the host.

First a waiting kernel occupies the device until the host has launched the whole call. Then the queue holds all
launches, and the time between the two events around them is device time only. The wait is checked: the event before
the call must still be pending at the end of the launches. The host time is measured separately.

Training steps and text generation are timed with the host's clock, because a user waits for host and device.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

Call = tuple[Callable[[], Any], Callable[[], Any]]  # untimed preparation, timed call

FLUSH_BYTES = 1 << 29  # larger than any L2 cache
MARGIN = 1.5  # wait, as a multiple of the last host time
FIRST_GUESS = 1e-3  # host time of a first call, in seconds
ATTEMPTS = 3  # a call that synchronizes with the device can never be hidden
CALIBRATION = 20_000_000  # ticks of the waiting kernel


class Times(NamedTuple):
    """Times of a call, in seconds.

    Attributes:
        seconds: device time, or wall-clock time of host and device.
        host: time of the launches on the host.
        hidden: True if the device started after the last launch.
    """

    seconds: float
    host: float
    hidden: bool


class GpuClock:
    """A timer for calls on one GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush: torch.Tensor | None = None
        self._ticks = 0.0  # per second
        self._host: dict[Hashable, float] = {}  # last host time in seconds, by name of the call

    def time_round(self, calls: Sequence[Call], names: Sequence[Hashable] | None = None) -> list[Times]:
        """Measure the device time of each (prepare, call) pair in turn. The L2 cache is overwritten before each call.

        Args:
            names: keys for the host times: the last host time of a name determines the wait for its next call. The
                default is the position in `calls`.
        """
        if self._flush is None:
            self._flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=self._device)
            self._calibrate()
        queued = [
            self._queue(prepare, call, name)
            for (prepare, call), name in zip(calls, names or range(len(calls)), strict=True)
        ]
        torch.cuda.synchronize()
        return [Times(start.elapsed_time(end) / 1e3, host, hidden) for start, end, host, hidden in queued]

    def time_whole(self, calls: Sequence[Call]) -> list[Times]:
        """Measure the wall-clock time of each (prepare, call) pair, from idle device to idle device."""
        found = []
        for prepare, call in calls:
            prepare()
            torch.cuda.synchronize()
            began = time.perf_counter()
            call()
            host = time.perf_counter() - began
            torch.cuda.synchronize()
            found.append(Times(time.perf_counter() - began, host, hidden=False))
        return found

    def _calibrate(self) -> None:
        for _ in range(2):  # the first one raises the clock rate of the GPU
            start, end = _event(), _event()
            start.record()
            torch.cuda._sleep(CALIBRATION)
            end.record()
            torch.cuda.synchronize()
        self._ticks = CALIBRATION / (start.elapsed_time(end) / 1e3)

    def _queue(
        self, prepare: Callable[[], Any], call: Callable[[], Any], name: Hashable
    ) -> tuple[Any, Any, float, bool]:
        assert self._flush is not None
        wait = MARGIN * self._host.get(name, FIRST_GUESS)
        for _ in range(ATTEMPTS):
            prepare()
            self._flush.zero_()
            torch.cuda._sleep(int(wait * self._ticks))
            start, end = _event(), _event()
            start.record()
            began = time.perf_counter()
            call()
            host = time.perf_counter() - began
            end.record()
            hidden = not start.query()
            if hidden:
                break
            wait = max(2 * wait, MARGIN * host)
        self._host[name] = host
        return start, end, host, hidden


def _event() -> Any:
    return torch.cuda.Event(enable_timing=True)
