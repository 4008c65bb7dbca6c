"""The training loop: accumulation, autocast, schedules, checkpoints, resumption, on one process or many.

A step is a pure function of the state before it: its batches and its random numbers follow from (seed, step). So a
run that was killed and resumed has the losses of one that was not, and on any number of processes those of one
process, but for rounding, and for dropout, which each process draws for its own rows.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgpt.backends import kernels_off, use_backend
from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.native import Checkpoint, CheckpointError
from fastgpt.console import Progress, show
from fastgpt.data import Batch
from fastgpt.data.report import left_out_lines
from fastgpt.device import peak_flops, resolve_device, resolve_dtype
from fastgpt.distributed import Processes
from fastgpt.malloc import keep_heap
from fastgpt.options import check_types
from fastgpt.training.config import TrainConfig
from fastgpt.training.datasets import check_source, open_material
from fastgpt.training.directory_lock import DirectoryLock
from fastgpt.training.divergence import are_numbers, diverged
from fastgpt.training.initialize import Start, changes, check_same_data
from fastgpt.training.optimizers import learning_rate, make_optimizers
from fastgpt.training.run_directory import Papers
from fastgpt.training.signals import StopSignal

_SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands at its end: val_loss (the last one, if any) and unigram_entropy in nats a token."""

    step: int
    val_loss: float | None
    unigram_entropy: float
    finished: bool


def train(config: TrainConfig, *, same_data: bool = False) -> TrainResult:
    """Train as the configuration says, from the start or from the newest checkpoint in `config.out`.

    Prints its progress, writes checkpoints and its papers (`fastgpt.training.run_directory`) to `config.out`, which no
    other run can write to meanwhile. SIGINT, SIGTERM, SIGHUP and a reader of its output that goes away (`| head`) save
    and end the run (`finished` is false then). Started by torchrun, each process takes its share.

    With `same_data` a resumed run refuses data that the checkpoint was not trained on, which its files may name.

    Raises ValueError for options, data or checkpoints that do not go together, OSError for what cannot be
    read or written, FloatingPointError if the loss stops being a number, ProcessLostError if another process is gone.
    """
    processes = Processes.meet(resolve_device(config.device), config.parallel)
    try:
        with use_backend(config.backend), processes.together():
            with processes.agreeing():
                check_source(config, processes.world)  # before the lock makes a directory
                lock = DirectoryLock(Path(config.out), _warn) if processes.first else None
            try:
                run = Run(config, processes, same_data)
                try:
                    return run.go()
                finally:
                    run.close()
            finally:
                if lock is not None:
                    lock.release()
    finally:
        processes.close()


def _warn(text: str) -> None:
    show(f"fastgpt: warning: {text}", file=sys.stderr)


@dataclass
class _Validation:
    """The validation losses so far: the last, the best, and how many have come since that."""

    step: int = -1
    loss: float = math.inf
    best_step: int = -1
    best_loss: float = math.inf
    since_best: int = 0

    def add(self, step: int, loss: float) -> None:
        self.step, self.loss, self.since_best = step, loss, self.since_best + 1
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.since_best = step, loss, 0


