"""Import and construction of peers, the implementations that are measured next to ours."""

from __future__ import annotations

import importlib
from typing import Any

import torch

from bench.harness.cases import Case, Function, Maker, Peer


class MissingError(Exception):
    """A peer cannot run here; the message is the reason."""


def require(package: str, install: str, *, gpu: bool = False, triton: bool = False) -> Any:
    """Import a peer's package.

    Args:
        install: argument of `pip install`.
        gpu: the package needs a CUDA GPU.
        triton: the package has Triton kernels; without a GPU they need Triton's interpreter.

    Raises:
        MissingError: the package is not installed or does not run on this machine.
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
    """Return the module of a peer that supports fp16 and bf16 only.

    Raises:
        MissingError: the case has another dtype.
    """
    if case.dtype == "fp32":
        raise MissingError("supports fp16 and bf16 only")
    return module


def interpreted() -> bool:
    """Return True if Triton kernels run in Triton's interpreter."""
    try:
        from triton import knobs
    except ImportError:
        return False
    return bool(knobs.runtime.interpret)


def eager(make: Maker) -> Peer:
    """Return the peer "PyTorch": the function in eager mode."""
    return Peer("PyTorch", "torch", make)


def compiled(make: Maker) -> Peer:
    """Return the peer "torch.compile": the function compiled for one shape as one graph."""

    def make_compiled(case: Case) -> Function:
        return torch.compile(make(case), dynamic=False, fullgraph=True)

    return Peer("torch.compile", "torch", make_compiled)
