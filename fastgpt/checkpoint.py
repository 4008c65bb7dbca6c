"""Checkpoints that are whole or absent.

    OUT/step-00000100/model.safetensors      the parameters, a tied head once
                      optimizer.safetensors  the optimizers' moments, "<parameter>.<key>"
                      tokenizer.json
                      state.json             step, configurations, size and SHA-256 of the files above

Of a sharded run (FSDP2) each process writes its part of both, by torch.distributed.checkpoint, into
`model/` and `optimizer/` instead; any number of processes reads either kind. Random states are not kept: a step's
follow from the seed and its number.

All of it is written into a temporary sibling, flushed to the disk, and takes its name by one rename, which is
atomic: a process killed while it saves, or a full disk, leaves the checkpoint before untouched. What such a
death leaves behind is ignored and swept away by the next save.
"""

from __future__ import annotations

import json
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.atomic_io import fingerprint, flush
from fastgpt.config import TrainConfig
from fastgpt.distributed import Processes
from fastgpt.json_io import dumps
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
        """Copy the parameters into `model`, which may be sharded; then all processes must call.

        Raises CheckpointError if they are not those of its configuration.
        """
        places = _parameters(model, self.model.tie_head)
        found = self._tensors("model", places)
        odd = sorted(found.keys() ^ places.keys())
        if odd:
            raise CheckpointError(f"{self.path} does not fit the model: {odd[0]} is in one of them alone")
        with torch.no_grad():
            for name, place in places.items():
                if found[name].shape != place.shape:
                    raise CheckpointError(
                        f"{self.path} does not fit the model: {name} is {tuple(found[name].shape)}, "
                        f"not {tuple(place.shape)}"
                    )
                place.copy_(found[name])

    def load_training(self, model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Restore the state of the optimizers, so that training goes on bit for bit. One that has not taken a step, at
        the beginning or because float16 overflowed in all of them, has none.
        """
        states: dict[str, dict[str, Tensor]] = {}
        for key, tensor in self._tensors("optimizer", dict(model.named_parameters())).items():
            name, _, entry = key.rpartition(".")
            states.setdefault(name, {})[entry] = tensor
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        owners = {names[id(p)]: o for o in optimizers for group in o.param_groups for p in group["params"]}
        stepped = {id(owners[name]) for name in states if name in owners}
        for name, parameter in model.named_parameters():
            if id(owners[name]) not in stepped:
                continue
            if name not in states:
                raise CheckpointError(f"{self.path} holds no optimizer state for {name}")
            state = {k: v.to(parameter.device) for k, v in states[name].items()}
            owners[name].state[parameter] = state

    def load_tokenizer(self) -> ByteTokenizer | BPETokenizer:
        """The tokenizer that the model was trained with."""
        return load_tokenizer(self.path)

    def _tensors(self, stem: str, parameters: dict[str, Tensor]) -> dict[str, Tensor]:
        """All tensors of a file or of a sharded directory; one as large as its parameter is sharded like it."""
        if not (self.path / stem).is_dir():
            file = self.path / f"{stem}.safetensors"
            try:
                tensors = load_file(file)
            except SafetensorError as error:
                raise CheckpointError(f"{file} is no safetensors file: {error}") from None
            return {key: _shard(tensor, _parameter_of(key, parameters)) for key, tensor in tensors.items()}
        from torch.distributed.checkpoint import FileSystemReader, load
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata
        from torch.distributed.tensor import DTensor

        reader = FileSystemReader(self.path / stem)
        tensors = {}
        for key, facts in reader.read_metadata().state_dict_metadata.items():
            assert isinstance(facts, TensorStorageMetadata)  # nothing else was saved
            parameter = _parameter_of(key, parameters)
            if parameter is not None and parameter.shape == facts.size:
                tensors[key] = torch.empty_like(parameter, dtype=facts.properties.dtype)
            else:
                tensors[key] = torch.empty(facts.size, dtype=facts.properties.dtype)
        alone = not any(isinstance(tensor, DTensor) for tensor in tensors.values())
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            load(tensors, storage_reader=reader, no_dist=alone)
        return tensors


def save(
    out: Path,
    step: int,
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: ByteTokenizer | BPETokenizer,
    config: TrainConfig,
    extra: dict[str, Any],
    *,
    processes: Processes | None = None,
    best: int | None = None,
) -> Path:
    """Write OUT/step-…, then remove all but the newest KEEP checkpoints and that of step `best`; return its path.

    `extra` is whatever else JSON can hold. A step that has been saved already is left as it is. All processes
    of a run call; the first one writes, or all do where the model is sharded. Raises OSError if it cannot be
    written, a full disk for one; then nothing of it remains, and older checkpoints are untouched.
    """
    path = step_path(out, step)
    temporary = out / f"{_TEMPORARY}{path.name}"
    processes = processes or Processes()
    first = processes.first
    if processes.total(first and (path / _STATE).exists()) != [0]:
        return path
    tied = model.config.tie_head
    try:
        with processes.agreeing():
            if first:
                sweep(out)
                temporary.mkdir(parents=True)
        tensors = {"model": _parameters(model, tied), "optimizer": dict(_moments(model, optimizers))}
        if processes.sharded:
            _save_sharded(temporary, tensors)
        with processes.agreeing():
            if first:
                if not processes.sharded:
                    _save_whole(temporary, tensors)
                tokenizer.save(temporary)
                files = [file for file in sorted(temporary.rglob("*")) if file.is_file()]
                state = {
                    "format": FORMAT,
                    "step": step,
                    "train": config.as_dict(),
                    "model": asdict(model.config),
                    "extra": extra,
                    "files": {file.relative_to(temporary).as_posix(): fingerprint(file) for file in files},
                }
                (temporary / _STATE).write_text(dumps(state, indent=2), "utf-8")
                for file in (*temporary.rglob("*"), temporary):
                    flush(file)
                if path.exists():  # without a state: it was damaged, and is not ours to remove
                    path.rename(out / f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
                temporary.rename(path)
                flush(out)
    except OSError as error:
        if first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(
            f"the checkpoint {path} could not be written ({error.strerror or error}); older ones are untouched"
        ) from error
    if first:
        for old in steps(out)[:-KEEP]:
            if best is None or old != step_path(out, best):
                old.rename(out / f"{_TEMPORARY}{old.name}")
        sweep(out)
    processes.barrier()
    return path


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a step's directory, or what `train --out` was given, and then its newest
    step.

    Every file is compared with the size and the SHA-256 in state.json. Raises CheckpointError where there is
    no checkpoint, or one that is truncated, altered or foreign; the message names the newest whole one.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no checkpoint directory {path}")
    if (path / _STATE).exists():
        return _open(path)
    found = steps(path)
    if not found:
        raise CheckpointError(f"{path} holds no checkpoint")
    try:
        return _open(found[-1])
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_instead_of(found[-1], found[-2::-1])}") from None


def _instead_of(damaged: Path, older: Sequence[Path]) -> str:
    """What can be used instead of a damaged checkpoint, and how."""
    for path in older:
        try:
            _open(path)
        except CheckpointError:
            continue
        return f"{path} is whole: to use it, move {damaged} to another place, or name {path} itself to load its model"
    return "no older checkpoint is whole"


def _open(path: Path) -> Checkpoint:
    """The checkpoint in a step's directory, verified."""
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
    for name, expected in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} lacks {name}")
        if fingerprint(file) != expected:
            raise CheckpointError(f"{file} is damaged: its size or SHA-256 is not what {_STATE} says")
    return checkpoint


