"""Common parts of the benchmarks of training steps: the same model, weights and batches for every contender.

Before the timing, the losses of the first steps are compared with the reference in float32. Let e be the error of the
reference in the dtype of the run. Our losses may differ by 2e + 0.001 nats, those of a peer by 10e + 0.001 nats. Then
the contenders take steps in rounds.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.harness.machine import DTYPES, Machine
from bench.harness.measure import (
    OUR_FACTOR,
    PEER_FACTOR,
    Contender,
    Plan,
    Turn,
    measure_peak_memory,
    ratio,
    time_rounds,
)
from bench.harness.peers import MissingError
from bench.harness.records import Record
from fastgpt import data

Batch = tuple[Tensor, ...]  # arguments of a model, which returns the loss

_ATOL = 1e-3  # nats
_LR = 3e-4


def name(size: dict[str, int]) -> str:
    """Format sizes as in `--shape`."""
    return "x".join(map(str, size.values()))


def tokens_and_targets(size: dict[str, int], count: int) -> list[tuple[Tensor, Tensor]]:
    """Return batches of (tokens, targets) from the source of the standard library.

    A token is a byte, or a pair of bytes if the vocabulary has more than 256 entries.
    """
    text = torch.frombuffer(
        bytearray("".join(data.load_corpus("stdlib").val).encode()), dtype=torch.uint8
    ).long()
    tokens = text if size["V"] <= 256 else (text[:-1] * 256 + text[1:]) % size["V"]
    return [data.batch(tokens, i, batch_size=size["B"], block_size=size["T"], seed=0) for i in range(count)]


def trainer(model: nn.Module, machine: Machine, dtype: str, compiled: bool = False) -> Callable[..., Tensor]:
    """Return a function that takes one optimizer step on a batch and returns the loss."""
    model = model.to(machine.device)
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)

    def step(*batch: Tensor) -> Tensor:
        with torch.autocast(machine.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            loss = forward(*batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


@dataclass(frozen=True)
class Peer:
    """A peer in training.

    Attributes:
        make: returns the model; raises `MissingError` if it cannot run here.
        compiled: the model runs under torch.compile.
    """

    name: str
    package: str
    make: Callable[[], nn.Module]
    compiled: bool = False


def run_steps(
    facts: Record,
    ours: Callable[[str], nn.Module],
    peers: Sequence[Peer],
    reference: Callable[[], nn.Module],
    batches: Sequence[Batch],
    machine: Machine,
    plan: Plan,
    after_check: Callable[[], None] = lambda: None,
) -> list[Record]:
    """Check and time every contender.

    Args:
        facts: fields of the records: op, case, dims, dtype and the flops of a step.
        ours: returns our model on a backend.
        reference: returns the model whose losses in float32 are the reference.
        batches: batches of the steps whose losses are compared; the timed steps repeat them.
        after_check: called between the check and the timing.

    Returns:
        One record for each contender, our backends first.
    """
    dtype = facts["dtype"]
    batches = [tuple(t.to(machine.device) for t in batch) for batch in batches]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = list(_contenders(ours, peers, machine, dtype, plan))
        exact = _losses(trainer(reference(), machine, "fp32"), batches)
        measure = _losses(trainer(reference(), machine, dtype), batches)
        off = max(abs(a - e) for a, e in zip(measure, exact, strict=True))
        losses = [_check(contender, batches, exact, off) for contender in found]
        after_check()
        turn = partial(_turn, batches)
        time_rounds("step", found, turn, machine, plan, whole=True)
        for contender in found:
            if contender.status == "ok":
                measure_peak_memory(contender, turn(contender, 0), machine)
    records = [_record(facts, c, found, curve, machine) for c, curve in zip(found, losses, strict=True)]
    del found
    gc.collect()
    return records


def _contenders(
    ours: Callable[[str], nn.Module], peers: Sequence[Peer], machine: Machine, dtype: str, plan: Plan
) -> Iterator[Contender]:
    def to_train(
        make: Callable[[], nn.Module], compiled: bool = False
    ) -> Callable[[], Callable[..., Tensor]]:
        return lambda: trainer(make(), machine, dtype, compiled)

    for backend in plan.ours("attention"):
        yield Contender(backend, None, to_train(partial(ours, backend)))
    for peer in peers:
        if plan.includes(peer.name):
            yield Contender(peer.package, peer.name, to_train(peer.make, peer.compiled))


def _losses(step: Callable[..., Tensor], batches: Sequence[Any]) -> list[float]:
    return [float(loss) for loss in [step(*batch) for batch in batches]]


def _check(contender: Contender, batches: Sequence[Any], exact: list[float], off: float) -> list[float]:
    """Return the first losses of a contender, and mark it as wrong if they differ too much from `exact`."""
    try:
        contender.function = contender.make()
        losses = _losses(contender.function, batches)
    except MissingError as error:
        contender.fail("missing", error)
        return []
    except Exception as error:
        contender.fail("failed", error)
        return []
    difference = max(abs(a - e) for a, e in zip(losses, exact, strict=True))
    factor = OUR_FACTOR if contender.peer is None else PEER_FACTOR
    bound = factor * off + _ATOL
    contender.error = difference / (OUR_FACTOR * off + _ATOL)
    if not difference <= bound:  # NaN is not
        contender.fail(
            "wrong", f"the loss of a step differs by {difference:.2g} nats; the limit is {bound:.2g}"
        )
    return losses


def _turn(batches: Sequence[Any], contender: Contender, number: int) -> Turn:
    """Return the step on the batch of a round, without preparation."""
    assert contender.function is not None
    return lambda: None, partial(contender.function, *batches[number % len(batches)])


def _record(
    facts: Record, contender: Contender, contenders: list[Contender], losses: list[float], machine: Machine
) -> Record:
    matmul_peak = machine.roofline_bounds(facts["dtype"])[1]
    record = contender.record() | facts
    record |= {
        "group": "train",
        "direction": "step",
        "roofline_seconds": facts["flops"] / matmul_peak,
        "bound": "compute",
        "losses": losses,
    }
    if contender.status == "ok":
        record |= contender.summary("step")
        record["peak_bytes"] = contender.peak_bytes
        rate = facts["flops"] / record["seconds"]
        datasheet = machine.datasheet_flops()
        size = facts["dims"]
        record["tokens_per_second"] = size["B"] * size["T"] / record["seconds"]
        record["share_of_roofline"] = record["mfu_measured"] = rate / matmul_peak
        record["mfu_datasheet"] = rate / datasheet[facts["dtype"]] if datasheet else None
        record |= ratio(contender, "step", contenders)
    return record
