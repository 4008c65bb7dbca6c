"""Native checkpoints, complete or absent.

    OUT/step-00000100/model.safetensors      the parameters; a tied head is stored once
                      optimizer.safetensors  the optimizers' state, "<parameter>.<key>"
                      tokenizer.json
                      state.json             step, configurations, size and SHA-256 of the files above

In a sharded run (FSDP2) each process writes its rows of both, to `model-00001-of-00002.safetensors` and so on instead.
Any number of processes can read either kind. Random states are not stored: those of a step follow from the seed and its
number. A checkpoint may come from an untrusted source: it contains no code, and only files that state.json lists are
read.

All files are written to a temporary sibling directory and flushed to disk; then the directory is renamed atomically. A
process that is killed while it saves, or a full disk, leaves the previous checkpoint untouched. Temporary directories
of killed processes are ignored, and the next save removes them.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt.atomic_io import AtomicDirectory, check_files, fingerprint
from fastgpt.checkpoints.optimizer_state import named_state, sharded_like, state_keys
from fastgpt.checkpoints.state_file import (
    FORMAT,
    STATE,
    STEP_PREFIX,
    expected_files,
    options_of,
    parts_of,
    step_name,
    step_of,
    tensor_files,
)
from fastgpt.checkpoints.tensor_files import TensorFiles, write_tensors
from fastgpt.distributed import DistributedContext, local
from fastgpt.json_io import dumps, read_json, shown
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import Tokenizer, load_tokenizer

KEEP = 2  # newest checkpoints that are not removed
_TEMPORARY = ".writing-"
_OWN = re.compile(r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors|tokenizer\.json|state\.json")
_LONGEST_REASON = 500  # characters; a message may quote a long name from the file


class CheckpointError(ValueError):
    """Error for a checkpoint that is missing, incomplete, damaged or of another kind."""


class StoredTensors(Protocol):
    """Named tensors on disk: `TensorFiles`, or `PickledParts` of format 1."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | None]

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """Read a tensor, or this process's rows of it if `like` is sharded."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint with verified files. Tensors are read on demand.

    Attributes:
        path: its directory.
        step: number of optimizer steps.
        options: options of the run that saved it; `training.config.trained_with` reads them.
        model: configuration of the model.
        extra: further state of the run.
        parts: number of files per set of tensors; None for a sharded checkpoint of format 1.
    """

    path: Path
    step: int
    options: dict[str, Any]
    model: GPTConfig
    extra: dict[str, Any]
    parts: int | None = 1

    def load_model(self) -> GPT:
        """Load the model, on the CPU, in training mode.

        Raises:
            CheckpointError: the tensors do not match the configuration; the model is then not allocated.
        """
        self._check_weights(self._stored("model"))
        model = GPT(self.model)
        self.load_weights(model)
        return model

    def load_weights(self, model: GPT) -> None:
        """Copy the parameters into `model`, which may be sharded. Raises CheckpointError if they do not match."""
        stored = self._stored("model")
        parameters = _parameters(model, self.model.tie_head)
        _check_same("model", self.path, stored.shapes, {n: tuple(p.shape) for n, p in parameters.items()})
        with torch.no_grad():
            for name, parameter in parameters.items():
                local(parameter).copy_(self._read(stored, name, parameter))

    def load_training(self, model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Restore the state of the optimizers exactly.

        An optimizer without any step so far has no state: at the start, or if float16 overflowed in every step.

        Raises:
            CheckpointError: names, shapes or dtypes differ from the state that the optimizers create. This is checked
                because their fused kernels do not check it.
        """
        stored = self._stored("optimizer")
        names = {parameter: name for name, parameter in model.named_parameters()}
        expected: dict[str, tuple[int, ...]] = {}
        states: list[tuple[torch.optim.Optimizer, Tensor, dict[str, str]]] = []
        for optimizer in optimizers:
            owned = [p for group in optimizer.param_groups for p in group["params"]]
            keys = state_keys(optimizer)
            if not any(f"{names[p]}.{key}" in stored.shapes for p in owned for key in keys):
                continue
            for parameter in owned:
                entries = {key: f"{names[parameter]}.{key}" for key in keys}
                states.append((optimizer, parameter, entries))
                expected |= {e: () if k == "step" else tuple(parameter.shape) for k, e in entries.items()}
        _check_same("optimizer", self.path, stored.shapes, expected)
        for optimizer, parameter, entries in states:
            for key, entry in entries.items():
                counter = key == "step"
                dtype = torch.float32 if counter else parameter.dtype
                if stored.dtypes[entry] != dtype:
                    raise CheckpointError(f"{self.path} has {entry} in {stored.dtypes[entry]}, not {dtype}")
                tensor = self._read(stored, entry, None if counter else parameter)
                if counter and not 0 <= tensor.item() < 1 << 53:
                    raise CheckpointError(f"{self.path} has an invalid {entry}, {tensor.item()}")
                tensor = tensor.to(parameter.device)
                optimizer.state[parameter][key] = tensor if counter else sharded_like(tensor, parameter)

    def load_tokenizer(self) -> Tokenizer:
        """Load the tokenizer that the model was trained with."""
        return load_tokenizer(self.path)

    def _check_weights(self, stored: StoredTensors) -> None:
        wanted = parameter_shapes(self.model, len(stored.shapes), self.path)
        if self.model.tie_head:
            del wanted["lm_head.weight"]
        _check_same("model", self.path, stored.shapes, wanted)

    def _stored(self, stem: str) -> StoredTensors:
        try:
            if self.parts is None:
                from fastgpt.checkpoints.pickled_parts import PickledParts

                return PickledParts(self.path / stem)
            return TensorFiles([self.path / name for name in tensor_files(stem, self.parts)])
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    def _read(self, stored: StoredTensors, name: str, like: Tensor | None) -> Tensor:
        try:
            return stored.read(name, like)
        except ValueError as error:
            raise CheckpointError(str(error)) from None


def parameter_shapes(config: GPTConfig, tensors: int, source: Path) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the parameters of GPT(config) by name, without allocating them.

    Raises CheckpointError if the model has more layers than `source` has tensors: building it could take too long.
    """
    if config.n_layer > tensors:
        raise CheckpointError(
            f"{source} has {tensors} tensors, too few for a model of {config.n_layer} layers"
        )
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}


