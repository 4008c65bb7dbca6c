"""Checkpoints that are whole or absent.

    OUT/step-00000100/model.safetensors      the parameters, a tied head once
                      optimizer.safetensors  the optimizers' moments, "<parameter>.<key>"
                      tokenizer.json
                      state.json             step, configurations, size and SHA-256 of the files above

Of a sharded run (FSDP2) each process writes its rows of both, into `model-00001-of-00002.safetensors` and so on
instead; any number of processes reads either kind. Random states are not kept: a step's follow from the seed and its
number. A checkpoint may be from anybody: nothing in it is code, and only what state.json lists is read.

All of it is written into a temporary sibling, flushed to the disk, and takes its name by one rename, which is
atomic: a process killed while it saves, or a full disk, leaves the checkpoint before untouched. What such a
death leaves behind is ignored and swept away by the next save.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastgpt.atomic_io import AtomicDirectory, check_files, fingerprint
from fastgpt.checkpoints.tensor_files import TensorFiles, write_tensors
from fastgpt.distributed import DistributedContext, local
from fastgpt.json_io import dumps, read_json, shown
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import FILE, Tokenizer, load_tokenizer

KEEP = 2  # checkpoints that stay; the others are removed once a newer one is safe
FORMAT = 2  # format 1 had no "parts", and pickles in what a sharded run wrote
_STATE = "state.json"
_PREFIX = "step-"
_TEMPORARY = ".writing-"
_STEMS = ("model", "optimizer")
_OWN = re.compile(r"(model|optimizer)(-\d{5}-of-\d{5})?\.safetensors|tokenizer\.json|state\.json")
_OWN_OF_FORMAT_1 = re.compile(r"(model|optimizer)/(\.metadata|__\d+_\d+\.distcp)")
_MOST_PARTS = 1 << 16
_LONGEST_REASON = 500  # characters: a message may quote a name from the file


class CheckpointError(ValueError):
    """There is no checkpoint, or it is not whole, or it is of another kind; the message says which."""


class StoredTensors(Protocol):
    """Named tensors on the disk: `TensorFiles`, or `PickledParts` of format 1."""

    shapes: dict[str, tuple[int, ...]]
    dtypes: dict[str, torch.dtype | None]

    def read(self, name: str, like: Tensor | None = None) -> Tensor:
        """One of them; the rows that this process holds of `like`, if that is sharded."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose files have been verified. The tensors are read on demand.

    options: those of the run that saved it; `training.config.trained_with` reads them.
    parts: into how many files model and optimizer are cut each; None of a sharded one of format 1.
    """

    path: Path
    step: int
    options: dict[str, Any]
    model: GPTConfig
    extra: dict[str, Any]
    parts: int | None = 1

    def load_model(self) -> GPT:
        """The model, on the CPU, in training mode. Raises CheckpointError before it is made if it is not that of the
        tensors.
        """
        self._check_weights(self._stored("model"))
        model = GPT(self.model)
        self.load_weights(model)
        return model

    def load_weights(self, model: GPT) -> None:
        """Copy the parameters into `model`, which may be sharded.

        Raises CheckpointError if they are not those of its configuration.
        """
        stored = self._stored("model")
        places = _parameters(model, self.model.tie_head)
        _check_same("model", self.path, stored.shapes, {n: tuple(p.shape) for n, p in places.items()})
        with torch.no_grad():
            for name, place in places.items():
                local(place).copy_(self._read(stored, name, place))

    def load_training(self, model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """Restore the state of the optimizers, so that training goes on bit for bit. One that has not taken a step, at
        the beginning or because float16 overflowed in all of them, has none.

        Raises CheckpointError unless names, shapes and dtypes are those that the optimizers make themselves: their
        fused kernels do not compare them.
        """
        stored = self._stored("optimizer")
        names = {parameter: name for name, parameter in model.named_parameters()}
        expected: dict[str, tuple[int, ...]] = {}
        states: list[tuple[torch.optim.Optimizer, Tensor, dict[str, str]]] = []
        for optimizer in optimizers:
            owned = [p for group in optimizer.param_groups for p in group["params"]]
            keys = _state_keys(optimizer)
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
                    raise CheckpointError(f"{self.path} holds {entry} in {stored.dtypes[entry]}, not {dtype}")
                tensor = self._read(stored, entry, None if counter else parameter)
                if counter and not 0 <= tensor.item() < 1 << 53:
                    raise CheckpointError(f"{self.path} says that {entry} is {tensor.item()}")
                tensor = tensor.to(parameter.device)
                optimizer.state[parameter][key] = tensor if counter else _sharded_like(tensor, parameter)

    def load_tokenizer(self) -> Tokenizer:
        """The tokenizer that the model was trained with."""
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
            return TensorFiles([self.path / name for name in _file_names(stem, self.parts)])
        except ValueError as error:
            raise CheckpointError(str(error)) from None

    def _read(self, stored: StoredTensors, name: str, like: Tensor | None) -> Tensor:
        try:
            return stored.read(name, like)
        except ValueError as error:
            raise CheckpointError(str(error)) from None


def parameter_shapes(config: GPTConfig, tensors: int, source: Path) -> dict[str, tuple[int, ...]]:
    """The shapes of the parameters of GPT(config) by name, without making it.

    Raises CheckpointError for one of more layers than there are tensors in `source`, which would take for ever.
    """
    if config.n_layer > tensors:
        raise CheckpointError(
            f"{source} holds {tensors} tensors, which are not those of a model of {config.n_layer} layers"
        )
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}


def _check_same(
    what: str, path: Path, found: Mapping[str, tuple[int, ...]], wanted: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise CheckpointError unless the tensors of a checkpoint are those of the model or the optimizer."""
    if odd := sorted(found.keys() ^ wanted.keys()):
        verb = "holds" if odd[0] in found else "lacks"
        raise CheckpointError(f"{path} does not fit the {what}: it {verb} {shown(odd[0])}")
    for name, shape in wanted.items():
        if found[name] != shape:
            raise CheckpointError(f"{path} does not fit the {what}: {name} is {found[name]}, not {shape}")


