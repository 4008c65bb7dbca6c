"""The training loop: AdamW, warm-up and cosine, accumulation, autocast, checkpoints, resumption.

A step is a pure function of the state before it: its batches follow from (seed, step), the random generators
are part of a checkpoint. So a run that was killed and resumed has the losses of one that was not.
"""

from __future__ import annotations

import hashlib
import math
import signal
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from fastgpt import checkpoint, data
from fastgpt.backends import use_backend
from fastgpt.checkpoint import Checkpoint, CheckpointError
from fastgpt.config import MODEL_FIELDS, TrainConfig, resolve_device, resolve_dtype
from fastgpt.heap import keep_heap
from fastgpt.model import GPT
from fastgpt.plot import loss_curve
from fastgpt.runlog import RunLog
from fastgpt.tokenizer import make_tokenizer

_SAMPLE_TEMPERATURE = 0.8


@dataclass(frozen=True)
class TrainResult:
    """Where a run stands at its end: val_loss (the last one, if any) and unigram_entropy in nats a token."""

    step: int
    val_loss: float | None
    unigram_entropy: float
    finished: bool


def train(config: TrainConfig) -> TrainResult:
    """Train as the configuration says, from the start or from the newest checkpoint in `config.out`.

    Prints its progress, writes checkpoints, log.jsonl and loss.png to `config.out`. SIGINT and SIGTERM save
    and end the run (`finished` is false then).

    Raises ValueError for options, data or checkpoints that do not go together, OSError for what cannot be
    read or written, FloatingPointError if the loss stops being a number.
    """
    with use_backend(config.backend):
        run = _Run(config)
        try:
            return run.go()
        finally:
            run.close()


def config_from(options: dict[str, Any]) -> TrainConfig:
    """The configuration for the options a user gave; with `resume`, the checkpoint's own where none are
    given.
    """
    config = TrainConfig()
    if options.get("resume"):
        out = str(options.get("out", config.out))
        config = _checkpoint_to_resume(out).train.override({"out": out})
    return config.override(options)


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, …: linear warm-up to lr, then a cosine down to min_lr at max_steps.

    The cosine is one period of SGDR (Loshchilov & Hutter 2017).
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    cosine = math.cos(math.pi * min(1.0, done))
    return config.min_lr + 0.5 * (config.lr - config.min_lr) * (1 + cosine)


def make_optimizer(model: GPT, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019), one fused pass; decay acts on matrices, not on biases and norms."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), fused=True)