def _check_same(
    kind: str, path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless the tensors of a checkpoint match the model or the optimizer."""
    if odd := sorted(found.keys() ^ wanted.keys()):
        verb = "has an unexpected" if odd[0] in found else "lacks"
        raise CheckpointError(f"{path} does not match the {kind}: it {verb} {shown(odd[0])}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(f"{path} does not match the {kind}: {name} is {found[name]}, not {shape}")


def save(
    out: Path,
    step: int,
    model: GPT,
    optimizers: Sequence[torch.optim.Optimizer],
    tokenizer: Tokenizer,
    options: dict[str, Any],
    extra: dict[str, Any],
    *,
    distributed: DistributedContext | None = None,
    best: int | None = None,
) -> Path:
    """Write OUT/step-..., and remove all but the newest KEEP checkpoints and that of step `best`.

    All processes of a run call this function. The main process writes, or all processes if the model is sharded. A step
    that was already saved is not written again.

    Args:
        out: directory of the run.
        step: number of optimizer steps.
        model: the model.
        optimizers: its optimizers.
        tokenizer: its tokenizer.
        options: options of the run; `training.config.trained_with` reads them.
        extra: further state of the run, valid JSON.
        distributed: the processes of the run; None for a single one.
        best: step of a checkpoint that is not removed.

    Returns:
        The path of the checkpoint.

    Raises:
        OSError: it cannot be written, for example because the disk is full. No partial checkpoint remains, and older
            checkpoints are untouched.
    """
    path = step_path(out, step)
    distributed = distributed or DistributedContext()
    is_main = distributed.is_main
    if distributed.all_reduce_sum(is_main and (path / STATE).exists()) != [0]:
        return path
    parts = distributed.world_size if distributed.sharded else 1
    writing: AtomicDirectory | None = None
    try:
        with distributed.raise_on_all_ranks():
            if is_main:
                sweep(out)
                writing = AtomicDirectory(path, _OWN)
        tensors = {
            "model": _parameters(model, model.config.tie_head),
            "optimizer": dict(named_state(model, optimizers)),
        }
        with distributed.raise_on_all_ranks():
            if is_main or distributed.sharded:
                _write_part(out / f"{_TEMPORARY}{path.name}", tensors, distributed.rank, parts)
        with distributed.raise_on_all_ranks():
            if writing is not None:
                tokenizer.save(writing.path)
                state = {
                    "format": FORMAT,
                    "step": step,
                    "parts": parts,
                    "train": options,
                    "model": asdict(model.config),
                    "extra": extra,
                    "files": {file.name: fingerprint(file) for file in sorted(writing.path.iterdir())},
                }
                (writing.path / STATE).write_text(dumps(state, indent=2), "utf-8")
                if path.exists():  # it has no state.json, so it is damaged, and may contain files of the user
                    path.rename(out / f"{path.name}.damaged-{time.strftime('%Y%m%d-%H%M%S')}")
                writing.publish()
    except OSError as error:
        if writing is not None:
            writing.discard()
        raise OSError(
            f"the checkpoint {path} could not be written ({error.strerror or error}); older ones are untouched"
        ) from error
    finally:
        if writing is not None:
            writing.unlock()
    if is_main:
        for old in steps(out)[:-KEEP]:
            if best is None or old != step_path(out, best):
                old.rename(out / f"{_TEMPORARY}{old.name}")
        sweep(out)
    distributed.barrier()
    return path


def open_checkpoint(path: str | Path) -> Checkpoint:
    """Open a checkpoint and verify its files.

    Size and SHA-256 of every file that is read are compared with state.json, which must list the file. This detects
    damage; it does not authenticate the author.

    Args:
        path: directory of a step, or of a run (`train --out`); a run's newest step is opened.

    Raises:
        CheckpointError: there is no checkpoint, or it is truncated, altered or foreign. The message contains the path
            of the newest intact one.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"checkpoint directory {path} does not exist")
    if (path / STATE).exists():
        return _open(path)
    found = steps(path)
    if not found:
        raise CheckpointError(f"{path} contains no checkpoint")
    try:
        return _open(found[-1])
    except CheckpointError as error:
        raise CheckpointError(f"{error}; {_instead_of(found[-1], found[-2::-1])}") from None


