"""Device time of a call on a GPU, independent of the time that its host needs to launch it.

A kernel that waits runs first, until the host has launched all of the call; then the launches lie ready and the time
between the events around them is the device's alone. Whether the wait was long enough is seen, not assumed: the event
in front of the call must not have happened yet when the host is done. Host time is measured beside it.

For a whole training step or generated text a user waits for both: those are timed by wall-clock time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, NamedTuple

import torch

Call = tuple[Callable[[], Any], Callable[[], Any]]  # what is done before, untimed, and what is timed

FLUSH_BYTES = 1 << 29  # larger than any L2 cache
MARGIN = 1.5  # of the host time measured last
FIRST_GUESS = 1e-3  # seconds of host time
ATTEMPTS = 3  # a call that waits for the device itself is never hidden
CALIBRATION = 20_000_000  # clock ticks of the waiting kernel


class Times(NamedTuple):
    """Seconds of a call.

    Attributes:
        seconds: what the call takes, of the device alone or with its host.
        host: until the host had launched it.
        hidden: whether the device began only when all had been launched.
    """

    seconds: float
    host: float
    hidden: bool


class GpuClock:
    """Times calls on one GPU.

    Args:
        device: the GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._flush: torch.Tensor | None = None
        self._ticks = 0.0  # a second
        self._host: dict[Hashable, float] = {}  # seconds, by the name of a call

    def time_round(self, calls: Sequence[Call], names: Sequence[Hashable] | None = None) -> list[Times]:
        """Times of each (prepare, call) pair, one after the other; before each the L2 cache is overwritten.

        Args:
            names: a call of the same name is taken to need the host as long as it did last; its place, by default.
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
        """Wall-clock times of each (prepare, call) pair, from an idle device to an idle device."""
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
        for _ in range(2):  # the first one raises the clock
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
