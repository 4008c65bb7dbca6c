"""`accelerate(model).verify(batch)`: which ops one step of a model really calls, and what stays with PyTorch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from fastgpt._ops import NAMESPACE
from fastgpt.backends import BACKENDS, OPS

_FEW = 8  # of PyTorch's operators, those that take most of the time

# The registered ops that serve others: packed documents; a norm without a residual of its own; a composite op's parts.
_SERVED_BY = {
    "attention": {"attention_varlen"},
    "add_rms_norm": {"rms_norm"},
    "linear_gelu": {"linear", "bias_gelu"},
}


@dataclass(frozen=True)
class Calls:
    """The calls of one operator in a step.

    name:    of fastgpt, such as "attention_fwd"; of PyTorch, such as "aten::mm".
    backend: "cpp", "triton", "cuda" or "reference"; "" for an operator of PyTorch.
    count:   how many calls.
    share:   of the step's time in operators, from 0 to 1.
    """

    name: str
    backend: str
    count: int
    share: float

    def __str__(self) -> str:
        return f"{self.share:6.1%}  {self.count:>6} × {self.name}" + (
            f" ({self.backend})" if self.backend else ""
        )


@dataclass(frozen=True)
class Verification:
    """The operators of a step, those that take most of the time first; prints as a table.

    ours:     fastgpt's.
    pytorch:  PyTorch's.
    uncalled: ops that modules were given and that none of them called.
    """

    ours: tuple[Calls, ...]
    pytorch: tuple[Calls, ...]
    uncalled: tuple[str, ...]

    def __str__(self) -> str:
        lines = []
        for title, calls in (("fastgpt", self.ours), ("PyTorch", self.pytorch)):
            lines.append(f"{sum(c.share for c in calls):6.1%}  {title}")
            shown = calls if title == "fastgpt" else calls[:_FEW]
            lines += [
                f"{c.share:6.1%}  {c.count:>6} × {f'{c.name} ({c.backend})' if c.backend else c.name}"
                for c in shown
            ]
            rest = calls[len(shown) :]
            if rest:
                lines.append(
                    f"{sum(c.share for c in rest):6.1%}  {sum(c.count for c in rest):>6} × {len(rest)} others"
                )
        if self.uncalled:
            lines.append(f"replaced, but not called in this step: {', '.join(self.uncalled)}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"<{type(self).__name__}\n{self}\n>"


def verify(model: nn.Module, batch: Any, promised: Iterable[str]) -> Verification:
    """Run two steps, record the second, and return what ran; see `Report.verify`."""
    with _unchanged(model):
        _step(model, batch)  # what happens once: compilation, autotuning, caches
        device = next((p.device.type for p in model.parameters()), "cpu")
        kinds = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device == "cuda")
        with profile(activities=kinds, acc_events=True) as record:
            _step(model, batch)
    counts: Counter[str] = Counter()
    times: Counter[str] = Counter()
    for event in record.key_averages():
        if "::" in event.key and not event.key.startswith("autograd::"):
            counts[event.key] += event.count
            times[event.key] += (
                event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
            )
    total = sum(times.values()) or 1
    calls = [Calls(*_named(key), counts[key], time / total) for key, time in times.most_common()]
    ours, others = (tuple(c for c in calls if bool(c.backend) == mine) for mine in (True, False))
    called = {_of(c.name) for c in ours}
    uncalled = [op for op in dict.fromkeys(promised) if not {op, *_SERVED_BY.get(op, ())} & called]
    return Verification(ours, others, tuple(uncalled))


def _named(key: str) -> tuple[str, str]:
    """The name and backend of an operator by its full name."""
    space, _, name = key.partition("::")
    rest, _, backend = name.rpartition("_")
    return (rest, backend) if space == NAMESPACE and backend in BACKENDS else (key, "")


def _of(name: str) -> str:
    """The op of `attention_fwd` and the like."""
    return max((op for op in OPS if name.startswith(f"{op}_")), key=len, default="")


def _step(model: nn.Module, batch: Any) -> None:
    """Forward, and backward where there is something to train."""
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        loss = sum((t.float().sum() for t in _floats(output) if t.requires_grad), torch.zeros(()))
    if loss.requires_grad:
        loss.backward()


def _floats(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _floats(part)


@contextmanager
def _unchanged(model: nn.Module) -> Iterator[None]:
    """Within, gradients, buffers and random numbers may change; afterwards they are as before."""
    gradients = [(p, p.grad) for p in model.parameters()]
    buffers = [(b, b.clone()) for b in model.buffers()]
    devices = {p.device for p, _ in gradients if p.device.type == "cuda"}
    try:
        with torch.random.fork_rng(devices):
            for parameter, _ in gradients:
                parameter.grad = None
            yield
    finally:
        for parameter, gradient in gradients:
            parameter.grad = gradient
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)
