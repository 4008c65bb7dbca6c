"""The training loop: accumulation, autocast, schedules, checkpoints, resumption, on one process or many.

A step is a pure function of the state before it: its batches and random numbers follow from (seed, step). A run that
was killed and resumed has the losses of one that was not. On any number of processes it has those of one process, up to
rounding and dropout, which each process draws for its own rows.
"""

from __future__ import annotations

import hashlib
import math
import shlex
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgpt import extension
from fastgpt.backends import kernels_off, resolve_backend, use_backend
from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.native import Checkpoint, CheckpointError
from fastgpt.data import Batch
from fastgpt.data.report import left_out_lines
from fastgpt.device import cpu_threads, peak_flops, resolve_device, resolve_dtype
from fastgpt.distributed import DistributedContext
from fastgpt.malloc import keep_freed_memory
from fastgpt.model import GPT
from fastgpt.options import check_types
from fastgpt.training.config import TrainConfig
from fastgpt.training.datasets import check_source, open_training_data
from fastgpt.training.directory_lock import DirectoryLock
from fastgpt.training.divergence import are_numbers, diverged
from fastgpt.training.initialize import changes, check_same_data, initialize
from fastgpt.training.logger import Logger, warn
from fastgpt.training.optimizers import learning_rate, make_optimizers
from fastgpt.training.samples import sample
from fastgpt.training.signals import StopSignal
from fastgpt.training.validation_history import ValidationHistory


@dataclass(frozen=True)
class TrainResult:
    """The end of a run.

    Attributes:
        step: the last step.
        val_loss: the last validation loss, in nats a token; None without one.
        unigram_entropy: the loss of the best model without context on the same text, in nats a token.
        finished: false if a signal ended the run.
    """

    step: int
    val_loss: float | None
    unigram_entropy: float
    finished: bool


def train(config: TrainConfig) -> TrainResult:
    """Train as the configuration says, from scratch or from the newest checkpoint in `config.out`.

    Prints progress, and writes checkpoints and the files of a `RunDirectory` to `config.out`, which is locked against
    other runs. SIGINT, SIGTERM, SIGHUP and a closed stdout (`| head`) save a checkpoint and end the run. Under torchrun
    each process computes its rows of every batch.

    Args:
        config: all options.

    Raises:
        ValueError: options, data or checkpoints contradict each other.
        OSError: a file cannot be read or written.
        FloatingPointError: the loss is NaN or infinite.
        ProcessLostError: another process of the run is gone.
    """
    distributed = DistributedContext.from_env(resolve_device(config.device), config.parallel)
    try:
        resolve_backend(config.backend, distributed.device)  # raises before anything is written
        with use_backend(config.backend), distributed.detecting_lost_processes():
            with distributed.raise_on_all_ranks():
                check_source(config, distributed.world_size)  # before the lock makes a directory
                lock = DirectoryLock(Path(config.out), warn) if distributed.is_main else None
            try:
                trainer = Trainer(config, distributed)
                try:
                    return trainer.train()
                finally:
                    trainer.close()
            finally:
                if lock is not None:
                    lock.release()
    finally:
        distributed.close()


