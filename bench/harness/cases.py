"""What a benchmark is made of: an op described as data, and its cases."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench.harness.machine import DTYPES

Function = Callable[..., Any]
Maker = Callable[["Case"], Function]

VERIFIED_BYTES = 8 << 30  # what float64 intermediates of the reference may take


@dataclass(frozen=True)
class Case:
    """A shape, a dtype and options.

    Attributes:
        dims: sizes by letter: B batch, H heads, T length, D head size, N rows, C width, F width
            of the hidden layer, V vocabulary.
        options: what else distinguishes it: {"approximate": "tanh"}.
        sweep: the letter that a scaling series varies.
    """

    dims: dict[str, int]
    dtype: str
    options: dict[str, str] = field(default_factory=dict)
    sweep: str | None = None

    @property
    def shape(self) -> str:
        """The sizes, as `--shape` takes them."""
        return "x".join(map(str, self.dims.values()))

    @property
    def name(self) -> str:
        """The sizes and options."""
        return " ".join([self.shape, *self.options.values()])

    def randn(self, *letters: str, scale: float = 1.0, device: torch.device) -> Tensor:
        """Normal values in the case's dtype of the size that the letters name, requiring a gradient."""
        size = [self.dims[letter] for letter in letters]
        return (torch.randn(size, device=device) * scale).to(DTYPES[self.dtype]).requires_grad_()

    @property
    def itemsize(self) -> int:
        """Bytes a number."""
        return DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Peer:
    """Another implementation of an op.

    Attributes:
        name: as it stands in tables and after `--peer`.
        package: where it comes from.
        make: for a case, the function of the op's inputs; raises `MissingError` where it cannot run.
        mutates: it overwrites its inputs, which are restored before each call, untimed.
    """

    name: str
    package: str
    make: Maker
    mutates: bool = False


@dataclass(frozen=True)
class Sweep:
    """A scaling series: one size varied, the others kept.

    Attributes:
        base: the sizes that are kept (those of the tiny shape in the preset "tiny").
        values: of the letter, by preset.
    """

    letter: str
    base: dict[str, int]
    values: dict[str, list[int]]


@dataclass(frozen=True)
class Op:
    """What a bench_X.py says of its op.

    Attributes:
        name: the op in fastgpt.backends.OPS.
        shapes: the sizes of each preset ("tiny", "quick", "cpu", "gpu"), the most important first.
        inputs: the tensors of a case on a device.
        ours, pytorch: for a case, the function of the inputs: with our op, and in plain PyTorch.
        peers: the others; PyTorch itself is among them.
        flops, bytes: for a case, (forward, forward + backward) of the least that must be done.
        held: for a case, the bytes of results and gradients: the least that forward and backward must hold.
        options: the variants timed at each shape.
        sweeps: the scaling series.
        part: see `ErrorRule`; given the case and the list.
    """

    name: str
    shapes: dict[str, list[dict[str, int]]]
    inputs: Callable[[Case, torch.device], list[Tensor]]
    ours: Maker
    pytorch: Maker
    peers: list[Peer]
    flops: Callable[[Case], tuple[float, float]]
    bytes: Callable[[Case], tuple[float, float]]
    held: Callable[[Case], float]
    options: list[dict[str, str]] = field(default_factory=lambda: [{}])
    sweeps: list[Sweep] = field(default_factory=list)
    part: Callable[[Case, list[Any]], list[Any]] = lambda case, tensors: list(tensors)

    def cases(self, preset: str, dtypes: Sequence[str]) -> Iterator[Case]:
        """Every case of a preset."""
        for dims in self.shapes[preset]:
            for dtype in dtypes:
                for options in self.options:
                    yield Case(dims, dtype, options)

    def swept(self, preset: str) -> Iterator[Case]:
        """Every case of the scaling series, in the preset's first dtype and the op's first options."""
        for sweep in self.sweeps:
            for value in sweep.values[preset]:
                dtype = "bf16" if preset == "gpu" else "fp32"
                base = self.shapes["tiny"][0] if preset == "tiny" else sweep.base
                yield Case(base | {sweep.letter: value}, dtype, self.options[0], sweep.letter)