def _instead_of(damaged: Path, older: Sequence[Path]) -> str:
    """Describe how to use an older checkpoint instead of a damaged one."""
    for path in older:
        try:
            _open(path)
        except CheckpointError:
            continue
        return f"{path} is intact; to use it, move {damaged} away, or give {path} to load its model"
    return "no older checkpoint is intact"


def _open(path: Path) -> Checkpoint:
    """Open the checkpoint in a step's directory, verified."""
    try:
        state = read_json(path / STATE)
        parts = parts_of(state)
        check_files(path, state["files"], expected_files(state, parts), STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path / STATE} is not the state of a checkpoint: {error!r}") from None
    try:
        return Checkpoint(
            path=path,
            step=step_of(state, path),
            options=options_of(state),
            model=GPTConfig(**state["model"]),
            extra=dict(state["extra"]),
            parts=parts,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:_LONGEST_REASON]
        raise CheckpointError(f"{path / STATE} is not the state of a checkpoint: {reason}") from None


def step_path(out: Path, step: int) -> Path:
    """Return the path of a step's checkpoint, which need not exist."""
    return out / step_name(step)


def exists(out: Path) -> bool:
    """Return True if a run has saved a checkpoint to its directory."""
    return bool(steps(out))


def sweep(out: Path) -> None:
    """Remove the temporary directories of interrupted saves, and the checkpoints that newer ones replaced."""
    for leftover in out.glob(
        f"{_TEMPORARY}{STEP_PREFIX}*"
    ):  # other temporary directories may exist beside them
        if leftover.is_symlink():
            leftover.unlink()
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def steps(out: Path) -> list[Path]:
    """List the directories of complete checkpoints, the newest last."""
    return sorted(path.parent for path in out.glob(f"{STEP_PREFIX}*/{STATE}"))


def check_weights(model: GPT, name: str | Path) -> None:
    """Raise CheckpointError if a weight of a model on the CPU is NaN or infinite."""
    for key, tensor in model.state_dict().items():
        if not tensor.isfinite().all():
            raise CheckpointError(
                f"the weights of {name} cannot be used: {key} contains NaN or infinity, its training has diverged; "
                "use an older checkpoint"
            )


def _parameters(model: GPT, tied: bool) -> dict[str, Tensor]:
    """Return this process's parameters by name; a tied head is left out, because the embedding is the same."""
    return {n: t for n, t in model.state_dict().items() if not (tied and n == "lm_head.weight")}


def _write_part(folder: Path, tensors: dict[str, dict[str, Tensor]], rank: int, parts: int) -> None:
    """Write this process's rows of model and optimizer; the first process also writes unsharded tensors."""
    from torch.distributed.tensor import DTensor

    for stem, named in tensors.items():
        owned = {n: local(t) for n, t in named.items() if rank == 0 or isinstance(t, DTensor)}
        write_tensors(folder / tensor_files(stem, parts)[rank], owned)
