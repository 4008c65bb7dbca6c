"""Detection of NaN and infinity in loss and weights, and the message about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from fastgpt.distributed import local


def are_numbers(model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]) -> bool:
    """Return whether the weights that this process holds are finite, and no state of the optimizers is NaN."""
    states = (value for o in optimizers for state in o.state.values() for value in state.values())
    flags = [local(parameter).isfinite().all() for parameter in model.parameters()]
    flags += [~local(value).isnan().any() for value in states if isinstance(value, Tensor)]
    device = next(model.parameters()).device
    return bool(torch.stack([flag.to(device) for flag in flags]).all())


def diverged(name: str, value: float, step: int, saved: Sequence[Path], loaded: Path | None) -> str:
    """The message about a loss that is no number.

    Args:
        name: of the loss.
        value: of the loss.
        step: of the run.
        saved: its checkpoints, the newest last.
        loaded: the model that gives this loss, if it is still as it was loaded.
    """
    others = [path for path in saved if path != loaded]
    resume = f"--resume goes on from {others[-1]}" if others else "start again"
    if loaded is None:
        remedy = f"try a lower --lr; {resume}"
    elif loaded in saved:
        remedy = f"the weights of {loaded} cannot be used: remove it, then {resume}"
    else:
        remedy = f"the weights of {loaded} cannot be used: take another model"
    return f"the {name} is {value} at step {step}: {remedy}"
