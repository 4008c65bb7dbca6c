"""Training steps of a model of transformers on this machine: unmodified, compiled, accelerated (`fastgpt bench`).

A step is a forward and a backward. The contenders share one set of weights and take turns, so that a busy machine slows
all of them down. On a CPU with glibc two processes take turns, too: one with malloc as it is by default, and one after
`fastgpt.keep_freed_memory()`, which cannot be undone.
"""

from __future__ import annotations

import copy
import gc
import logging
import multiprocessing
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fastgpt import malloc
from fastgpt.backends import kernels_off, resolve_backend
from fastgpt.console import Progress
from fastgpt.device import (
    DTYPE_NAMES,
    DTYPES,
    cpu_threads,
    peak_flops,
    peak_memory,
    resolve_device,
    resolve_dtype,
)
from fastgpt.integrations.accelerate import accelerate
from fastgpt.options import check_sizes, option

# A class of transformers and options of its configuration. The Llama has the sizes of SmolLM 135M.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", {}),
    "bert": ("BertForMaskedLM", {}),
    "llama": (
        "LlamaForCausalLM",
        {
            **{"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30},
            **{"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        },
    ),
}
UNMODIFIED, COMPILED, ACCELERATED = "unmodified", "torch.compile", "accelerated"

_SETTINGS = {False: "malloc's defaults", True: "fastgpt.keep_freed_memory()"}
_WORTH = 1.05  # the smallest speedup that is called worth it
_FEWEST_ROUNDS = 3
_MASKED = 0.15  # share of the tokens that a masked language model predicts
_CLOSE = 0.01  # largest relative difference of the losses, in 16 bits


@dataclass(frozen=True)
class BenchConfig:
    """Options of `fastgpt bench`."""

    batch_size: int = option(1, "sequences per step")
    length: int = option(256, "tokens per sequence")
    dtype: str = option(
        "auto", "dtype of autocast; auto: bfloat16 if the hardware has it", DTYPES, synonyms=DTYPE_NAMES
    )
    device: str = option("auto", "device: auto (a GPU if there is one), cpu or cuda:N")
    threads: int | None = option(None, "threads of a CPU", described="as PyTorch chooses")
    seconds: float = option(60.0, "time to measure for, after the preparation")
    compile: bool = option(True, "torch.compile as a contender; its compilation takes about a minute")

    def __post_init__(self) -> None:
        check_sizes(self, {"batch_size": 1 << 16, "length": 1 << 20})
        if not 0 < self.seconds <= 86400:
            raise ValueError(f"seconds must be positive and at most 86,400, not {self.seconds}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be at least 1, not {self.threads}")


@dataclass(frozen=True)
class Timing:
    """One contender in one setting of malloc.

    Attributes:
        contender: UNMODIFIED, COMPILED or ACCELERATED.
        kept: whether freed memory was kept.
        milliseconds: the median time of a step.
        speedup: the median over the rounds of the unmodified model's time, with malloc's defaults, over this one.
        memory: peak memory of a step above weights and batch, in bytes; None where it is not measured.
    """

    contender: str
    kept: bool
    milliseconds: float
    speedup: float
    memory: int | None


@dataclass(frozen=True)
class Comparison:
    """Result of `compare`.

    Attributes:
        model: its class and size.
        machine: device, threads, dtype and backend.
        tokens: per step.
        rounds: number of steps of each contender.
        timings: of every contender, first with malloc's defaults.
        losses: of the unmodified and the accelerated model, on the same batch without dropout.
        mfu: model FLOPs utilization of the unmodified model.
        verdict: whether it is worth it here, and why.
    """

    model: str
    machine: str
    tokens: int
    rounds: int
    timings: list[Timing]
    losses: tuple[float, float]
    mfu: float
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Return the results as values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """Format the results."""
        lines = [self.model, self.machine, f"{self.rounds} rounds, forward + backward, medians", ""]
        lines.append(f"{'':<16}{'ms/step':>10}{'tokens/s':>12}{'speedup':>10}{'memory of a step':>20}")
        for kept in dict.fromkeys(timing.kept for timing in self.timings):
            lines.append(f"with {_SETTINGS[kept]}")
            for one in (timing for timing in self.timings if timing.kept == kept):
                speed = self.tokens / one.milliseconds * 1000
                memory = "" if one.memory is None else f"{one.memory / 2**20:,.0f} MiB"
                lines.append(
                    f"  {one.contender:<14}{one.milliseconds:>10,.1f}{speed:>12,.0f}{one.speedup:>9.2f}×{memory:>20}"
                )
        losses = f"losses: {self.losses[0]:.4f} unmodified, {self.losses[1]:.4f} accelerated"
        return "\n".join([*lines, "", losses, self.verdict])


def compare(model: str, config: BenchConfig) -> Comparison:
    """Time training steps of a model with random weights.

    Args:
        model: "gpt2" (124 M parameters), "bert" (110 M), "llama" (135 M), or a directory with the config.json of a
            language model.
        config: the options.

    Raises:
        ValueError: there is no such model, it is no language model, or its losses differ once it is accelerated.
        ImportError: transformers is not installed.
        OSError: a file cannot be read.
        RuntimeError: a process ended, for example for lack of memory.
    """
    device = resolve_device(config.device)
    _config_of(model)  # raises before processes start
    settings = [False, True] if device.type == "cpu" and malloc.is_glibc() else [False]
    bar = Progress(desc="preparing", total=config.seconds, unit="s", bar_format="{desc} {bar} {elapsed}")
    processes: list[_Process] = []
    try:
        for kept in settings:
            processes.append(_Process(model, config, kept))
        facts = processes[0].facts
        times: dict[tuple[bool, str], list[float]] = {}
        began = time.perf_counter()
        while (spent := time.perf_counter() - began) < config.seconds or _fewest(times) < _FEWEST_ROUNDS:
            for process in processes:
                for contender in facts["memory"]:
                    times.setdefault((process.kept, contender), []).append(process.step(contender))
            bar.describe("measuring")
            bar.advance(min(config.seconds, time.perf_counter() - began) - min(config.seconds, spent))
    finally:
        bar.close()
        for process in processes:
            process.close()
    return _comparison(config, device, facts, times)


def _fewest(times: dict[tuple[bool, str], list[float]]) -> int:
    return min(map(len, times.values()), default=0)


def _comparison(
    config: BenchConfig,
    device: torch.device,
    facts: dict[str, Any],
    times: dict[tuple[bool, str], list[float]],
) -> Comparison:
    first = times[False, UNMODIFIED]
    timings = [
        Timing(
            contender,
            kept,
            1000 * statistics.median(seconds),
            statistics.median(a / b for a, b in zip(first, seconds, strict=True)),
            None if kept else facts["memory"][contender],
        )
        for (kept, contender), seconds in sorted(times.items(), key=lambda item: item[0][0])
    ]
    losses = facts["losses"]
    if not abs(losses[0] - losses[1]) <= _CLOSE * abs(losses[0]):
        raise ValueError(
            f"the loss is {losses[0]:.4f} unmodified and {losses[1]:.4f} accelerated; please report this model"
        )
    mfu = facts["flops"] / statistics.median(first) / facts["peak_flops"]
    return Comparison(
        model=facts["model"],
        machine=facts["machine"],
        tokens=config.batch_size * config.length,
        rounds=len(first),
        timings=timings,
        losses=losses,
        mfu=mfu,
        verdict=_verdict(timings, mfu, kernels_off(device)),
    )


def _verdict(timings: list[Timing], mfu: float, off: str) -> str:
    """Say whether accelerating is worth it, and why not."""
    found = {(one.kept, one.contender): one for one in timings}
    ours, before = found[False, ACCELERATED], found[False, UNMODIFIED]
    peers = {one.contender: one.milliseconds for one in timings if not one.kept and one is not ours}
    best = min(peers, key=lambda name: peers[name])
    gain = peers[best] / ours.milliseconds
    text = f"accelerate: {before.milliseconds / ours.milliseconds:.2f} times as fast as unmodified"
    if COMPILED in peers:
        text += f", {peers[COMPILED] / ours.milliseconds:.2f} times as fast as compiled"
    if ours.memory is not None and before.memory:
        text += f", {ours.memory / before.memory:.0%} of the memory"
    if (True, ACCELERATED) in found:
        text += f"; with fastgpt.keep_freed_memory() {found[True, ACCELERATED].speedup:.2f} times as fast as unmodified"
    if gain >= _WORTH:
        return f"worth it here. {text}"
    reason = off or (
        f"{best} runs at {mfu * before.milliseconds / peers[best]:.0%} of this machine's rate of matrix products, "
        "which accelerate leaves to PyTorch"
    )
    return f"not worth it here: {reason}. {text}"


class _Process:
    """A process that takes steps on request."""

    def __init__(self, model: str, config: BenchConfig, kept: bool) -> None:
        self.kept = kept
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, model, config, kept), daemon=True)
        self._process.start()
        theirs.close()
        self.facts: dict[str, Any] = self._answer()

    def step(self, contender: str) -> float:
        """Take a step, and return its time in seconds."""
        self._pipe.send(contender)
        return float(self._answer())

    def _answer(self) -> Any:
        try:
            found = self._pipe.recv()
        except EOFError:
            raise RuntimeError(
                "a process ended; if it ran out of memory, use a smaller --batch-size or --length"
            ) from None
        if isinstance(found, BaseException):
            raise found
        return found

    def close(self) -> None:
        self._pipe.close()  # ends the process, unless it is in a step
        self._process.join(timeout=5)
        self._process.terminate()
        self._process.join()