def step_path(out: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return out / f"{_PREFIX}{step:08d}"


def exists(out: Path) -> bool:
    """Whether `train --out` has saved a checkpoint there."""
    return bool(steps(out))


def sweep(out: Path) -> None:
    """Remove what is no checkpoint, or no longer one: what saves that died left, and what gave way."""
    for leftover in out.glob(f"{_TEMPORARY}{_PREFIX}*"):  # others write there too: a data set, an export
        shutil.rmtree(leftover, ignore_errors=True)


def steps(out: Path) -> list[Path]:
    """The directories of complete checkpoints, the newest last."""
    return sorted(path.parent for path in out.glob(f"{_PREFIX}*/{_STATE}"))


def check_weights(model: GPT, name: str | Path) -> None:
    """Raise CheckpointError for a model on the CPU with weights that are NaN or infinite."""
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"the weights of {name} cannot be used: {key} holds NaN or infinity, its training has diverged; "
                "take an older checkpoint"
            )


def _parameters(model: GPT, tied: bool) -> dict[str, Tensor]:
    """The parameters by name, as one process holds them; a tied head is the embedding and left out."""
    return {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}


def _moments(model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                yield f"{names[id(parameter)]}.{key}", value


def _save_whole(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write a file each of model and optimizer."""
    try:
        for stem, named in tensors.items():
            save_file(named, folder / f"{stem}.safetensors")
    except SafetensorError as error:
        raise OSError(str(error)) from error


def _save_sharded(folder: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Write each process's parts, one file each. Raises the same OSError in all processes."""
    from torch.distributed.checkpoint import FileSystemWriter
    from torch.distributed.checkpoint import save as save_parts
    from torch.distributed.checkpoint.api import CheckpointException

    class Writer(FileSystemWriter):
        def write_data(self, *arguments: Any) -> Any:
            try:
                return super().write_data(*arguments)
            except RuntimeError as error:  # torch.save closes its file, and complains of that
                raise error.__context__ if isinstance(error.__context__, OSError) else error from None

    try:
        for stem, named in tensors.items():
            save_parts(named, storage_writer=Writer(folder / stem, single_file_per_rank=True))
    except CheckpointException as error:
        reasons = {getattr(reason, "strerror", None) or str(reason) for reason, _ in error.failures.values()}
        raise OSError("; ".join(sorted(reasons))) from None


def _parameter_of(key: str, parameters: dict[str, Tensor]) -> Tensor | None:
    """The parameter that a tensor is, or that it is the moment of."""
    return parameters.get(key, parameters.get(key.rpartition(".")[0]))


def _shard(tensor: Tensor, parameter: Tensor | None) -> Tensor:
    """The tensor, sharded as the parameter is if it has its shape."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    if not isinstance(parameter, DTensor) or parameter.shape != tensor.shape:
        return tensor
    return distribute_tensor(tensor.to(parameter.device), parameter.device_mesh, parameter.placements)