def _state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """The names of what an optimizer keeps of each parameter, as `make_optimizers` makes it."""
    if isinstance(optimizer, torch.optim.Muon):
        return ("momentum_buffer",)
    return ("step", "exp_avg", "exp_avg_sq")


def _sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The rows of a moment that this process holds, as a tensor sharded like the parameter if that is sharded."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(tensor, mesh, placements, shape=parameter.shape, stride=parameter.stride())


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
    """Write OUT/step-…, then remove all but the newest KEEP checkpoints and that of step `best`; return its path.

    All processes of a run call this. The main one writes, or all do where the model is sharded. A step that has been
    saved already is left as it is.

    Args:
        options: of the run; `training.config.trained_with` reads them.
        extra: further state, anything that JSON can hold.

    Raises:
        OSError: it cannot be written, for example to a full disk. Nothing of it remains then, and older checkpoints
            are untouched.
    """
    path = step_path(out, step)
    distributed = distributed or DistributedContext()
    first = distributed.is_main
    if distributed.all_reduce_sum(first and (path / _STATE).exists()) != [0]:
        return path
    parts = distributed.world_size if distributed.sharded else 1
    writing: AtomicDirectory | None = None
    try:
        with distributed.raise_on_all_ranks():
            if first:
                sweep(out)
                writing = AtomicDirectory(path, _OWN)
        tensors = {
            "model": _parameters(model, model.config.tie_head),
            "optimizer": dict(_moments(model, optimizers)),
        }
        with distributed.raise_on_all_ranks():
            if first or distributed.sharded:
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
                (writing.path / _STATE).write_text(dumps(state, indent=2), "utf-8")
                if path.exists():  # without a state: it was damaged, and is not ours to remove
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
    if first:
        for old in steps(out)[:-KEEP]:
            if best is None or old != step_path(out, best):
                old.rename(out / f"{_TEMPORARY}{old.name}")
        sweep(out)
    distributed.barrier()
    return path


