"""The peers: whose code a benchmark runs beside ours, and what it takes to run it."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from bench.harness.cases import Case, Function, Maker, Peer


class MissingError(Exception):
    """A peer cannot run here; the message says why."""


def require(package: str, install: str, *, gpu: bool = False, triton: bool = False) -> Any:
    """Import a peer's package.

    Args:
        install: what to `pip install`.
        gpu: it runs on a CUDA GPU only.
        triton: its kernels are Triton's; without a GPU they run in Triton's interpreter alone.

    Raises:
        MissingError: not installed, or not for this machine.
    """
    try:
        module = importlib.import_module(package)
    except ImportError as error:
        gone = isinstance(error, ModuleNotFoundError) and error.name == package.partition(".")[0]
        raise MissingError(
            f"not installed: pip install {install}" if gone else f"cannot be imported: {error}"
        ) from None
    if not torch.cuda.is_available() and (gpu or (triton and not interpreted())):
        raise MissingError("needs a CUDA GPU" + (" (or TRITON_INTERPRET=1)" if triton else ""))
    return module


def sixteen_bits(case: Case, module: Any) -> Any:
    """The module of a peer that takes fp16 and bf16.

    Raises:
        MissingError: the case is of another dtype.
    """
    if case.dtype == "fp32":
        raise MissingError("takes fp16 and bf16 only")
    return module


def interpreted() -> bool:
    """Whether Triton kernels run in its interpreter."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def eager(make: Maker) -> Peer:
    """The function as PyTorch runs it by itself."""
    return Peer("PyTorch", "torch", make)


def compiled(make: Maker) -> Peer:
    """The same function through torch.compile, for one shape, in one graph."""

    def make_compiled(case: Case) -> Function:
        return torch.compile(make(case), dynamic=False, fullgraph=True)

    return Peer("torch.compile", "torch", make_compiled)
