"""What a run starts from: nothing, a checkpoint that it resumes, or a model whose weights it takes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.load import open_model
from fastgpt.checkpoints.native import Checkpoint, CheckpointError
from fastgpt.distributed import restarted
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer, is_meant
from fastgpt.training.config import ARCHITECTURE, MODEL_FIELDS, TrainConfig, trained_with
from fastgpt.training.directory_lock import check_run_directory, in_use, is_locked
from fastgpt.training.optimizers import learning_rate


def config_from(options: dict[str, Any]) -> TrainConfig:
    """The configuration for the options a user gave; with `resume`, the checkpoint's own where none are
    given. With `init_from`, the architecture of that model. A process that torchrun started again resumes if the
    checkpoint is of the same options: what another run left there, for which the first start ended, is not touched.
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


class Start:
    """The beginning of the run that a configuration describes.

    resumed:   the checkpoint that it goes on from, if any.
    tokenizer: that of the checkpoint or of the model it starts from, if any.
    """

    def __init__(self, config: TrainConfig) -> None:
        """Raises CheckpointError for a directory with a checkpoint that is not to be resumed, for one without that
        is, and for one of another model; ValueError for another tokenizer than that of the model; as `open_model` for
        what the weights are to be taken from.
        """
        self._config = config
        self._weights: GPT | None = None
        self._model = None
        self.tokenizer = None
        self.resumed = _checkpoint_to_resume(config.out) if config.resume else None
        if self.resumed is not None:
            self._model, self.tokenizer = self.resumed.model, self.resumed.load_tokenizer()
            _check_model_fields(config, self.resumed, self.tokenizer)
        elif checkpoint.exists(Path(config.out)):
            raise CheckpointError(
                f"{config.out} holds a checkpoint: pass --resume to go on, or another --out to start anew"
            )
        elif config.init_from:
            self._weights, self.tokenizer = open_model(config.init_from)
            self._model = self._weights.config
            if not is_meant(self.tokenizer, config.tokenizer):
                raise ValueError(
                    f"--tokenizer {config.tokenizer} would be another than that of {config.init_from}, whose tokens "
                    "the model knows: omit --tokenizer, or start without --init-from"
                )

    @property
    def loaded(self) -> Path | None:
        """Where the weights are from, if they are not new."""
        if self.resumed is not None:
            return self.resumed.path
        return Path(self._config.init_from) if self._config.init_from else None

    def make_model(self, vocab_size: int) -> GPT:
        """The model on the CPU, with new weights or those it starts from; `vocab_size` is a new one's.

        Raises ValueError for options that are not those of the model it starts from.
        """
        config, start = self._config, self._model
        wanted = config.model(start.vocab_size if start else vocab_size)
        if start is not None:
            for name in ARCHITECTURE:
                ours, theirs = getattr(wanted, name), getattr(start, name)
                if ours != theirs:
                    raise ValueError(f"{name} is {theirs!r} in the model to start from, not {ours!r}")
            if start.position == "learned" and wanted.block_size > start.block_size:
                raise ValueError(
                    f"block_size={wanted.block_size} is too long: {start.block_size} positions were learned"
                )
            longest = max(wanted.block_size, start.block_size)
            wanted = replace(start, dropout=wanted.dropout, block_size=longest)
        torch.manual_seed(config.seed)
        model = GPT(wanted)
        if self._weights is not None:
            model.load_state_dict(self._weights.state_dict())
        model.checkpoint_activations = config.checkpoint_activations
        return model


def _checkpoint_to_resume(out: str) -> Checkpoint:
    try:
        return checkpoint.open_checkpoint(out)
    except CheckpointError as error:
        found = checkpoint.exists(Path(out))
        problem = f"cannot go on from {out}" if found else "has nothing to go on from"
        raise CheckpointError(f"--resume {problem}: {error}") from None


# Options that a resumed run may change, with what the steps that follow then differ in from those of an unbroken run.
_BATCHES = ("batch_size", "grad_accum", "packing", "seed", "task", "text_key", "skip_broken")
_SCHEDULE = ("max_steps", "lr", "min_lr", "warmup_steps", "schedule", "decay_steps")
_UPDATES = (
    *("optimizer", "weight_decay", "beta1", "beta2", "grad_clip"),
    *("dropout", "label_smoothing", "z_loss", "dtype"),
)


def changes(config: TrainConfig, resumed: Checkpoint) -> list[str]:
    """A note for each way in which a resumed run differs from the one that saved the checkpoint."""
    before, step, notes = trained_with(resumed), resumed.step, []

    def changed(names: Sequence[str]) -> str:
        pairs = ((name, getattr(before, name), getattr(config, name)) for name in names)
        return ", ".join(f"{name} {old} -> {new}" for name, old, new in pairs if old != new)

    if found := changed(_BATCHES):
        notes.append(f"{found}: the batches are not those that the run would have gone on with")
    if config.max_steps <= step:
        notes.append(
            f"max_steps {config.max_steps} is reached at step {step}: nothing is left to train; raise --max-steps"
        )
    elif found := changed(_SCHEDULE):
        old, new = learning_rate(step, before), learning_rate(step, config)
        rate = f"from {old:.2e} to {new:.2e} at step {step}" if old != new else f"after step {step}"
        notes.append(f"{found}: the learning rate changes {rate}")
    if found := changed(_UPDATES):
        notes.append(f"{found}: the steps are not those that the run would have gone on with")
    return notes


def check_same_data(config: TrainConfig, resumed: Checkpoint, digest: str) -> None:
    """Raise CheckpointError for data that a checkpoint names and was not trained on: it may be from anybody, and what a
    run learns can be read in its weights and its sample.
    """
    if resumed.extra.get("data") != digest:
        raise CheckpointError(
            f"{resumed.path} was not trained on {config.data}, which it names as its data: "
            "give --data to train on that or on other data"
        )


def _check_model_fields(config: TrainConfig, resumed: Checkpoint, tokenizer: Tokenizer) -> None:
    for name in MODEL_FIELDS:
        wanted, saved = getattr(config, name), getattr(trained_with(resumed), name)
        if wanted != saved and not (name == "tokenizer" and is_meant(tokenizer, wanted)):
            raise CheckpointError(
                f"--resume cannot change the model: {name} is {saved!r} in {resumed.path}, not {wanted!r}"
            )
    ours, theirs = config.optimizer, trained_with(resumed).optimizer
    if ours != theirs and "muon" in (ours, theirs):  # Adam and AdamW have the same state
        raise CheckpointError(
            f"--resume cannot change the optimizer: {resumed.path} holds the state of {theirs}, not of {ours}"
        )
