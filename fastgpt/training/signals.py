"""Signals that end a run after its step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """Context that turns SIGINT, SIGTERM and SIGHUP (a closed terminal or connection) into a flag.

    A second SIGINT has its former effect. A second SIGTERM has none: a scheduler signals every process, and torchrun
    forwards its own. SIGHUP stays ignored where it was, as under nohup.
    """

    def __init__(self) -> None:
        self.received = False
        self._former: dict[int, Any] = {}

    def set(self) -> None:
        """Act as if a signal had come."""
        self.received = True

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN:
                    self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(number, self._former[number])