@torch.no_grad()
def gemm_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The operations a second that a square matrix product reaches here: the roof of a training step."""
    n = 1024 if device.type == "cpu" else 8192
    a = torch.ones(n, n, device=device, dtype=dtype)
    best = math.inf
    for _ in range(8):
        start = time.perf_counter()
        (a @ a)[0, 0].item()  # waits for a GPU
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


class _Run:
    """One run of `train`: everything it holds, set up, and the loop over it."""

    def __init__(self, config: TrainConfig) -> None:
        self.config = config
        self.out = Path(config.out)
        resumed = _checkpoint_to_resume(config.out) if config.resume else None
        if resumed is None and checkpoint.exists(self.out):
            raise CheckpointError(
                f"{self.out} holds a checkpoint: pass --resume to go on, or another --out to start anew"
            )
        if resumed is not None:
            _check_model_fields(config, resumed)
        self.device = resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        heap_kept = keep_heap()
        self._load_data(resumed)
        torch.manual_seed(config.seed)
        self.model = GPT(config.model(self.tokenizer.vocab_size)).to(self.device)
        self.optimizer = make_optimizer(self.model, config)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.peak = gemm_peak(self.device, self.dtype)
        self.step = 0
        self.val_loss: float | None = None
        self.best_val_loss = math.inf
        if resumed is not None:
            self.step = resumed.step
            self.best_val_loss = resumed.extra["best_val_loss"]
            resumed.load_weights(self.model)
            resumed.load_training(self.model, self.optimizer)
        self.out.mkdir(parents=True, exist_ok=True)
        self.log = RunLog(self.out / "log.jsonl", resume_at=self.step if resumed is not None else None)
        self.board = _tensorboard(self.out, self.step) if config.tensorboard else None
        self.bar = tqdm(
            total=config.max_steps, initial=self.step, unit="step", disable=None, dynamic_ncols=True
        )
        self._introduce(heap_kept)
        if resumed is not None:
            self.say(f"resumed at step {self.step}")
            if resumed.extra["data"] != self.data_digest:
                self.say("note: the training text is not the one this checkpoint was trained on")

    def _load_data(self, resumed: Checkpoint | None) -> None:
        config = self.config
        corpus = data.load_corpus(config.data)
        if resumed is not None:
            self.tokenizer = resumed.load_tokenizer()
        else:
            self.tokenizer = make_tokenizer(config.tokenizer, corpus.train, config.vocab_size)
        self.train_tokens = self.tokenizer.encode("".join(corpus.train))
        val_tokens = self.tokenizer.encode("".join(corpus.val))
        for part, tokens in (("training", self.train_tokens), ("held-out", val_tokens)):
            if len(tokens) <= config.block_size:
                raise ValueError(
                    f"the {part} text of {corpus.name} is {len(tokens)} tokens long, "
                    f"too short for block_size={config.block_size}"
                )
        self.val_batches = data.even_batches(
            val_tokens, config.eval_batches, batch_size=config.batch_size, block_size=config.block_size
        )
        self.entropy = data.unigram_entropy(val_tokens)
        self.entropy_name = f"{'byte' if self.tokenizer.name == 'bytes' else 'token'}-unigram entropy"
        self.data_digest = hashlib.sha256(self.train_tokens.numpy().tobytes()).hexdigest()
        self.val_size = len(val_tokens)

    def _introduce(self, heap_kept: bool) -> None:
        config, heap = self.config, ", heap kept" if heap_kept else ""
        self.say(
            f"data: {config.data}, {len(self.train_tokens):,} tokens for training, {self.val_size:,} "
            f"held out, vocabulary of {self.tokenizer.vocab_size:,}"
        )
        self.say(
            f"model: {self.model.num_parameters():,} parameters; {config.n_layer} layers, "
            f"{config.n_head} heads, {config.n_embd} wide, context {config.block_size}"
        )
        dtype = str(self.dtype).removeprefix("torch.")
        self.say(
            f"machine: {self.device}, {dtype}, backend {config.backend}, "
            f"GEMM peak {self.peak / 1e9:,.0f} GFLOP/s{heap}"
        )

    def go(self) -> TrainResult:
        """Loop to the end of the schedule, of the time, or to a signal."""
        config = self.config
        started = self._mark = time.perf_counter()
        self._marked_step = self.step
        if self.step == 0:
            self.evaluate()
        interrupted = False
        with _StopSignal() as stop:
            while self.step < config.max_steps:
                loss = self.update()
                self.step += 1
                self.bar.update()
                last = self.step == config.max_steps
                if self.step % config.log_every == 0 or last:
                    self.report(loss)
                if self.step % config.eval_every == 0 or last:
                    self.evaluate()
                out_of_time = config.max_minutes and time.perf_counter() - started > 60 * config.max_minutes
                interrupted = stop.received and not last
                if self.step % config.save_every == 0 or last or out_of_time or interrupted:
                    self.save(loss)
                if out_of_time or interrupted:
                    break
        self.bar.close()
        if interrupted:
            self.say(f"stopped at step {self.step}: saved; pass --resume to go on")
            return TrainResult(self.step, self.val_loss, self.entropy, finished=False)
        return self.finish()

    def update(self) -> Tensor:
        """One optimizer step; returns the mean training loss of its sequences, a scalar on the device."""
        config = self.config
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.step, config)
        total = torch.zeros((), device=self.device)
        for i in range(config.grad_accum):
            x, y = data.batch(
                self.train_tokens,
                self.step * config.grad_accum + i,
                batch_size=config.batch_size,
                block_size=config.block_size,
                seed=config.seed,
            )
            loss = self.loss(x, y) / config.grad_accum
            loss.backward()
            total += loss.detach()
        if config.grad_clip:
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total

    def loss(self, x: Tensor, y: Tensor) -> Tensor:
        """The mean loss of inputs and targets (B, T), in the dtype of the run."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self.forward(x.to(self.device), y.to(self.device))[1]

    @torch.no_grad()
    def evaluate(self) -> None:
        """Print and record the loss on the held-out text."""
        self.model.eval()
        loss = sum(self.loss(x, y).item() for x, y in self.val_batches) / len(self.val_batches)
        self.model.train()
        self.val_loss, self.best_val_loss = loss, min(loss, self.best_val_loss)
        self.log.add(self.step, val_loss=loss)
        if self.board is not None:
            self.board.add_scalar("loss/val", loss, self.step)
        self.say(f"step {self.step}: val loss {loss:.4f} ({self.entropy_name} {self.entropy:.4f} nats/token)")
        self.peak = max(
            self.peak, gemm_peak(self.device, self.dtype)
        )  # the machine may have been busy before
        self._restart_clock()

    def report(self, loss: Tensor) -> None:
        """Print and record the training loss and the speed since the last report."""
        config, value, rate = self.config, self._finite(loss), learning_rate(self.step - 1, self.config)
        tokens = (self.step - self._marked_step) * config.batch_size * config.grad_accum * config.block_size
        speed = tokens / (time.perf_counter() - self._mark)
        share = speed * self.model.flops_per_token() / self.peak
        self.log.add(self.step, train_loss=value, lr=rate, tokens_per_second=round(speed))
        if self.board is not None:
            self.board.add_scalar("loss/train", value, self.step)
            self.board.add_scalar("lr", rate, self.step)
        self.bar.set_postfix_str(f"loss {value:.3f}, {speed:,.0f} tokens/s, {share:.0%} of the GEMM peak")
        self.say(
            f"step {self.step}/{config.max_steps}  train loss {value:.4f}  lr {rate:.2e}  "
            f"{speed:,.0f} tokens/s  {share:.0%} of the GEMM peak"
        )
        self._restart_clock()

    def save(self, loss: Tensor) -> None:
        """Write a checkpoint of this step."""
        self._finite(loss)
        self.log.sync()
        extra = {"best_val_loss": self.best_val_loss, "data": self.data_digest}
        checkpoint.save(self.out, self.step, self.model, self.optimizer, self.tokenizer, self.config, extra)
        self._restart_clock()

    def finish(self) -> TrainResult:
        """The last words: validation loss, sample, picture."""
        val = self.log.curve("val_loss")
        if not val or val[-1][0] != self.step:
            self.evaluate()
            val = self.log.curve("val_loss")
        self.val_loss = val[-1][1]
        picture = self.out / "loss.png"
        loss_curve(picture, self.log.curve("train_loss"), val, self.entropy, self.entropy_name)
        if self.config.sample_tokens:
            prompt = self.tokenizer.encode("\n")[None].to(self.device)
            tokens = self.model.generate(
                prompt, self.config.sample_tokens, temperature=_SAMPLE_TEMPERATURE, seed=self.config.seed
            )
            self.say(f"--- sample ---{self.tokenizer.decode(tokens[0])}\n--- end of sample ---")
        self.say(
            f"done at step {self.step}: val loss {self.val_loss:.4f} nats/token, {self.entropy_name} "
            f"of the same text {self.entropy:.4f}; the curve is {picture}"
        )
        return TrainResult(self.step, self.val_loss, self.entropy, finished=True)

    def say(self, line: str) -> None:
        """Print a line to stdout, past the progress bar."""
        with tqdm.external_write_mode():
            print(line, flush=True)

    def close(self) -> None:
        """Close what is open."""
        self.bar.close()
        self.log.close()
        if self.board is not None:
            self.board.close()

    def _finite(self, loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise FloatingPointError(f"the training loss is {value} at step {self.step}; try a lower --lr")
        return value

    def _restart_clock(self) -> None:
        self._mark, self._marked_step = time.perf_counter(), self.step


class _StopSignal:
    """Turns the first SIGINT or SIGTERM into a flag; the second one acts as it always did."""

    def __init__(self) -> None:
        self.received = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> _StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        self.__exit__()


def _checkpoint_to_resume(out: str) -> Checkpoint:
    try:
        return checkpoint.open_checkpoint(out)
    except CheckpointError as error:
        raise CheckpointError(f"--resume has nothing to go on from: {error}") from None


def _check_model_fields(config: TrainConfig, resumed: Checkpoint) -> None:
    for name in MODEL_FIELDS:
        wanted, saved = getattr(config, name), getattr(resumed.train, name)
        if wanted != saved:
            raise CheckpointError(
                f"--resume cannot change the model: {name} is {saved!r} in {resumed.path}, not {wanted!r}"
            )


def _tensorboard(out: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ValueError("--tensorboard needs the package tensorboard") from None
    return SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
