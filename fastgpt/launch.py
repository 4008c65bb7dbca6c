"""What a launcher of several processes sets in the environment, and which of its mistakes keeps them from meeting."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

_REMEDY = "start the processes with torchrun, which sets it, or unset RANK and WORLD_SIZE to run one process"


def processes() -> tuple[int, int] | None:
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


def local_gpu(rank: int) -> int:
    """The number of the GPU of this process. Raises ValueError where this machine does not have it."""
    number = _integer("LOCAL_RANK", rank)
    count = torch.cuda.device_count()
    if not 0 <= number < count:
        raise ValueError(
            f"LOCAL_RANK is {number} and this machine has {count} GPUs: start at most {count} processes on it"
        )
    return number


def restarts() -> int:
    """How often torchrun has started this process again."""
    return _integer("TORCHELASTIC_RESTART_COUNT", 0)


@contextlib.contextmanager
def naming_the_cause(world: int) -> Iterator[None]:
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
