"""Checkpoints that are whole or absent.

    OUT/step-00000100/model.safetensors      the parameters, a tied head once
                      optimizer.safetensors  AdamW's moments, "<parameter>.<key>"
                      rng.safetensors        the states of torch's random generators
                      tokenizer.json
                      state.json             step, configurations, size and SHA-256 of the files above

All of it is written into a temporary sibling, flushed to the disk, and takes its name by one rename, which is
atomic: a process killed while it saves, or a full disk, leaves the checkpoint before untouched. What such a
death leaves behind is ignored and swept away by the next save.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.config import TrainConfig
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer

KEEP = 2  # checkpoints that stay; the others are removed once a newer one is safe
FORMAT = 1
_STATE = "state.json"
_PREFIX = "step-"
_TEMPORARY = ".writing-"


class CheckpointError(ValueError):
    """There is no checkpoint, or it is not whole, or it is of another kind; the message says which."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified. The tensors are read on demand."""

    path: Path
    step: int
    train: TrainConfig
    model: GPTConfig
    extra: dict[str, Any]

    def load_model(self) -> GPT:
        """The model, on the CPU, in training mode."""
        model = GPT(self.model)
        self.load_weights(model)
        return model

    def load_weights(self, model: GPT) -> None:
        """Copy the parameters into `model`. Raises CheckpointError if they are not those of its
        configuration.
        """
        weights = self._tensors("model")
        if self.model.tie_head and "wte.weight" in weights:
            weights["lm_head.weight"] = weights["wte.weight"]
        try:
            model.load_state_dict(weights)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise CheckpointError(f"{self.path} does not fit the model: {reason}") from None

    def load_training(self, model: GPT, optimizer: torch.optim.Optimizer) -> None:
        """Restore the optimizer's state and the random generators, so that training goes on bit for bit."""
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._tensors("optimizer").items():
            name, _, entry = key.rpartition(".")
            states.setdefault(name, {})[entry] = tensor
        for name, parameter in model.named_parameters():
            if name not in states:
                raise CheckpointError(f"{self.path} holds no optimizer state for {name}")
            optimizer.state[parameter] = {k: v.to(parameter.device) for k, v in states[name].items()}
        generators = self._tensors("rng")
        torch.set_rng_state(generators.pop("cpu"))
        for name, state in generators.items():
            if int(name.removeprefix("cuda:")) < torch.cuda.device_count():
                torch.cuda.set_rng_state(state, name)

    def load_tokenizer(self) -> ByteTokenizer | BPETokenizer:
        """The tokenizer that the model was trained with."""
        return load_tokenizer(self.path)

    def _tensors(self, stem: str) -> dict[str, Tensor]:
        try:
            return load_file(self.path / f"{stem}.safetensors")
        except SafetensorError as error:
            raise CheckpointError(f"{self.path / stem}.safetensors is no safetensors file: {error}") from None


def save(
    out: Path,
    step: int,
    model: GPT,
    optimizer: torch.optim.Optimizer,
    tokenizer: ByteTokenizer | BPETokenizer,
    config: TrainConfig,
    extra: dict[str, Any],
) -> Path:
    """Write OUT/step-…, then remove all but the newest KEEP checkpoints; return its path.

    `extra` is whatever else JSON can hold. A step that has been saved already is left as it is. Raises
    OSError if it cannot be written, a full disk for one; then nothing of it remains, and older checkpoints
    are untouched.
    """
    path = out / f"{_PREFIX}{step:08d}"
    sweep(out)
    if (path / _STATE).exists():
        return path
    temporary = out / f"{_TEMPORARY}{path.name}"
    try:
        temporary.mkdir(parents=True)
        weights = dict(model.state_dict())
        if model.config.tie_head:
            del weights["lm_head.weight"]
        save_file(weights, temporary / "model.safetensors")
        save_file(_moments(model, optimizer), temporary / "optimizer.safetensors")
        save_file(_generators(), temporary / "rng.safetensors")
        tokenizer.save(temporary)
        state = {
            "format": FORMAT,
            "step": step,
            "train": config.as_dict(),
            "model": asdict(model.config),
            "extra": extra,
            "files": {file.name: _fingerprint(file) for file in sorted(temporary.iterdir())},
        }
        (temporary / _STATE).write_text(json.dumps(state, indent=2), "utf-8")
        for file in (*temporary.iterdir(), temporary):
            _flush(file)
        temporary.rename(path)
        _flush(out)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = getattr(error, "strerror", None) or error
        raise OSError(
            f"the checkpoint {path} could not be written ({reason}); older ones are untouched"
        ) from error
    for old in _steps(out)[:-KEEP]:
        old.rename(out / f"{_TEMPORARY}{old.name}")
    sweep(out)
    return path


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a step's directory, or what `train --out` was given, and then its newest
    step.

    Every file is compared with the size and the SHA-256 in state.json. Raises CheckpointError where there is
    no checkpoint, or one that is truncated, altered or foreign.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {path}")
    if not (path / _STATE).exists():
        steps = _steps(path)
        if not steps:
            raise CheckpointError(f"{path} holds no checkpoint")
        path = steps[-1]
    try:
        state = json.loads((path / _STATE).read_text("utf-8"))
        if state["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {state['format']}, and this version reads {FORMAT}")
        files = dict(state["files"])
        checkpoint = Checkpoint(
            path=path,
            step=int(state["step"]),
            train=TrainConfig().override(state["train"]),
            model=GPTConfig(**state["model"]),
            extra=dict(state["extra"]),
        )
    except CheckpointError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path / _STATE} is not the state of a checkpoint: {error!r}") from None
    for name, fingerprint in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {name}")
        if _fingerprint(file) != fingerprint:
            raise CheckpointError(f"{file} is damaged: its size or SHA-256 is not what {_STATE} says")
    return checkpoint


def exists(out: Path) -> bool:
    """Whether `train --out` has saved a checkpoint there."""
    return bool(_steps(out))


def sweep(out: Path) -> None:
    """Remove what is no checkpoint, or no longer one: what saves that died left, and what gave way."""
    for leftover in out.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _steps(out: Path) -> list[Path]:
    """The directories of complete checkpoints, the newest last."""
    return sorted(path.parent for path in out.glob(f"{_PREFIX}*/{_STATE}"))


def _moments(model: GPT, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": value
        for name, parameter in model.named_parameters()
        for key, value in optimizer.state[parameter].items()
    }


def _generators() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def _fingerprint(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def _flush(path: Path) -> None:
    """Have the kernel write a file, or the entries of a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
