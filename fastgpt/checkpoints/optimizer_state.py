"""State of the optimizers as named tensors, "<parameter>.<key>"."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastgpt.model import GPT


def named_state(model: GPT, optimizers: Sequence[torch.optim.Optimizer]) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of the state of all optimizers; those without any step so far have none."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            for key, value in state.items():
                yield f"{names[id(parameter)]}.{key}", value


def state_keys(optimizer: torch.optim.Optimizer) -> tuple[str, ...]:
    """Return the names of an optimizer's state per parameter, for the optimizers of `make_optimizers`."""
    if isinstance(optimizer, torch.optim.Muon):
        return ("momentum_buffer",)
    return ("step", "exp_avg", "exp_avg_sq")


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Wrap this process's rows of a moment in a tensor sharded like the parameter, if that is sharded."""
    from torch.distributed.tensor import DTensor

    if not isinstance(parameter, DTensor):
        return tensor
    mesh, placements = parameter.device_mesh, parameter.placements
    return DTensor.from_local(tensor, mesh, placements, shape=parameter.shape, stride=parameter.stride())
