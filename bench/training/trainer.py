"""Overhead of the trainer, and benefit of packing: `python -m bench trainer`.

Two comparisons with the same GPT, in alternating order:
- A step of `fastgpt train` and a bare step. The bare step is forward, backward and AdamW on a batch in memory, as in
  `python -m bench train`. A step of the trainer also reads the batch, counts targets, sets seeds, clips gradients,
  computes the learning rate, updates the progress bar, polls clock and signals, and writes a line to the terminal and
  to the log. It has no validation and no checkpoint.
- A step on documents packed into full blocks, and a step on the same documents as one row each, padded to the longest
  of the batch. The speed is in targets/s. The documents are the functions of the standard library.
"""

from __future__ import annotations

import ast
import contextlib
import io
import itertools
import json
import random
import statistics
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from bench.harness.machine import Machine, percentile
from bench.training.steps import trainer
from fastgpt import data
from fastgpt.data.batches import IGNORED, Batch
from fastgpt.distributed import DistributedContext
from fastgpt.model import GPT
from fastgpt.training.config import TrainConfig
from fastgpt.training.trainer import Trainer

SIZES = {
    "tiny": {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "batch_size": 2},
    "cpu": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "batch_size": 8},
}
COMPARISONS = {"fastgpt train": ("fastgpt train", "bare step"), "packed documents": ("packed", "padded")}


def run(size: str, rounds: int, as_json: bool) -> int:
    """Measure, print a table or one JSON object, and return 0."""
    with tempfile.TemporaryDirectory() as out:
        result = measure(out, SIZES[size], rounds)
    print(json.dumps(result) if as_json else table(result))
    return 0


def measure(out: str, size: dict[str, int], rounds: int) -> dict[str, Any]:
    """Measure the speed of all contenders.

    Returns:
        {"size", "dtype", "tokens_per_second": {contender: [value of each round]}}; only targets count as tokens.
    """
    machine = Machine("cuda" if torch.cuda.is_available() else "cpu")
    never = rounds + 2
    config = TrainConfig(
        out=out, eval_batches=1, log_every=1, eval_every=never, save_every=never, max_steps=never
    )
    config = config.override(size)
    with contextlib.redirect_stdout(io.StringIO()):
        whole = Trainer(config, DistributedContext(machine.device))
    dtype = {torch.bfloat16: "bf16", torch.float32: "fp32"}[whole.dtype]
    torch.manual_seed(config.seed)
    model = _Loss(GPT(config.model(256))).to(machine.device)
    step = trainer(model, machine, dtype)
    stream = whole.data.train.batch(0, slice(None))
    packed, padded = (itertools.cycle(batches) for batches in _documents(size, 16))

    def advance() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            whole.train_step()

    found: dict[str, list[float]] = {name: [] for pair in COMPARISONS.values() for name in pair}
    for number in range(rounds + 1):  # the first one warms up
        batches = {"bare step": stream, "packed": next(packed), "padded": next(padded)}
        batches = {name: batch.to(machine.device) for name, batch in batches.items()}
        calls = {
            name: (lambda b=batch: step(b.idx, b.targets, b.cu_seqlens)) for name, batch in batches.items()
        } | {"fastgpt train": advance}
        names = list(found) if number % 2 else list(reversed(found))
        times = machine.time_round([(lambda: None, calls[name]) for name in names], whole=True)
        for name, taken in zip(names, times, strict=True):
            counted = batches.get(name, stream).num_targets
            found[name] += [counted / taken.seconds] if number else []
    whole.close()
    return {"size": size, "dtype": dtype, "tokens_per_second": found}


class _Loss(nn.Module):
    """Module from a batch to its mean loss."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        loss = self.model(idx, targets, cu_seqlens=cu_seqlens)[1]
        assert loss is not None
        return loss


def _documents(size: dict[str, int], count: int) -> tuple[list[Batch], list[Batch]]:
    """Return `count` batches of packed documents, and `count` batches of padded ones; no document exceeds a block."""
    block_size, rows = size["block_size"], size["batch_size"]
    texts = [text for text in _functions() if 1 < len(text.encode()) <= block_size + 1]
    random.Random(0).shuffle(texts)
    documents = [torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8).long() for text in texts]
    ends = np.cumsum([len(document) for document in documents])
    source = data.Packed(torch.cat(documents), ends, batch_size=rows, block_size=block_size)
    packed = [source.batch(number) for number in range(count)]
    padded = []
    for first in range(0, count * rows, rows):
        chosen = documents[first : first + rows]
        idx = nn.utils.rnn.pad_sequence([document[:-1] for document in chosen], batch_first=True)
        targets = nn.utils.rnn.pad_sequence(
            [document[1:] for document in chosen], batch_first=True, padding_value=IGNORED
        )
        padded.append(Batch(idx, targets))
    return packed, padded


def _functions() -> Iterator[str]:
    """Yield the source of every function of the standard library."""
    for text in data.load_corpus("stdlib").train:
        with contextlib.suppress(SyntaxError, ValueError):
            lines = text.splitlines(keepends=True)
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    yield "".join(lines[node.lineno - 1 : node.end_lineno])


def table(result: dict[str, Any]) -> str:
    """Format the medians as text; a ratio is the median over rounds, with the 10th and 90th percentile."""
    speeds = result["tokens_per_second"]
    lines = [f"{'x'.join(map(str, result['size'].values()))}, {result['dtype']}, tokens/s"]
    for name, (ours, other) in COMPARISONS.items():
        ratios = [a / b for a, b in zip(speeds[ours], speeds[other], strict=True)]
        low, high = percentile(ratios, 0.1), percentile(ratios, 0.9)
        lines.append(
            f"  {name:<18}{statistics.median(speeds[ours]):>9,.0f}, {statistics.median(ratios):.3f} of "
            f"{other} ({low:.3f} to {high:.3f})"
        )
    return "\n".join(lines)
