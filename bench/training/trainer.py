"""What the trainer's own work costs, and what packing saves:  python -m bench trainer

The same GPT in turns:
- a bare step (forward, backward, AdamW) on a batch that lies ready, as `python -m bench train` times it, and all that
  `fastgpt train` does from one step to the next: the batch read from the data, its targets counted, seeds, clipped
  gradients, the schedule, the progress bar, a look at clock and signals, and, in each step, a line on the screen and in
  the log. Validation and checkpoints are left out.
- a step on documents packed into full blocks, and one on the same documents a row each, padded to the longest of the
  batch, by the tokens they learn from. The documents are the functions of the standard library.
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
    """Measure, and print a table or one JSON object; 0."""
    with tempfile.TemporaryDirectory() as out:
        result = measure(out, SIZES[size], rounds)
    print(json.dumps(result) if as_json else table(result))
    return 0


def measure(out: str, size: dict[str, int], rounds: int) -> dict[str, Any]:
    """{"size", "dtype", "tokens_per_second": {contender: [of each round]}}; tokens are those that are learned from."""
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
    """A batch to its mean loss."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor, cu_seqlens: Tensor | None) -> Tensor:
        loss = self.model(idx, targets, cu_seqlens=cu_seqlens)[1]
        assert loss is not None
        return loss


def _documents(size: dict[str, int], count: int) -> tuple[list[Batch], list[Batch]]:
    """Batches of documents, packed, and of the same kind, padded; no document is longer than a block."""
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
    """The source of every function of the standard library that has one."""
    for text in data.load_corpus("stdlib").train:
        with contextlib.suppress(SyntaxError, ValueError):
            lines = text.splitlines(keepends=True)
            for node in ast.walk(ast.parse(text)):
                if isinstance(node, ast.FunctionDef):
                    yield "".join(lines[node.lineno - 1 : node.end_lineno])


def table(result: dict[str, Any]) -> str:
    """Medians for people; a ratio is the median of the rounds' own, with the 10th and 90th percentile."""
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
