"""The files of a training run in its directory, `config.out`, beside the checkpoints.

OUT/config.toml        every option, as `fastgpt train --config` reads it
    environment.json   versions, machine and command of each start
    log.jsonl          the losses
    loss.png           their curve
    sample.txt         text that the model generated at the end
    tensorboard/       with --tensorboard
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from fastgpt import extension
from fastgpt.atomic_io import naming_errors, open_to_append, replace_file
from fastgpt.console import one_line
from fastgpt.env_report import package_version
from fastgpt.evaluation.plots import loss_curve
from fastgpt.json_io import dumps
from fastgpt.training.config import TrainConfig
from fastgpt.training.metrics_log import MetricsLog

_FILES = ("config.toml", "log.jsonl", "loss.png", "sample.txt")


class RunDirectory:
    """Writes the files of a run.

    loss.png, sample.txt and TensorBoard's files are optional: a failure to write one of them is reported once and does
    not end the run.
    """

    def __init__(
        self, config: TrainConfig, resumed_at: int | None, warn: Callable[[str, str], object]
    ) -> None:
        """Write config.toml and environment.json, and open the log; a resumed run continues its log at its step.

        Args:
            resumed_at: the step that the run goes on from, None for a new run.
            warn: called with the name of an optional file and a message when it could not be written.

        Raises:
            FileExistsError: a new run would overwrite a file that no run has written.
            OSError: config.toml, environment.json or log.jsonl cannot be written.
            ValueError: TensorBoard is not installed.
        """
        if config.tensorboard and importlib.util.find_spec("tensorboard") is None:
            raise ValueError(
                "--tensorboard needs the package tensorboard: pip install tensorboard, or omit --tensorboard"
            )
        self.out, self._warn = Path(config.out), warn
        self.out.mkdir(parents=True, exist_ok=True)
        options, environment = self.out / "config.toml", self.out / "environment.json"
        if resumed_at is None and not environment.exists():
            for file in (self.out / name for name in _FILES):
                if file.is_file():
                    raise FileExistsError(
                        f"{file} is not the file of a run and would be overwritten; move it, or choose another --out"
                    )
        # First, because it shows that the other files are those of a run.
        if resumed_at:
            with naming_errors(environment), open_to_append(environment) as stream:
                stream.write(dumps(_environment()) + "\n")
        else:
            replace_file(environment, dumps(_environment()) + "\n")
        if resumed_at is None or resumed_at <= config.max_steps:  # else nothing is trained with these options
            replace_file(options, _toml(config))
        self.log = MetricsLog(self.out / "log.jsonl", resume_at=resumed_at)
        self._board: Any = None
        if config.tensorboard:
            with self.optional("TensorBoard"):
                from torch.utils.tensorboard import SummaryWriter

                if (self.out / "tensorboard").is_symlink():
                    raise OSError(f"{self.out / 'tensorboard'} is a link")
                self._board = SummaryWriter(str(self.out / "tensorboard"), purge_step=(resumed_at or 0) + 1)

    @contextlib.contextmanager
    def optional(self, name: str) -> Iterator[None]:
        """Report an exception as a warning, the first one about `name`, instead of raising it."""
        try:
            yield
        except Exception as error:
            self._warn(name, f"{name} could not be written ({one_line(error)}); the run goes on without it")

    def record(self, step: int, **values: float) -> None:
        """Write the values of a step to log.jsonl, and losses and learning rate to TensorBoard."""
        self.log.add(step, **values)
        if self._board is not None:
            with self.optional("TensorBoard"):
                for name, tag in (("train_loss", "loss/train"), ("val_loss", "loss/val"), ("lr", "lr")):
                    if name in values:
                        self._board.add_scalar(tag, values[name], step)

    def draw(self, entropy: float, entropy_name: str) -> None:
        """Draw loss.png from the log."""
        with self.optional("loss.png"):
            train, val = self.log.curve("train_loss"), self.log.curve("val_loss")
            loss_curve(self.out / "loss.png", train, val, entropy, entropy_name, str(self.out))

    def write_sample(self, text: str) -> None:
        """Write sample.txt."""
        with self.optional("sample.txt"):
            replace_file(self.out / "sample.txt", text)

    def sync(self) -> None:
        """Flush the log to the disk."""
        self.log.sync()

    def close(self) -> None:
        """Close the log and TensorBoard."""
        self.log.close()
        if self._board is not None:
            with self.optional("TensorBoard"):
                self._board.close()


class NullRunDirectory:
    """The run directory of processes other than the main one: writes nothing."""

    def optional(self, name: str) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def record(self, step: int, **values: float) -> None: ...
    def draw(self, entropy: float, entropy_name: str) -> None: ...
    def write_sample(self, text: str) -> None: ...
    def sync(self) -> None: ...
    def close(self) -> None: ...


def _toml(config: TrainConfig) -> str:
    """The options as TOML; None, which it has no word for, is left out, and so is `resume`."""
    options = {k: v for k, v in config.as_dict().items() if v is not None and k != "resume"}
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in options.items())
    return "".join(lines).replace("\x7f", "\\u007f")  # TOML has no surrogate pairs, and no bare DEL


def _environment() -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "fastgpt": package_version("fastgpt-kernels"),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "cpu_kernels": extension.variant(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }
