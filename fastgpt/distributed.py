"""The processes of a run: one, or those that torchrun started, each with its share of every batch.

The same command means the same run on any number of processes: `batch_size` counts the sequences of all of them.
Gradients are summed by `DistributedDataParallel` ("ddp": every process has the whole model) or by FSDP2 ("fsdp": each
has a part of every parameter, of its gradient and of the optimizer's state; Zhao et al. 2023). Numbers that all must
agree on go over gloo, so that a GPU does not have to wait for them.
"""

from __future__ import annotations

import atexit
import contextlib
import os
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

_REMEDY = "start the processes with torchrun, which sets it, or unset RANK and WORLD_SIZE to run one process"
_PATIENCE = timedelta(minutes=10)  # for a process that does not answer; one that died is noticed at once


class ProcessLostError(RuntimeError):
    """Another process of this run is gone, and this one cannot go on."""


class DistributedContext:
    """This process among those of a run: `rank` of `world`, and where it computes; by default it is alone.

    sharded: whether each process holds a part of the model (FSDP2) instead of the whole (DDP).
    """

    def __init__(
        self, device: torch.device | None = None, rank: int = 0, world: int = 1, *, sharded: bool = False
    ) -> None:
        self.device = device or torch.device("cpu")
        self.rank, self.world_size, self.sharded = rank, world, sharded

    @classmethod
    def from_env(cls, device: torch.device, parallel: str) -> DistributedContext:
        """Initialize the process group if a launcher (torchrun) set RANK and WORLD_SIZE.

        Args:
            device: of this process.
            parallel: "ddp" or "fsdp".

        Raises:
            ProcessLostError: another process does not join.
            ValueError: a variable of the launcher cannot be used.
            OSError: the port cannot be used.
        """
        launched = _launched()
        if launched is None:
            return cls(device)
        rank, world = launched
        if device.type == "cuda":
            device = torch.device("cuda", _local_gpu(rank))
            torch.cuda.set_device(device)
        self = cls(device, rank, world, sharded=parallel == "fsdp")
        with self.detecting_lost_processes(), _naming_the_cause(world):
            # torchrun keeps its store over a restart, and with it the addresses of the processes before.
            store, *_ = next(rendezvous("env://", rank, world, timeout=_PATIENCE))
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=PrefixStore(f"start {_restarts()}", store),
                rank=rank,
                world_size=world,
                timeout=_PATIENCE,
            )
        # Gloo's threads need the GIL to let go of the last tensors. PyTorch may hold the group beyond `close`, and a
        # thread that asks for the GIL when Python has begun to end takes the process down.
        atexit.register(time.sleep, 0.1)
        return self

    def __str__(self) -> str:
        if self.world_size == 1 and not self.sharded:
            return str(self.device)
        return f"{self.world_size} processes ({'fsdp' if self.sharded else 'ddp'}), {self.device.type}"

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def local_rows(self, rows: int) -> slice:
        """Return the rows of a batch that this process computes. Raises ValueError if they do not divide evenly."""
        if rows % self.world_size:
            raise ValueError(f"batch_size={rows} is not divisible by the {self.world_size} processes")
        return slice(self.rank, None, self.world_size)

    def wrap(self, model: nn.Module) -> nn.Module:
        """Return the model with gradients averaged over the processes; FSDP2 changes it in place."""
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard

            # Nothing here writes into what a block returns, which is a view where there is no dropout.
            warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
            mesh = init_device_mesh(self.device.type, (self.world_size,))
            for block in model.h:  # type: ignore[union-attr]
                fully_shard(block, mesh=mesh)
            fully_shard(model, mesh=mesh)
            return model
        if self.world_size > 1:
            wrapped = DistributedDataParallel(model)
            # The last attribute is the last to go. A group that DDP's reducer held last would wait for gloo's threads
            # and hold the GIL, which they need to let go of a tensor; one that Python held last waits without it.
            wrapped.held_last = wrapped.process_group  # type: ignore[assignment]
            return wrapped
        return model

    @contextlib.contextmanager
    def accumulating(self, wrapped: nn.Module, *, last: bool) -> Iterator[None]:
        """Context of a forward and backward; gradients are reduced only in the last one of a step."""
        with contextlib.ExitStack() as stack:
            if isinstance(wrapped, DistributedDataParallel) and not last:
                stack.enter_context(wrapped.no_sync())
            if self.sharded:
                wrapped.set_requires_gradient_sync(last)  # type: ignore[operator]
            yield

    def all_reduce_sum(self, *numbers: float) -> list[float]:
        """Sum each number over the processes."""
        if self.world_size == 1:
            return list(numbers)
        sums = torch.tensor(numbers, dtype=torch.float64)
        dist.all_reduce(sums)
        return sums.tolist()

    def barrier(self) -> None:
        """Wait for all processes."""
        self.all_reduce_sum(0)

    @contextlib.contextmanager
    def raise_on_all_ranks(self) -> Iterator[None]:
        """Context of work without communication, at whose end all processes wait.

        If one of them raises ValueError, OSError or ImportError, all raise it.
        """
        failure: Exception | None = None
        try:
            yield
        except (ValueError, OSError, ImportError) as error:
            if self.world_size == 1:
                raise
            failure = error
        if self.world_size > 1:
            failures: list[Exception | None] = [None] * self.world_size
            dist.all_gather_object(failures, failure)
            for raised in (failure, *failures):
                if raised is not None:
                    raise raised

    @contextlib.contextmanager
    def detecting_lost_processes(self) -> Iterator[None]:
        """Context of communication: the failure of another process becomes a ProcessLostError."""
        try:
            yield
        except RuntimeError as error:
            if self.world_size == 1 or not _lost(error):
                raise
            raise ProcessLostError(
                "another process of this run is gone; start the same command again with --resume"
            ) from error

    def close(self) -> None:
        """Destroy the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this process holds: all of it unless it is sharded."""
    from torch.distributed.tensor import DTensor

    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def restarted() -> bool:
    """Return whether torchrun restarted this process after a failure (--max-restarts)."""
    return _restarts() > 0


def _lost(error: RuntimeError) -> bool:
    """Return whether the error is that of a connection, not of the computation."""
    if isinstance(error, dist.DistError):
        return True
    text = str(error)
    return any(word in text for word in ("gloo", "Connection", "connection", "Broken pipe", "NCCL"))


def _launched() -> tuple[int, int] | None:
    """RANK and WORLD_SIZE, or None for a process that no launcher has started.

    Raises ValueError for values with which no processes can meet.
    """
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not given:
        return None
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise ValueError(f"{given[0]} is set, but {name} is not: {_REMEDY}")
        if not os.environ[name].strip():
            raise ValueError(f"{name} is empty: {_REMEDY}")
    rank, world, port = (_integer(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"))
    if not 0 <= rank < world:
        raise ValueError(f"RANK is {rank} and WORLD_SIZE is {world}: ranks count from 0 to WORLD_SIZE - 1")
    if not 0 <= port < 1 << 16:
        raise ValueError(f"MASTER_PORT is {port}: a port is below 65536")
    return rank, world


def _local_gpu(rank: int) -> int:
    """The number of the GPU of this process. Raises ValueError where this machine does not have it."""
    number = _integer("LOCAL_RANK", rank)
    count = torch.cuda.device_count()
    if not 0 <= number < count:
        raise ValueError(
            f"LOCAL_RANK is {number} and this machine has {count} GPUs: start at most {count} processes on it"
        )
    return number


def _restarts() -> int:
    """Return how often torchrun has restarted this process."""
    return _integer("TORCHELASTIC_RESTART_COUNT", 0)


@contextlib.contextmanager
def _naming_the_cause(world: int) -> Iterator[None]:
    """Raise OSError for what keeps processes from meeting and is no fault of another process."""
    try:
        yield
    except RuntimeError as error:
        reason = _cause(str(error).lower(), os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"], world)
        if reason is None:
            raise
        raise OSError(reason) from error


def _cause(text: str, address: str, port: str, world: int) -> str | None:
    if "eaddrinuse" in text or "address already in use" in text:
        return (
            f"port {port} (MASTER_PORT) is in use on this machine, by another run or program, or because two processes "
            "have RANK 0; choose another port, for example with torchrun --master-port"
        )
    if "eacces" in text or "permission denied" in text:
        return f"port {port} (MASTER_PORT) may not be used by this user; choose one above 1023"
    if any(
        part in text for part in ("getaddrinfo", "name or service not known", "name resolution", "nodename")
    ):
        return (
            f"MASTER_ADDR is {address!r}, which is not the name or address of a machine that can be reached"
        )
    if "cannot assign requested address" in text or "eaddrnotavail" in text:
        return f"MASTER_ADDR is {address!r}, which is not an address of the machine of RANK 0"
    if any(part in text for part in ("timed out", "timeout", "connection refused")):
        return (
            f"the {world} processes (WORLD_SIZE) did not meet at {address}:{port} (MASTER_ADDR, MASTER_PORT); "
            "check that all were started, and that RANK 0 runs on that machine"
        )
    return None


def _integer(name: str, default: int | None = None) -> int:
    """A variable of the launcher. Raises ValueError where it is not an integer."""
    value = os.environ.get(name, "" if default is None else str(default))
    try:
        return int(value)
    except ValueError:
        raise ValueError(f"{name} is {value!r}, which is not an integer: {_REMEDY}") from None
