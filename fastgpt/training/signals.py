"""Signals that end a run after its step, with a checkpoint."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any


class StopSignal:
    """Turns SIGINT, SIGTERM and SIGHUP (a terminal or connection that is closed) into a flag; a second SIGINT acts as
    it always did. A second SIGTERM does not: a scheduler signals every process, and torchrun passes on its own. SIGHUP
    stays ignored where it is, as under nohup.
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