def open_checkpoint(path: str | Path) -> Checkpoint:
    """The checkpoint at `path`: a step's directory, or what `train --out` was given, and then its newest
    step.

    Every file that will be read is compared with the size and the SHA-256 in state.json, and must be listed there: that
    shows damage, and does not show who wrote it. Raises CheckpointError where there is no checkpoint, or one that is
    truncated, altered or foreign; the message names the newest whole one.
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
        state = read_json(path / _STATE)
        parts = _parts(state)
        check_files(path, state["files"], _expected_files(state, parts), _STATE)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from None
    except (TypeError, KeyError) as error:
        raise CheckpointError(f"{path / _STATE} is not the state of a checkpoint: {error!r}") from None
    try:
        return Checkpoint(
            path=path,
            step=_step(state["step"], path),
            options=_options(state["train"]),
            model=GPTConfig(**state["model"]),
            extra=dict(state["extra"]),
            parts=parts,
        )
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)[:_LONGEST_REASON]
        raise CheckpointError(f"{path / _STATE} is not the state of a checkpoint: {reason}") from None


def _parts(state: dict[str, Any]) -> int | None:
    """Into how many files a checkpoint's tensors are cut; None where a sharded run of format 1 wrote them."""
    if type(state["format"]) is not int or not 1 <= state["format"] <= FORMAT:
        raise ValueError(
            f"{_STATE} has format {shown(state['format'])}, and this version reads 1 and {FORMAT}"
        )
    if state["format"] == 1:
        return None if "model/.metadata" in state["files"] else 1
    parts = state["parts"]
    if type(parts) is not int or not 1 <= parts <= _MOST_PARTS:
        raise ValueError(f"{_STATE} says {shown(parts)} parts")
    return parts


def _options(found: Any) -> dict[str, Any]:
    if not isinstance(found, dict):
        raise ValueError(f"{_STATE} holds {shown(found)} instead of the options of a run")
    return found


def _expected_files(state: dict[str, Any], parts: int | None) -> set[str]:
    """The names that `files` of state.json must list: those that will be read."""
    if parts is None:
        return {FILE, *(name for name in state["files"] if _OWN_OF_FORMAT_1.fullmatch(name))}
    return {FILE, *(name for stem in _STEMS for name in _file_names(stem, parts))}


def _file_names(stem: str, parts: int) -> list[str]:
    if parts == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{part:05d}-of-{parts:05d}.safetensors" for part in range(1, parts + 1)]


def _step(step: Any, path: Path) -> int:
    """The number of the step, which the directory is named for unless it was renamed."""
    if type(step) is not int or not 0 <= step < 1 << 53:
        raise ValueError(f"{_STATE} says that the step is {shown(step)}")
    if re.fullmatch(rf"{_PREFIX}\d{{8,}}", path.name) and path.name != step_path(path.parent, step).name:
        raise ValueError(f"{_STATE} says that it is of step {step}")
    return step


def step_path(out: Path, step: int) -> Path:
    """Where the checkpoint of a step is, or would be."""
    return out / f"{_PREFIX}{step:08d}"


def exists(out: Path) -> bool:
    """Whether `train --out` has saved a checkpoint there."""
    return bool(steps(out))


def sweep(out: Path) -> None:
    """Remove what is no checkpoint, or no longer one: what saves that died left, and what gave way."""
    for leftover in out.glob(f"{_TEMPORARY}{_PREFIX}*"):  # others write there too: a data set, an export
        if leftover.is_symlink():
            leftover.unlink()
        else:
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


def _write_part(folder: Path, tensors: dict[str, dict[str, Tensor]], rank: int, parts: int) -> None:
    """Write what one process holds of model and optimizer; what is not sharded, the first process does."""
    from torch.distributed.tensor import DTensor

    for stem, named in tensors.items():
        kept = {n: local(t) for n, t in named.items() if rank == 0 or isinstance(t, DTensor)}
        write_tensors(folder / _file_names(stem, parts)[rank], kept)