def _serve(pipe: Connection, model: str, config: BenchConfig, kept: bool) -> None:
    """Send the facts of a `_Bench`, of the one with malloc's defaults, then the time of each step that is requested."""
    warnings.simplefilter("ignore")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        if kept:
            malloc.keep_freed_memory()
        bench = _Bench(model, config)
        bench.warm_up()
        pipe.send({} if kept else bench.facts())
        while True:
            pipe.send(bench.time(pipe.recv()))
    except EOFError:
        return
    except BaseException as error:
        pipe.send(
            error if isinstance(error, (ValueError, OSError, ImportError)) else RuntimeError(repr(error))
        )


class _Bench:
    """The contenders of one process, which share their weights."""

    def __init__(self, model: str, config: BenchConfig) -> None:
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        self.config, self.device = config, resolve_device(config.device)
        self.dtype = resolve_dtype(config.dtype, self.device)
        torch.manual_seed(0)
        self.unmodified = _build(model).to(self.device).train()
        weights = {id(p): p for p in self.unmodified.parameters()}
        self.models: dict[str, Any] = {UNMODIFIED: self.unmodified}
        if config.compile:
            self.models[COMPILED] = torch.compile(
                copy.deepcopy(self.unmodified, dict(weights)), dynamic=False
            )
        self.models[ACCELERATED] = accelerate(copy.deepcopy(self.unmodified, dict(weights))).model
        vocabulary = self.unmodified.get_input_embeddings().num_embeddings
        tokens = torch.randint(vocabulary, (config.batch_size, config.length), device=self.device)
        masked = "MaskedLM" in type(self.unmodified).__name__
        labels = (
            tokens.where(torch.rand(tokens.shape, device=self.device) < _MASKED, -100) if masked else tokens
        )
        self.batch = {"input_ids": tokens, "labels": labels}

    def warm_up(self) -> None:
        """Take a step of every contender, which compiles."""
        for name in self.models:
            self._step(name)

    def facts(self) -> dict[str, Any]:
        """Compare the losses, and measure memory, operations and the peak of matrix products."""
        with _without_dropout(self.models.values()):
            losses = tuple(self._loss(self.models[name]).item() for name in (UNMODIFIED, ACCELERATED))
        with FlopCounterMode(display=False) as counter:
            self._loss(self.unmodified).backward()
        size = sum(p.numel() for p in self.unmodified.parameters())
        where = str(self.device)
        if self.device.type == "cpu":
            where += f", {cpu_threads()}"
        shape = f"{self.config.batch_size} × {self.config.length} tokens"
        dtype = str(self.dtype).removeprefix("torch.")
        return {
            "model": f"{type(self.unmodified).__name__}, {size / 1e6:,.1f} M parameters, {shape}",
            "machine": f"{where}, {dtype}, backend {resolve_backend('auto', self.device)}",
            "losses": losses,
            "flops": counter.get_total_flops(),
            "peak_flops": peak_flops(self.device, self.dtype),
            "memory": {name: peak_memory(partial(self._step, name), self.device) for name in self.models},
        }

    def time(self, contender: str) -> float:
        """Take a step, and return its time in seconds."""
        gc.collect()
        self._synchronize()
        began = time.perf_counter()
        self._step(contender)
        self._synchronize()
        return time.perf_counter() - began

    def _step(self, contender: str) -> None:
        self._loss(self.models[contender]).backward()
        self.unmodified.zero_grad(set_to_none=True)

    def _loss(self, model: Any) -> Tensor:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            return model(**self.batch).loss

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


