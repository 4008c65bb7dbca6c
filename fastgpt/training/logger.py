"""The output of a run: lines, progress bar, throughput, and the records of its directory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable

from fastgpt.console import Progress, show
from fastgpt.training.config import TrainConfig
from fastgpt.training.run_directory import NullRunDirectory, RunDirectory


def warn(text: str) -> None:
    """Print a warning before there is a logger."""
    show(f"fastgpt: warning: {text}", file=sys.stderr)


class Logger:
    """Prints and records on the main process, and does nothing on the others.

    Args:
        config: of the run.
        step: the step that the run starts at.
        resumed: whether it continues a checkpoint.
        is_main: whether this process is the main one.
        reader_gone: called when stdout or stderr has lost its reader.
    """

    def __init__(
        self,
        config: TrainConfig,
        step: int,
        *,
        resumed: bool,
        is_main: bool,
        reader_gone: Callable[[], object],
    ) -> None:
        self._tokens_per_step = config.batch_size * config.grad_accum * config.block_size
        bar = {"total": config.max_steps, "initial": step, "unit": "step", "dynamic_ncols": True}
        self.progress = Progress(shown=is_main, reader_gone=reader_gone, **bar)
        try:
            self.directory = (
                RunDirectory(config, step if resumed else None, self.progress.warn_once)
                if is_main
                else NullRunDirectory()
            )
        except BaseException:
            self.progress.close()
            raise
        self._began, self._began_step, self._max_steps = time.perf_counter(), step, config.max_steps
        self.restart_clock(step)

    def log(self, line: str) -> None:
        """Print a line to stdout, past the progress bar."""
        self.progress.line(line)

    def restart_clock(self, step: int) -> None:
        """Measure the throughput from here on: after a validation or a checkpoint, whose time it leaves out."""
        self._start, self._start_step = time.perf_counter(), step

    def tokens_per_second(self, step: int) -> float:
        """Compute the throughput since the clock was restarted."""
        return (step - self._start_step) * self._tokens_per_step / (time.perf_counter() - self._start)

    def times(self, step: int, deadline: float) -> str:
        """Describe the time since the start, and the time left: until max_steps at the pace so far, or the deadline.

        Args:
            step: the last step.
            deadline: of `time.perf_counter`.
        """
        now = time.perf_counter()
        pace = (now - self._began) / (step - self._began_step)
        left = min((self._max_steps - step) * pace, deadline - now)
        return f"{_minutes(now - self._began)} elapsed, {_minutes(left)} left"

    def close(self) -> None:
        """Close the bar and the files."""
        self.progress.close()
        self.directory.close()


def _minutes(seconds: float) -> str:
    """Format a time as minutes:seconds, with hours if there are any."""
    minutes, seconds = divmod(math.ceil(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
