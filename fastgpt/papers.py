"""What a run leaves for people, so that its directory explains itself.

OUT/config.toml        every option; `fastgpt train --config` takes it
    environment.json   versions, machine and command of each start
    log.jsonl          the losses
    loss.png           their curve
    sample.txt         what the model wrote at the end
    tensorboard/       where asked for
"""

from __future__ import annotations

import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

import torch

import fastgpt
from fastgpt.config import TrainConfig
from fastgpt.durable import writing
from fastgpt.plot import loss_curve
from fastgpt.runlog import RunLog


class Papers:
    """The papers of a run, in `config.out`."""

    def __init__(self, config: TrainConfig, resumed_at: int | None) -> None:
        """Write what is known at the start; a resumed run goes on with what is there, up to its step."""
        self.out = Path(config.out)
        self.out.mkdir(parents=True, exist_ok=True)
        options, environment = self.out / "config.toml", self.out / "environment.json"
        with writing(options):
            options.write_text(_toml(config), "utf-8", "replace")
        with writing(environment), environment.open("a" if resumed_at else "w", encoding="utf-8") as stream:
            stream.write(json.dumps(_environment()) + "\n")
        self.log = RunLog(self.out / "log.jsonl", resume_at=resumed_at)
        self._board = _tensorboard(self.out, resumed_at or 0) if config.tensorboard else None

    def record(self, step: int, **values: float) -> None:
        """Write the values of a step to log.jsonl, and the losses and the rate for TensorBoard."""
        self.log.add(step, **values)
        if self._board is not None:
            for name, tag in (("train_loss", "loss/train"), ("val_loss", "loss/val"), ("lr", "lr")):
                if name in values:
                    self._board.add_scalar(tag, values[name], step)

    def draw(self, entropy: float, entropy_name: str) -> None:
        """Draw loss.png from the log."""
        train, val = self.log.curve("train_loss"), self.log.curve("val_loss")
        loss_curve(self.out / "loss.png", train, val, entropy, entropy_name)

    def write_sample(self, text: str) -> None:
        """Keep a sample."""
        with writing(file := self.out / "sample.txt"):
            file.write_text(text, "utf-8")

    def close(self) -> None:
        """Close what is open."""
        self.log.close()
        if self._board is not None:
            self._board.close()


def _toml(config: TrainConfig) -> str:
    """The options as TOML; None, which it has no word for, is left out, and so is `resume`."""
    options = {k: v for k, v in config.as_dict().items() if v is not None and k != "resume"}
    lines = (f"{name} = {json.dumps(value, ensure_ascii=False)}\n" for name, value in options.items())
    return "".join(lines).replace("\x7f", "\\u007f")  # TOML has no surrogate pairs, and no bare DEL


def _environment() -> dict[str, Any]:
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "fastgpt": fastgpt.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.platform(),
        "cpu_threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def _tensorboard(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
