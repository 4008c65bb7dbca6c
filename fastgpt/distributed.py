"""The processes of a run: one, or those that torchrun started, each with its share of every batch.

The same command means the same run on any number of processes: `batch_size` counts the sequences of all of them.
Gradients are summed by `DistributedDataParallel` ("ddp": every process has the whole model) or by FSDP2 ("fsdp": each
has a part of every parameter, of its gradient and of the optimizer's state; Zhao et al. 2023). Numbers that all must
agree on go over gloo, so that a GPU does not have to wait for them.
"""

from __future__ import annotations

import atexit
import contextlib
import time
import warnings
from collections.abc import Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastgpt import launch

_PATIENCE = timedelta(minutes=10)  # for a process that does not answer; one that died is noticed at once


class ProcessLostError(RuntimeError):
    """Another process of this run is gone, and this one cannot go on."""


class Processes:
    """This process among those of a run: `rank` of `world`, and where it computes; by default it is alone.

    sharded: whether each process holds a part of the model (FSDP2) instead of the whole (DDP).
    """

    def __init__(
        self, device: torch.device | None = None, rank: int = 0, world: int = 1, *, sharded: bool = False
    ) -> None:
        self.device = device or torch.device("cpu")
        self.rank, self.world, self.sharded = rank, world, sharded

    @classmethod
    def meet(cls, device: torch.device, parallel: str) -> Processes:
        """Join the others, if torchrun (or whatever else sets RANK and WORLD_SIZE) started this process; `parallel` is
        what they do then. Raises ProcessLostError where they do not come, ValueError and OSError where the launcher's
        variables or the port are not usable.
        """
        launched = launch.processes()
        if launched is None:
            return cls(device)
        rank, world = launched
        if device.type == "cuda":
            device = torch.device("cuda", launch.local_gpu(rank))
            torch.cuda.set_device(device)
        self = cls(device, rank, world, sharded=parallel == "fsdp")
        with self.together(), launch.naming_the_cause(world):
            # torchrun keeps its store over a restart, and with it the addresses of the processes before.
            store, *_ = next(rendezvous("env://", rank, world, timeout=_PATIENCE))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore(f"start {launch.restarts()}", store),
                rank=rank,
                world_size=world,
                timeout=_PATIENCE,
            )
        # Gloo's threads need the GIL to let go of the last tensors. PyTorch may hold the group beyond `close`, and a
        # thread that asks for the GIL when Python has begun to end takes the process down.
        atexit.register(time.sleep, 0.1)
        return self

    def __str__(self) -> str:
        if self.world == 1 and not self.sharded:
            return str(self.device)
        return f"{self.world} processes ({'fsdp' if self.sharded else 'ddp'}), {self.device.type}"

    @property
    def first(self) -> bool:
        """Whether this process is the one that prints and writes."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """The rows of a batch that this process computes. Raises ValueError if they cannot be shared evenly."""
        if rows % self.world:
            raise ValueError(f"batch_size={rows} is not divisible by the {self.world} processes")
        return slice(self.rank, None, self.world)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients that are means over the processes; FSDP2 changes it in place."""
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # Nothing here writes into what a block returns, which is a view where there is no dropout.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            mesh = init_device_mesh(self.device.type, (self.world,))
            for block in model.h:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model
        if self.world > 1:
            wrapped = DistributedDataParallel(model)
            # The last attribute is the last to go. A group that DDP's reducer held last would wait for gloo's threads
            # and hold the GIL, which they need to let go of a tensor; one that Python held last waits without it.
            wrapped.held_last = wrapped.process_group  # type: ignore[assignment]
            return wrapped
        return model

    @contextlib.contextmanager
    def accumulating(self, wrapped: nn.Module, *, last: bool) -> Iterator[None]:
        """Where a backward runs: gradients are exchanged in the last one of a step alone."""
        with contextlib.ExitStack() as stack:
            if isinstance(wrapped, DistributedDataParallel) and not last:
                stack.enter_context(wrapped.no_sync())
            if self.sharded:
                wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield

    def total(self, *numbers: float) -> list[float]:
        """Each number summed over the processes."""
        if self.world == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def barrier(self) -> None:
        """Wait for all."""
        self.total(0)

    @contextlib.contextmanager
    def agreeing(self) -> Iterator[None]:
        """Where each process works by itself, and waits for no other: all wait at the end, and if one of them raised
        ValueError, OSError or ImportError, the others raise the same.
        """
        failure: Exception | None = None
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            if self.world == 1:
                raise
            failure = error
        if self.world > 1:
            failures: list[Exception | None] = [None] * self.world
            dist.all_gather_object(failures, failure)
            for raised in (failure, *failures):
                if raised is not None:
                    raise raised

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Where all processes must take part: the failure of another one becomes a ProcessLostError."""
        try:
            yield
        except RuntimeError as error:
            if self.world == 1 or not _lost(error):
                raise
            raise ProcessLostError(
                "another process of this run is gone; start the same command again with --resume"
            ) from error

    def close(self) -> None:
        """Part from the others."""
        if dist.is_initialized():
            dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it unless it is sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def restarted() -> bool:
    """Whether torchrun started this process again after a failure (--max-restarts)."""
    return launch.restarts() > 0


def _lost(error: RuntimeError) -> bool:
    """Whether the error is that of a connection, not of the computation."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return any(word in text for word in ("gloo", "Connection", "connection", "Broken pipe", "NCCL"))
