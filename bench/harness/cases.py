"""The description of an op's benchmark as data: cases, peers, scaling series."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.harness.machine import DTYPES

Function = Callable[..., Any]
Maker = Callable[["Case"], Function]

VERIFIED_BYTES = 8 << 30  # limit for the float64 intermediates of the reference


@dataclass(frozen=True)
class Case:
    """A shape, a dtype and options.

    Attributes:
        dims: sizes by letter: B batch, H heads, K heads of the keys, T length, D head size, N rows, C width, F width
            of the hidden layer, V vocabulary.
        options: further arguments of the op, such as {"approximate": "tanh"}.
        sweep: letter of the size that a scaling series varies; None outside a series.
    """

    dims: dict[str, int]
    dtype: str
    options: dict[str, str] = field(default_factory=dict)
    sweep: str | None = None

    @property
    def shape(self) -> str:
        """The sizes in the format of `--shape`."""
        return "x".join(map(str, self.dims.values()))

    @property
    def name(self) -> str:
        """The sizes and options."""
        return " ".join([self.shape, *self.options.values()])

    def randn(self, *letters: str, scale: float = 1.0, device: torch.device) -> Tensor:
        """Draw normal values in the case's dtype, of shape `letters`; the tensor requires a gradient."""
        size = [self.dims[letter] for letter in letters]
        return (torch.randn(size, device=device) * scale).to(DTYPES[self.dtype]).requires_grad_()

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Peer:
    """Another implementation of an op.

    Attributes:
        name: name in tables and for `--peer`.
        package: Python package of the implementation.
        make: returns the function of the op's inputs for a case; raises `MissingError` if it cannot run here.
        mutates: the function overwrites its inputs; they are restored before each call, outside the timed region.
    """

    name: str
    package: str
    make: Maker
    mutates: bool = False


@dataclass(frozen=True)
class Sweep:
    """A scaling series over one size.

    Attributes:
        letter: letter of the size that varies.
        base: the constant sizes (in the preset "tiny" those of the tiny shape).
        values: values of the varying size, by preset.
    """

    letter: str
    base: dict[str, int]
    values: dict[str, list[int]]


@dataclass(frozen=True)
class Op:
    """The benchmark of one op, defined in its file of bench/ops.

    Attributes:
        name: name of the op in fastgpt.backends.OPS.
        shapes: sizes of each preset ("tiny", "quick", "cpu", "gpu"), the most important first.
        inputs: returns the inputs of a case on a device.
        ours, pytorch: return the function of the inputs for a case, with our op and in plain PyTorch.
        peers: the other implementations, with PyTorch among them.
        flops, bytes: return lower bounds of the operations and the memory traffic of a case, as (forward,
            forward + backward).
        min_peak_bytes: returns the bytes of results and gradients of a case, a lower bound of the peak memory.
        options: variants that are timed at each shape.
        sweeps: scaling series.
        part: selects the part of the tensors to check, see `ErrorRule`; called with the case and the tensors.
    """

    name: str
    shapes: dict[str, list[dict[str, int]]]
    inputs: Callable[[Case, torch.device], list[Tensor]]
    ours: Maker
    pytorch: Maker
    peers: list[Peer]
    flops: Callable[[Case], tuple[float, float]]
    bytes: Callable[[Case], tuple[float, float]]
    min_peak_bytes: Callable[[Case], float]
    options: list[dict[str, str]] = field(default_factory=lambda: [{}])
    sweeps: list[Sweep] = field(default_factory=list)
    part: Callable[[Case, list[Any]], list[Any]] = lambda case, tensors: list(tensors)

    def cases(self, preset: str, dtypes: Sequence[str]) -> Iterator[Case]:
        """Yield the cases of a preset."""
        for dims in self.shapes[preset]:
            for dtype in dtypes:
                for options in self.options:
                    yield Case(dims, dtype, options)

    def swept(self, preset: str) -> Iterator[Case]:
        """Yield the cases of the scaling series: in bf16 on a GPU, else fp32, with the op's first options."""
        for sweep in self.sweeps:
            for value in sweep.values[preset]:
                dtype = "bf16" if preset == "gpu" else "fp32"
                base = self.shapes["tiny"][0] if preset == "tiny" else sweep.base
                yield Case(base | {sweep.letter: value}, dtype, self.options[0], sweep.letter)