class Run:
    """One run of `train`: everything it holds, set up, and the loop over it."""

    def __init__(self, config: TrainConfig, processes: Processes, same_data: bool = False) -> None:
        self.config, self.processes, self.device = config, processes, processes.device
        self.out = Path(config.out)
        self.rows = processes.share(config.batch_size)
        self.dtype = resolve_dtype(config.dtype, self.device)
        heap_kept = keep_heap()
        with processes.agreeing():  # one of them may read from another disk
            start = Start(config)
            self.material = open_material(config, start.tokenizer)
            if same_data and start.resumed is not None:
                check_same_data(config, start.resumed, self.material.digest)
            self.val_batches = self.material.val.even(config.eval_batches, self.rows)
            self.model = start.make_model(self.material.tokenizer.vocab_size).to(self.device)
        self.forward = self._wrap()
        self.optimizers = make_optimizers(self.model, config)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
        self.step, self.validation = 0, _Validation()
        self.loaded = start.loaded
        self.stop, self.stopped = StopSignal(), False
        self.deadline, self.late = math.inf, False
        if start.resumed is not None:
            self._restore(start.resumed)
        self.first_step = self.step
        self.peak = peak_flops(self.device, self.dtype)
        bar = {"total": config.max_steps, "initial": self.step, "unit": "step", "dynamic_ncols": True}
        self.progress = Progress(shown=processes.first, reader_gone=self.stop.set, **bar)
        try:
            with processes.agreeing():
                resumed_at = self.step if config.resume else None
                warn = self.progress.warn_once
                self.papers = Papers(config, resumed_at, warn) if processes.first else None
        except BaseException:
            self.progress.close()
            raise
        self._introduce(heap_kept, start.resumed)
        self._restart_clock()

    def _wrap(self) -> nn.Module:
        """The model, compiled, in what exchanges its gradients."""
        if self.config.compile:  # FSDP2 gathers a block's parameters before it runs: a block is a graph then
            for module in self.model.h if self.processes.sharded else [self.model]:
                module.compile()
        return self.processes.wrap(self.model)

    def _restore(self, resumed: Checkpoint) -> None:
        self.step = resumed.step
        resumed.load_weights(self.model)
        resumed.load_training(self.model, self.optimizers)
        try:
            found = resumed.extra["validation"].items()
            self.validation = _Validation(**{name: value for name, value in found if value is not None})
            check_types(self.validation)
            if resumed.extra["scaler"]:
                self.scaler.load_state_dict(resumed.extra["scaler"])
        except (ValueError, TypeError, KeyError, AttributeError, RuntimeError) as error:
            raise CheckpointError(f"the state in {resumed.path} is not that of a run: {error!r}") from None

    def _introduce(self, heap_kept: bool, resumed: Checkpoint | None) -> None:
        config, material, heap = self.config, self.material, ", heap kept" if heap_kept else ""
        self.say(f"data: {material.name}; {material.size}, vocabulary of {material.tokenizer.vocab_size:,}")
        for line in left_out_lines(material.left_out):
            self.say(f"data: {line}")
        self.say(
            f"model: {self.model.num_parameters():,} parameters; {config.n_layer} layers, "
            f"{config.n_head} heads, {config.n_embd} wide, context {config.block_size}"
        )
        dtype = str(self.dtype).removeprefix("torch.")
        self.say(
            f"machine: {self.processes}, {dtype}, backend {config.backend}, "
            f"GEMM peak {self.peak / 1e9:,.0f} GFLOP/s{heap}"
        )
        if off := kernels_off(self.device):
            self.say(f"note: {off}")
        if resumed is not None:
            self.say(f"resumed at step {self.step}")
            for note in changes(config, resumed):
                self.say(f"note: {note}")
            if resumed.extra.get("data") != material.digest:
                self.say("note: the training text is not the one this checkpoint was trained on")

    def go(self) -> TrainResult:
        """Loop to the end of the schedule, of the time, of patience, or to a signal."""
        config, validation = self.config, self.validation
        self.deadline = time.perf_counter() + 60 * (config.max_minutes or math.inf)
        if validation.step < 0:
            self.evaluate()
            if config.patience is not None:  # it may be the best there will be
                self.save(torch.zeros(()))
        with self.stop:
            while self.step < config.max_steps and not self.stopped and not self.late and not self.impatient:
                self.advance()
        self.progress.close()
        if self.stopped:
            self.say(f"stopped at step {self.step}: saved; pass --resume to go on")
            return TrainResult(self.step, self.val_loss, self.material.entropy, finished=False)
        if self.impatient:
            best_path = checkpoint.step_path(self.out, validation.best_step)
            self.say(
                f"stopped early at step {self.step}: no better validation loss in {validation.since_best} evaluations; "
                f"the best, {validation.best_loss:.4f}, {'is' if best_path.exists() else 'was'} {best_path}"
            )
        return self.finish()

    def advance(self) -> None:
        """One step, and whatever is due behind it: reports, validation, a checkpoint, a look at clock and signals."""
        config = self.config
        loss = self.update()
        self.step += 1
        self.progress.advance()
        last = self.step == config.max_steps
        if self.step == self.first_step + 1:  # the loss of the weights as they were loaded
            self._finite(loss)
        if self.step % config.log_every == 0 or last:
            self.report(loss)
        if self.step % config.eval_every == 0 or last:
            self.evaluate()
        late = time.perf_counter() > self.deadline
        self.stopped, self.late = self.agree(self.stop.received and not last, late)
        best = config.patience is not None and self.validation.best_step == self.step
        ends = last or self.stopped or self.late or self.impatient
        if self.step % config.save_every == 0 or ends or best:
            self.save(loss)

    def update(self) -> Tensor:
        """One optimizer step; returns this process's part of the mean training loss, a scalar on the device."""
        config = self.config
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.step, config)
        torch.manual_seed(_step_seed(config.seed, self.step, self.processes.rank))
        numbers = range(self.step * config.grad_accum, (self.step + 1) * config.grad_accum)
        batches = [self.material.train.batch(number, self.rows) for number in numbers]
        (counted,) = self.processes.total(sum(batch.counted for batch in batches))
        total = torch.zeros((), device=self.device)
        for batch in batches:
            with self.processes.accumulating(self.forward, last=batch is batches[-1]):
                loss = self.loss_sum(batch, config.label_smoothing, config.z_loss) / max(1, counted)
                # The exchange takes the mean of the processes' gradients; their losses are parts of one sum.
                self.scaler.scale(loss * self.processes.world).backward()
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
        """Whether float16 overflowed in the gradients of any optimizer; then none takes the step."""
        if not self.scaler.is_enabled():
            return False
        found = [self.scaler._found_inf_per_device(optimizer) for optimizer in self.optimizers]
        (count,) = self.processes.total(sum(flag.item() for flags in found for flag in flags.values()))
        return count > 0

    def loss_sum(self, batch: Batch, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
        """The sum of the losses of a batch's targets, computed in the dtype of the run."""
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
        """Print and record the loss on the held-out text."""
        self.model.eval()
        # The only place to wait for a GPU.
        losses = torch.stack([self.loss_sum(b).double() for b in self.val_batches]).sum().item()
        losses, counted = self.processes.total(losses, sum(batch.counted for batch in self.val_batches))
        usable = math.isfinite(losses) and not self.processes.sharded
        measured = self.material.measure(self.model) if usable else {}
        self.model.train()
        self.record(val_loss=losses / counted, **measured)
        self._check_finite("validation loss", losses / counted)
        self.validation.add(self.step, losses / counted)
        self.say(f"step {self.step}: val loss {self.validation.loss:.4f} ({self.unigram})")
        if measured:
            found = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
            self.say(f"step {self.step}: {found}")
        if self.device.type == "cpu":  # which may have been busy before
            self.peak = max(self.peak, peak_flops(self.device, self.dtype))
        self._restart_clock()

    def report(self, loss: Tensor) -> None:
        """Print and record the training loss and the speed since the last report."""
        config, value, rate = self.config, self._finite(loss), learning_rate(self.step - 1, self.config)
        tokens = (self.step - self._marked_step) * config.batch_size * config.grad_accum * config.block_size
        speed = tokens / (time.perf_counter() - self._mark)
        share = speed * self.model.flops_per_token() / (self.peak * self.processes.world)
        self.record(train_loss=value, lr=rate, tokens_per_second=round(speed))
        self.progress.note(f"loss {value:.3f}, {speed:,.0f} tokens/s, {share:.0%} of the GEMM peak")
        self.say(
            f"step {self.step}/{config.max_steps}  train loss {value:.4f}  lr {rate:.2e}  "
            f"{speed:,.0f} tokens/s  {share:.0%} of the GEMM peak"
        )
        self._restart_clock()

    def save(self, loss: Tensor) -> None:
        """Write a checkpoint of this step, and the picture of the run so far.

        Raises FloatingPointError for weights that cannot be used, which would replace an older checkpoint.
        """
        self._finite(loss)
        self._check_weights()
        if self.papers is not None:
            self.papers.log.sync()
        validation, scaler = asdict(self.validation), self.scaler.state_dict()
        checkpoint.save(
            self.out,
            self.step,
            self.model,
            self.optimizers,
            self.material.tokenizer,
            self.config.as_dict(),
            {"data": self.material.digest, "validation": validation, "scaler": scaler},
            processes=self.processes,
            best=self.validation.best_step if self.config.patience is not None else None,
        )
        self.draw()
        self._restart_clock()

    def finish(self) -> TrainResult:
        """The last words: validation loss, sample, picture."""
        if self.validation.step != self.step:
            self.evaluate()
        self.draw()
        if self.config.sample_tokens and self.papers is not None:
            with self.papers.optional("the sample"):
                text = self.sample()
                self.say(f"--- sample ---{text}\n--- end of sample ---")
                self.papers.write_sample(text)
        curve = f"; the curve is {self.out / 'loss.png'}" if (self.out / "loss.png").exists() else ""
        loss = f"{self.validation.loss:.4f} nats/token"
        self.say(f"done at step {self.step}: val loss {loss}, {self.unigram}{curve}")
        return TrainResult(self.step, self.val_loss, self.material.entropy, finished=True)

    def sample(self) -> str:
        """What the model writes behind a line break."""
        model, tokenizer = self.model, self.material.tokenizer
        if self.processes.sharded:  # this process has but a part of the model: the whole one is on the disk
            saved = checkpoint.open_checkpoint(checkpoint.step_path(self.out, self.step))
            model = saved.load_model().to(self.device)
        prompt = tokenizer.encode("\n")[None].to(self.device)
        tokens = model.generate(
            prompt,
            self.config.sample_tokens,
            temperature=_SAMPLE_TEMPERATURE,
            seed=self.config.seed,
            num_tokens=tokenizer.vocab_size,
        )
        return tokenizer.decode(tokens[0])

    @property
    def val_loss(self) -> float | None:
        """The last validation loss, if there was one."""
        return None if self.validation.step < 0 else self.validation.loss

    @property
    def impatient(self) -> bool:
        """Whether the validation loss has not become better for as long as the run is to wait."""
        return self.config.patience is not None and self.validation.since_best >= self.config.patience

    @property
    def unigram(self) -> str:
        """The loss of the best model without context, with its name."""
        unit = "byte" if self.material.tokenizer.name == "bytes" else "token"
        return f"{unit}-unigram entropy of the same text {self.material.entropy:.4f} nats/token"

    def agree(self, *flags: object) -> list[bool]:
        """For each flag whether any process raises it."""
        return [raised > 0 for raised in self.processes.total(*(float(bool(flag)) for flag in flags))]

    def record(self, **values: float) -> None:
        """Have the values of this step on record."""
        if self.papers is not None:
            self.papers.record(self.step, **values)

    def draw(self) -> None:
        """Draw the curve of the run so far."""
        if self.papers is not None:
            self.papers.draw(self.material.entropy, self.unigram)

    def say(self, line: str) -> None:
        """Print a line to stdout, past the progress bar."""
        self.progress.line(line)

    def close(self) -> None:
        """Close what is open."""
        self.progress.close()
        if self.papers is not None:
            self.papers.close()

    def _finite(self, loss: Tensor) -> float:
        (value,) = self.processes.total(loss.item())
        self._check_finite("training loss", value)
        return value

    def _check_finite(self, name: str, value: float) -> None:
        """Raise FloatingPointError for a loss that is no number."""
        if math.isfinite(value):
            return
        measured_at = self.step - (name == "training loss")  # that of a step is of the weights before it
        loaded = self.loaded if measured_at == self.first_step else None
        raise FloatingPointError(diverged(name, value, self.step, checkpoint.steps(self.out), loaded))

    @torch.no_grad()
    def _check_weights(self) -> None:
        """Raise FloatingPointError unless weights and optimizer are numbers, and give a loss that is one."""
        odd, loss = float(not are_numbers(self.model, self.optimizers)), 0.0
        if self.validation.step != self.step:
            self.model.eval()
            loss = self.loss_sum(self.val_batches[0]).item()
            self.model.train()
        odd, loss = self.processes.total(odd, loss)
        self._check_finite("validation loss", math.nan if odd else loss)

    def _restart_clock(self) -> None:
        self._mark, self._marked_step = time.perf_counter(), self.step


def _step_seed(seed: int, step: int, rank: int) -> int:
    """Where torch's generators stand at the beginning of a step."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{step}/{rank}".encode()).digest()[:8], "little")