class Trainer:
    """One run of `train`: its model, data, optimizers and state, and the loop over them."""

    def __init__(self, config: TrainConfig, distributed: DistributedContext) -> None:
        self.config, self.distributed, self.device = config, distributed, distributed.device
        self.out = Path(config.out)
        self.rows = distributed.local_rows(config.batch_size)
        self.dtype = resolve_dtype(config.dtype, self.device)
        self.keeps_freed_memory = keep_freed_memory()
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        with distributed.raise_on_all_ranks():  # one of them may read from another disk
            start = initialize(config)
            self.data = open_training_data(config, start.tokenizer)
            if start.resumed is not None:
                check_same_data(config, start.resumed, self.data.digest)
            self.val_batches = self.data.val.validation_batches(config.eval_batches, self.rows)
            self.model = start.make_model(self.data.tokenizer.vocab_size).to(self.device)
        self.forward = self._wrap()
        self.optimizers = make_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.validation = 0, ValidationHistory()
        self.loaded_from = start.loaded_from
        self.stop_signal, self.stopped = StopSignal(), False
        self.deadline, self.late = math.inf, False
        if start.resumed is not None:
            self._restore(start.resumed)
        self.first_step = self.step
        self.peak_flops = peak_flops(self.device, self.dtype)
        with distributed.raise_on_all_ranks():
            options = {"resumed": config.resume, "is_main": distributed.is_main}
            self.logger = Logger(config, self.step, **options, reader_gone=self.stop_signal.set)
        self._describe(start.resumed)

    def _wrap(self) -> nn.Module:
        """Return the model, compiled if configured, with gradients that are reduced over the processes."""
        if self.config.compile:  # FSDP2 gathers a block's parameters before it runs: a block is a graph then
            for module in self.model.h if self.distributed.sharded else [self.model]:
                module.compile()
        return self.distributed.wrap(self.model)

    def _restore(self, resumed: Checkpoint) -> None:
        self.step = resumed.step
        resumed.load_weights(self.model)
        resumed.load_training(self.model, self.optimizers)
        try:
            found = resumed.extra["validation"].items()
            self.validation = ValidationHistory(**{name: value for name, value in found if value is not None})
            check_types(self.validation)
            if resumed.extra["scaler"]:
                self.scaler.load_state_dict(resumed.extra["scaler"])
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"the state in {resumed.path} is not that of a run: {error!r}") from None

    def _describe(self, resumed: Checkpoint | None) -> None:
        """Log data, model and machine, and in what a resumed run differs from the one before."""
        config, data, log = self.config, self.data, self.logger.log
        log(f"data: {data.name}; {data.size}, vocabulary of {data.tokenizer.vocab_size:,}")
        for line in left_out_lines(data.left_out):
            log(f"data: {line}")
        log(f"losses in nats a token; {self.baseline}")
        log(
            f"model: {self.model.num_parameters():,} parameters; {config.n_layer} layers, "
            f"{config.n_head} heads, {config.n_embd} wide, context {config.block_size}"
        )
        dtype = str(self.dtype).removeprefix("torch.")
        backend = f"backend {resolve_backend(config.backend, self.device)}"
        if backend == "backend cpp":
            backend += f" ({extension.variant()})"
        threads = f", {cpu_threads()}" if self.device.type == "cpu" else ""
        kept = ", freed memory kept" if self.keeps_freed_memory else ""
        log(
            f"machine: {self.distributed}{threads}, {dtype}, {backend}, "
            f"matmul peak {self.peak_flops / 1e9:,.0f} GFLOP/s{kept}"
        )
        if off := kernels_off(self.device):
            log(f"warning: {off}")
        if resumed is not None:
            log(f"resumed at step {self.step}")
            for note in changes(config, resumed):
                log(f"note: {note}")

    def train(self) -> TrainResult:
        """Train until max_steps, the time limit, early stopping or a signal."""
        config, validation = self.config, self.validation
        self.deadline = time.perf_counter() + 60 * (config.max_minutes or math.inf)
        if validation.step < 0:
            self.evaluate()
            if config.patience is not None:  # the first validation may stay the best
                self.save_checkpoint(torch.zeros(()))
        with self.stop_signal:
            while self.step < config.max_steps and not (self.stopped or self.late or self.should_stop_early):
                self.train_step()
        self.logger.progress.close()
        if self.stopped:
            self.logger.log(f"stopped at step {self.step}: saved; to go on: {self.resume_command}")
            return TrainResult(self.step, self.val_loss, self.data.entropy, finished=False)
        if self.should_stop_early:
            best_path = checkpoint.step_path(self.out, validation.best_step)
            self.logger.log(
                f"stopped early at step {self.step}: no better validation loss in {validation.since_best} evaluations; "
                f"the best, {validation.best_loss:.4f}, {'is' if best_path.exists() else 'was'} {best_path}"
            )
        return self.finish()

    def train_step(self) -> None:
        """Run one optimizer step, then log, validate and save a checkpoint where they are due."""
        config = self.config
        loss = self.optimizer_step()
        self.step += 1
        self.logger.progress.advance()
        last = self.step == config.max_steps
        if self.step == self.first_step + 1:  # the loss of the weights as they were loaded
            self._check_loss(loss)
        if self.step % config.log_every == 0 or last:
            self.log_step(loss)
        if self.step % config.eval_interval == 0 or last:
            self.evaluate()
        late = time.perf_counter() > self.deadline
        self.stopped, self.late = self._any_rank(self.stop_signal.received and not last, late)
        best = config.patience is not None and self.validation.best_step == self.step
        ends = last or self.stopped or self.late or self.should_stop_early
        if self.step % config.save_every == 0 or ends or best:
            self.save_checkpoint(loss)

    def optimizer_step(self) -> Tensor:
        """Accumulate the gradients of a step and update the parameters.

        Returns:
            This process's part of the mean training loss, a scalar on the device.
        """
        config = self.config
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config)
        torch.manual_seed(_step_seed(config.seed, self.step, self.distributed.rank))
        numbers = range(self.step * config.grad_accum, (self.step + 1) * config.grad_accum)
        batches = [self.data.train.batch(number, self.rows) for number in numbers]
        (num_targets,) = self.distributed.all_reduce_sum(sum(batch.num_targets for batch in batches))
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with self.distributed.accumulating(self.forward, last=batch is batches[-1]):
                loss = self.loss_sum(batch, config.label_smoothing, config.z_loss) / max(1, num_targets)
                # The reduction averages over the processes, whose losses are parts of one sum.
                self.scaler.scale(loss * self.distributed.world_size).backward()
            total += loss.detach()
        for optimizer in self.optimizers if self.scaler.is_enabled() else []:
            self.scaler.unscale_(optimizer)
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        overflowed = self._overflowed()
        for optimizer in self.optimizers:
            if not overflowed:
                self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        return total

    def _overflowed(self) -> bool:
        """Return whether float16 overflowed in the gradients of any optimizer; then none takes the step."""
        if not self.scaler.is_enabled():
            return False
        found = [self.scaler._found_inf_per_device(optimizer) for optimizer in self.optimizers]
        (count,) = self.distributed.all_reduce_sum(
            sum(flag.item() for flags in found for flag in flags.values())
        )
        return count > 0

    def loss_sum(self, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
        """Compute the sum of the losses of a batch's targets, in the dtype of the run."""
        batch = batch.to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return self.forward(
                batch.idx,
                batch.targets,
                cu_seqlens=batch.cu_seqlens,
                reduction="sum",
                label_smoothing=label_smoothing,
                z_loss=z_loss,
            )[1]

    @torch.no_grad()
    def evaluate(self) -> None:
        """Compute, log and record the validation loss."""
        self.model.eval()
        # The only synchronization with a GPU.
        losses = torch.stack([self.loss_sum(b).double() for b in self.val_batches]).sum().item()
        losses, num_targets = self.distributed.all_reduce_sum(
            losses, sum(batch.num_targets for batch in self.val_batches)
        )
        usable = math.isfinite(losses) and not self.distributed.sharded
        measured = self.data.measure(self.model) if usable else {}
        self.model.train()
        loss = losses / num_targets
        self.logger.directory.record(self.step, val_loss=loss, **measured)
        self._check_finite("validation loss", loss)
        self.validation.add(self.step, loss)
        self.logger.log(f"step {self.step}: validation loss {loss:.4f}")
        if measured:
            found = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
            self.logger.log(f"step {self.step}: {found}")
        if self.device.type == "cpu":  # which may have been busy before
            self.peak_flops = max(self.peak_flops, peak_flops(self.device, self.dtype))
        self.logger.restart_clock(self.step)

    def log_step(self, loss: Tensor) -> None:
        """Log and record the training loss, and throughput and MFU since the last time."""
        config, value, rate = self.config, self._check_loss(loss), learning_rate(self.step - 1, self.config)
        speed = self.logger.tokens_per_second(self.step)
        mfu = speed * self.model.flops_per_token() / (self.peak_flops * self.distributed.world_size)
        self.logger.directory.record(self.step, train_loss=value, lr=rate, tokens_per_second=round(speed))
        self.logger.progress.note(f"loss {value:.3f}, {speed:,.0f} tokens/s, MFU {mfu:.0%}")
        self.logger.log(
            f"step {self.step}/{config.max_steps} ({self.step / config.max_steps:.0%})  train loss {value:.4f}  "
            f"lr {rate:.2e}  {speed:,.0f} tokens/s  MFU {mfu:.0%}  {self.logger.times(self.step, self.deadline)}"
        )
        self.logger.restart_clock(self.step)

    def save_checkpoint(self, loss: Tensor) -> None:
        """Write a checkpoint of this step, and draw the loss curve.

        Raises:
            FloatingPointError: the weights are NaN or infinite, and would replace an older checkpoint.
        """
        self._check_loss(loss)
        self._check_weights()
        self.logger.directory.sync()
        validation, scaler = asdict(self.validation), self.scaler.state_dict()
        checkpoint.save(
            self.out,
            self.step,
            self.model,
            self.optimizers,
            self.data.tokenizer,
            self.config.as_dict(),
            {"data": self.data.digest, "validation": validation, "scaler": scaler},
            distributed=self.distributed,
            best=self.validation.best_step if self.config.patience is not None else None,
        )
        self.logger.directory.draw(self.data.entropy, self.baseline)
        self.logger.restart_clock(self.step)

    def finish(self) -> TrainResult:
        """Log the last validation loss and a sample, and draw the loss curve."""
        directory, log = self.logger.directory, self.logger.log
        if self.validation.step != self.step:
            self.evaluate()
        directory.draw(self.data.entropy, self.baseline)
        if self.config.sample_tokens and self.distributed.is_main and self.step > self.first_step:
            with directory.optional("the sample"):
                text = sample(self._whole_model(), self.data, self.config)
                log(f"--- sample ---{text}\n--- end of sample ---")
                directory.write_sample(text)
        curve = f"; the curve is {self.out / 'loss.png'}" if (self.out / "loss.png").exists() else ""
        log(f"done at step {self.step}: validation loss {self.validation.loss:.4f} ({self.baseline}){curve}")
        return TrainResult(self.step, self.val_loss, self.data.entropy, finished=True)

    def _whole_model(self) -> GPT:
        """Return the model; if this process has a part of it, the checkpoint of this step."""
        if not self.distributed.sharded:
            return self.model
        saved = checkpoint.open_checkpoint(checkpoint.step_path(self.out, self.step))
        return saved.load_model().to(self.device)

    @property
    def resume_command(self) -> str:
        """The command that continues this run."""
        return f"fastgpt train --resume --out {shlex.quote(self.config.out)}"

    @property
    def val_loss(self) -> float | None:
        """The last validation loss, if there was one."""
        return None if self.validation.step < 0 else self.validation.loss

    @property
    def should_stop_early(self) -> bool:
        """Whether the validation loss has not improved for `patience` validations."""
        return self.config.patience is not None and self.validation.since_best >= self.config.patience

    @property
    def baseline(self) -> str:
        """The loss of the best model without context: the entropy of the frequencies of tokens."""
        unit = "bytes" if self.data.tokenizer.name == "bytes" else "tokens"
        return f"guessing by the frequency of {unit}: {self.data.entropy:.4f}"

    def close(self) -> None:
        """Close the progress bar and the files of the run."""
        self.logger.close()

    def _any_rank(self, *flags: object) -> list[bool]:
        """Return for each flag whether it is set on any process."""
        return [count > 0 for count in self.distributed.all_reduce_sum(*(float(bool(f)) for f in flags))]

    def _check_loss(self, loss: Tensor) -> float:
        """Return the training loss of all processes. Raises FloatingPointError if it is NaN or infinite."""
        (value,) = self.distributed.all_reduce_sum(loss.item())
        self._check_finite("training loss", value)
        return value

    def _check_finite(self, name: str, value: float) -> None:
        """Raise FloatingPointError for a loss that is NaN or infinite."""
        if math.isfinite(value):
            return
        measured_at = self.step - (name == "training loss")  # that of a step is of the weights before it
        loaded_from = self.loaded_from if measured_at == self.first_step else None
        raise FloatingPointError(diverged(name, value, self.step, checkpoint.steps(self.out), loaded_from))

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Raise FloatingPointError unless weights, optimizer states and loss are finite numbers."""
        odd, loss = float(not are_numbers(self.model, self.optimizers)), 0.0
        if self.validation.step != self.step:
            self.model.eval()
            loss = self.loss_sum(self.val_batches[0]).item()
            self.model.train()
        odd, loss = self.distributed.all_reduce_sum(odd, loss)
        self._check_finite("validation loss", math.nan if odd else loss)


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Compute the seed of torch's generators for a step of one process."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little")
