"""Initialize a run: from scratch, from the checkpoint that it resumes, or from the weights of a model."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.load import open_model
from fastgpt.checkpoints.native import Checkpoint, CheckpointError
from fastgpt.distributed import restarted
from fastgpt.gpt_config import GPTConfig
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer, matches_option
from fastgpt.training.config import ARCHITECTURE, MODEL_FIELDS, TrainConfig, trained_with
from fastgpt.training.directory_lock import check_run_directory, in_use, is_locked
from fastgpt.training.optimizers import learning_rate


def config_from(options: dict[str, Any]) -> TrainConfig:
    """Build the configuration for the options that a user gave.

    With `resume`, the checkpoint's options are the defaults; with `init_from`, the architecture of that model. A
    process that torchrun restarted resumes if the checkpoint has the same options.
    """
    config = TrainConfig()
    out = str(options.get("out", config.out))
    if options.get("resume"):
        check_run_directory(Path(out))
        try:
            config = trained_with(_checkpoint_to_resume(out)).override({"out": out})
        except CheckpointError:
            if (
                is_locked(Path(out)) and os.environ.get("RANK", "0") == "0"
            ):  # it may have been read while it changed
                raise FileExistsError(in_use(Path(out))) from None
            raise
    elif options.get("init_from"):
        start = open_model(str(options["init_from"]))[0].config
        config = config.override({name: getattr(start, name) for name in (*ARCHITECTURE, "block_size")})
    config = config.override(options)
    if not config.resume and restarted() and checkpoint.exists(Path(out)):
        saved = trained_with(_checkpoint_to_resume(out))
        resumed = replace(config, resume=True)
        return resumed if replace(saved, resume=True) == resumed else config
    return config


@dataclass(frozen=True)
class Initialization:
    """The initial state of a run.

    Attributes:
        config: of the run.
        resumed: the checkpoint that the run resumes, if any.
        tokenizer: that of the checkpoint or model, if any.
        architecture: that of the checkpoint or model, if any.
        weights: of the model that the run starts from, if any.
    """

    config: TrainConfig
    resumed: Checkpoint | None = None
    tokenizer: Tokenizer | None = None
    architecture: GPTConfig | None = None
    weights: dict[str, Tensor] | None = None

    @property
    def loaded_from(self) -> Path | None:
        """The path of the weights, if they are not new."""
        if self.resumed is not None:
            return self.resumed.path
        return Path(self.config.init_from) if self.config.init_from else None

    def make_model(self, vocab_size: int) -> GPT:
        """Make the model on the CPU, with new weights or those of the model that the run starts from.

        Args:
            vocab_size: of a new model.

        Raises:
            ValueError: an option differs from the model that the run starts from.
        """
        config, start = self.config, self.architecture
        wanted = config.model(start.vocab_size if start else vocab_size)
        if start is not None:
            for name in ARCHITECTURE:
                ours, theirs = getattr(wanted, name), getattr(start, name)
                if ours != theirs:
                    raise ValueError(f"{name} is {theirs!r} in the model to start from, not {ours!r}")
            if start.position == "learned" and wanted.block_size > start.block_size:
                raise ValueError(
                    f"block_size={wanted.block_size} is too long: the model has {start.block_size} learned positions"
                )
            longest = max(wanted.block_size, start.block_size)
            wanted = replace(start, dropout=wanted.dropout, block_size=longest)
        torch.manual_seed(config.seed)
        model = GPT(wanted)
        if self.weights is not None:
            model.load_state_dict(self.weights)
        model.checkpoint_activations = config.checkpoint_activations
        return model


def initialize(config: TrainConfig) -> Initialization:
    """Find the initial state of a run.

    Raises:
        CheckpointError: the directory has a checkpoint and `resume` is false, or has none and it is true, or the
            checkpoint is of another model.
        ValueError: the tokenizer differs from that of the model, or `init_from` cannot be opened.
        OSError: a file cannot be read.
    """
    if config.resume:
        return _resume(config)
    if checkpoint.exists(Path(config.out)):
        raise CheckpointError(
            f"{config.out} holds a checkpoint: pass --resume to continue it, or another --out to start from scratch"
        )
    return _from_model(config, config.init_from) if config.init_from else Initialization(config)


def _resume(config: TrainConfig) -> Initialization:
    resumed = _checkpoint_to_resume(config.out)
    tokenizer = resumed.load_tokenizer()
    _check_model_fields(config, resumed, tokenizer)
    return Initialization(config, resumed, tokenizer, resumed.model)


def _from_model(config: TrainConfig, source: str) -> Initialization:
    model, tokenizer = open_model(source)
    if not matches_option(tokenizer, config.tokenizer):
        raise ValueError(
            f"--tokenizer {config.tokenizer} differs from the tokenizer of {source}. "
            "Omit --tokenizer, or drop --init-from"
        )
    return Initialization(config, None, tokenizer, model.config, model.state_dict())


def _checkpoint_to_resume(out: str) -> Checkpoint:
    try:
        return checkpoint.open_checkpoint(out)
    except CheckpointError as error:
        found = checkpoint.exists(Path(out))
        problem = f"cannot continue {out}" if found else "found nothing to continue"
        raise CheckpointError(f"--resume {problem}: {error}") from None


# Options that a resumed run may change; they change the batches, the learning rate, or the updates of later steps.
_BATCHES = ("batch_size", "grad_accum", "packing", "seed", "task", "text_key", "skip_broken")
_SCHEDULE = ("max_steps", "lr", "min_lr", "warmup_steps", "schedule", "decay_steps")
_UPDATES = (
    *("optimizer", "weight_decay", "beta1", "beta2", "grad_clip"),
    *("dropout", "label_smoothing", "z_loss", "dtype"),
)


def changes(config: TrainConfig, resumed: Checkpoint) -> list[str]:
    """Describe how a resumed run differs from the one that saved the checkpoint, a line for each kind of option."""
    before, step, notes = trained_with(resumed), resumed.step, []

    def changed(names: Sequence[str]) -> str:
        pairs = ((name, getattr(before, name), getattr(config, name)) for name in names)
        return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)

    if found := changed(_BATCHES):
        notes.append(f"{found}: later batches differ from those of the uninterrupted run")
    if config.max_steps <= step:
        notes.append(
            f"max_steps {config.max_steps} is reached at step {step}: nothing is left to train; raise --max-steps"
        )
    elif found := changed(_SCHEDULE):
        old, new = learning_rate(step, before), learning_rate(step, config)
        rate = f"from {old:.2e} to {new:.2e} at step {step}" if old != new else f"after step {step}"
        notes.append(f"{found}: the learning rate changes {rate}")
    if found := changed(_UPDATES):
        notes.append(f"{found}: later updates differ from those of the uninterrupted run")
    return notes


def check_same_data(config: TrainConfig, resumed: Checkpoint, digest: str) -> None:
    """Raise CheckpointError if a checkpoint was not trained on the data of the configuration.

    A checkpoint may be from anybody and names its data. It must not choose which file of the user is read: weights and
    sample of a run show what it was trained on.
    """
    if resumed.extra.get("data") != digest:
        raise CheckpointError(
            f"{resumed.path} was not trained on the text that {config.data} holds now. To go on, pass --data with the "
            f"text of the run. To train its model on another text: --init-from {config.out} --out NEW"
        )


def _check_model_fields(config: TrainConfig, resumed: Checkpoint, tokenizer: Tokenizer) -> None:
    for name in MODEL_FIELDS:
        wanted, saved = getattr(config, name), getattr(trained_with(resumed), name)
        if wanted != saved and not (name == "tokenizer" and matches_option(tokenizer, wanted)):
            raise CheckpointError(
                f"--resume cannot change the model: {name} is {saved!r} in {resumed.path}, not {wanted!r}"
            )
    ours, theirs = config.optimizer, trained_with(resumed).optimizer
    if ours != theirs and "muon" in (ours, theirs):  # Adam and AdamW have the same state
        raise CheckpointError(
            f"--resume cannot change the optimizer: {resumed.path} holds the state of {theirs}, not of {ours}"
        )