@contextmanager
def _without_dropout(models: Any) -> Iterator[None]:
    dropouts = [m for model in models for m in model.modules() if isinstance(m, nn.Dropout)]
    before = [m.p for m in dropouts]
    for m in dropouts:
        m.p = 0.0
    try:
        yield
    finally:
        for m, p in zip(dropouts, before, strict=True):
            m.p = p


def _config_of(model: str) -> tuple[Any, Any]:
    """Return the class and the configuration of a model's name or directory."""
    try:
        import transformers
    except ImportError:
        raise ImportError("fastgpt bench needs the package transformers: pip install transformers") from None
    if model in MODELS:
        name, options = MODELS[model]
        cls = getattr(transformers, name)
        return cls, cls.config_class(**options)
    if not (Path(model) / "config.json").is_file():
        raise ValueError(
            f"there is no model {model!r}: give gpt2, bert, llama, or a directory with a config.json"
        )
    config = transformers.AutoConfig.from_pretrained(model, local_files_only=True)
    for name in config.architectures or ():
        if name.endswith(("LMHeadModel", "ForCausalLM", "ForMaskedLM")):
            return getattr(transformers, name), config
    raise ValueError(f"{model} is of {config.architectures}; fastgpt bench takes language models")


def _build(model: str) -> Any:
    cls, config = _config_of(model)
    config.use_cache = False
    return cls(config)
