"""Tuning of tile sizes for this GPU: `python -m bench tune [OP] [--shape AxB…] [--dtype NAME]`.

A row has the tile sizes, warps and stages of a kernel. For every kernel of an op, the candidate rows below alternate
with the current row, at the given sizes. A row that does not compile, does not fit or breaks the error rule is not
timed. A row that is at least 2 % faster is saved to disk, where the launchers find it (`fastgpt.kernels.tuned`).
Nothing else tunes kernels.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench.harness.cases import Case, Op
from bench.harness.machine import Machine
from bench.ops.registry import OPS
from fastgpt import use_backend
from fastgpt.testing import ErrorRule

TUNED = (
    *("attention", "cross_entropy", "linear_gelu", "gelu", "bias_gelu", "geglu", "swiglu", "relu_squared"),
    *("add_layer_norm", "add_rms_norm", "rms_norm", "rope"),
)
WARM_UP, ROUNDS = 2, 15
GAIN = 0.98  # a faster row takes at most this share of the current row's time

Row = tuple[int, ...]


def rows(*choices: tuple[int, ...]) -> list[Row]:
    """Return every combination of the choices."""
    return list(itertools.product(*choices))


# By kernel, in the order of its row's numbers: tile sizes, warps, stages.
_ATTENTION = rows((64, 128), (32, 64, 128), (4, 8), (2, 3))
_ATTENTION_BWD = rows((16, 32, 64), (32, 64, 128), (4, 8), (1, 2, 3))
_ELEMENTWISE = rows((1024, 2048, 4096, 8192), (4, 8))
_ELEMENTWISE_BIAS = rows((4, 8, 16), (256, 512), (4, 8))
CANDIDATES: dict[str, list[Row]] = {
    "attention_fwd": _ATTENTION,
    "attention_bwd": _ATTENTION_BWD,
    "attention_dkv": _ATTENTION_BWD,
    "attention_dq": _ATTENTION,
    "cross_entropy_fwd": rows((2048, 4096, 8192, 16384), (4, 8, 16)),
    "cross_entropy_bwd": rows((2048, 4096, 8192, 16384), (4, 8, 16)),
    "linear_gelu_fwd": [
        *rows((64, 128), (64, 128, 256), (32, 64), (4, 8), (3, 4)),
        *rows((16, 32, 64), (32,), (64, 128), (4,), (3, 4, 5)),
    ],
    "gelu_fwd": _ELEMENTWISE,
    "gelu_bwd": _ELEMENTWISE,
    "geglu_fwd": _ELEMENTWISE,
    "geglu_bwd": _ELEMENTWISE,
    "swiglu_fwd": _ELEMENTWISE,
    "swiglu_bwd": _ELEMENTWISE,
    "relu_squared_fwd": _ELEMENTWISE,
    "relu_squared_bwd": _ELEMENTWISE,
    "bias_gelu_fwd": _ELEMENTWISE_BIAS,
    "bias_gelu_bwd": _ELEMENTWISE_BIAS,
    "add_layer_norm_fwd": rows((1, 2, 4, 8, 16)),
    "add_layer_norm_bwd": rows((2048, 4096, 8192), (4, 8, 16), (128, 256, 512)),
    "rms_norm_fwd": rows((1, 2, 4, 8, 16)),
    "rms_norm_bwd": rows((2048, 4096, 8192), (4, 8, 16), (128, 256, 512)),
    "rope_fwd": rows((4, 8, 16, 32)),
}
REHEARSED = 2  # candidates of each kernel in a rehearsal


def run(names: list[str], shapes: list[str], dtypes: list[str], *, rehearse: bool) -> int:
    """Tune the kernels of ops.

    Returns:
        1 if the current row of a kernel breaks the error rule, else 0.

    Raises:
        ValueError: unknown op or wrong shape, or there is no GPU and `rehearse` is False.
    """
    for name in names:
        if name not in TUNED:
            raise ValueError(f"unknown op {name!r}. Use one of: {', '.join(TUNED)}")
    if not rehearse and not torch.cuda.is_available():
        raise ValueError("tuning needs a CUDA GPU. Use --rehearse for the same steps on the CPU.")
    ops = [OPS[name] for name in names or TUNED]
    cases = [(op, case) for op in ops for case in _cases(op, shapes, dtypes, rehearse)]
    with use_backend("triton"):
        if not rehearse:
            return _tune(cases, Machine("cuda"), rehearse=False)
        with tempfile.TemporaryDirectory() as folder, mock.patch.dict("os.environ", XDG_CACHE_HOME=folder):
            return _tune(cases, Machine("cpu"), rehearse=True)


def _cases(op: Op, shapes: list[str], dtypes: list[str], rehearse: bool) -> Iterator[Case]:
    preset = "tiny" if rehearse else "gpu"
    letters = list(op.shapes[preset][0])
    wanted = []
    for shape in shapes:
        sizes = shape.split("x")
        if len(sizes) != len(letters) or not all(s.isdecimal() and int(s) for s in sizes):
            raise ValueError(
                f"--shape {shape!r} does not fit {op.name}. Use {len(letters)} sizes: {'x'.join(letters)}."
            )
        wanted.append(dict(zip(letters, map(int, sizes), strict=True)))
    options = op.options[:1] if rehearse else op.options
    for dims, dtype, option in itertools.product(wanted or op.shapes[preset], dtypes, options):
        yield Case(dims, dtype, option)


def _tune(cases: list[tuple[Op, Case]], machine: Machine, *, rehearse: bool) -> int:
    from tqdm import tqdm

    from fastgpt.kernels import tuned

    print(f"{'kernel':<20}{'sizes':<22}{'dtype':<10}{'current row':>24}{'us':>10}{'best':>24}{'us':>10}")
    wrong, found = 0, {}
    with tqdm(cases, unit="case", disable=None) as bar:
        for op, case in bar:
            trials = _Trials(op, case, machine)
            for question, row in trials.questions().items():
                bar.set_description(f"{op.name} {case.name} {case.dtype} {question[0]}")
                candidates = [c for c in CANDIDATES[question[0]] if c != row]
                times = trials.times(question[0], [row, *candidates[: REHEARSED if rehearse else None]])
                wrong += row not in times
                best = _best(row, times)
                if rehearse:
                    best, times = list(times)[-1], {}
                if best != row:
                    found[question] = best
                with tqdm.external_write_mode():
                    print(_line(question, row, best, times))
    kept = tuned.save(machine.name(), found)
    if rehearse:
        read = len(tuned.load())
        print(f"a rehearsal: no row was chosen by its time; {read} rows were saved, loaded and deleted")
    else:
        print(f"{len(found)} rows are faster than the current ones: {kept}")
    return 1 if wrong else 0


def _best(row: Row, times: dict[Row, float]) -> Row:
    """Return the fastest row if it beats the current row by the factor `GAIN`, else the current row."""
    fastest = min(times, key=lambda r: times[r], default=row)
    return row if row in times and times[fastest] > GAIN * times[row] else fastest


def _line(question: tuple[str, str, Row], row: Row, best: Row, times: dict[Row, float]) -> str:
    kernel, dtype, size = question
    us = {r: f"{t * 1e6:.1f}" for r, t in times.items()}
    said = "the same" if best == row else str(best)
    sizes = "x".join(map(str, size)) or "any"
    times_said = f"{us.get(row, '-'):>10}{said:>24}{us.get(best, '-'):>10}"
    return f"{kernel:<20}{sizes:<22}{dtype:<10}{row!s:>24}{times_said}"


class _Trials:
    """A case that runs with different rows."""

    def __init__(self, op: Op, case: Case, machine: Machine) -> None:
        self.machine, self.function = machine, op.ours(case)
        self.inputs = op.inputs(case, machine.device)
        self.rule = ErrorRule(
            op.pytorch(case), self.inputs, exact=self._exact, part=lambda t: op.part(case, t), places=0
        )

    def _exact(self, *inputs: Any) -> Any:
        with use_backend("reference"):
            return self.function(*inputs)

    def questions(self) -> dict[tuple[str, str, Row], Row]:
        """Return the lookups of the op's launchers, with their current rows."""
        from fastgpt.kernels import tuned

        with tuned.trying({}) as trial:
            self._call("fwd+bwd")()
        return {question: row for question, row in trial.asked.items() if question[0] in CANDIDATES}

    def times(self, kernel: str, rows: list[Row]) -> dict[Row, float]:
        """Measure the median seconds of the op with each row that compiles, fits and passes the error rule."""
        from fastgpt.kernels import tuned

        direction = "fwd" if kernel.endswith("_fwd") else "fwd+bwd"
        good = []
        for row in rows:
            with tuned.trying({kernel: row}), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                try:
                    self.rule.check(self.function)
                    good.append(row)
                except Exception as error:  # the compiler raises many types
                    reason = str(error).strip().splitlines()
                    print(f"{kernel} {row}: {reason[0] if reason else type(error).__name__}")
        if not good:
            return {}
        call = self._call(direction)
        rounds = [
            self.machine.time_round([self._with(kernel, row, call) for row in good], good)
            for _ in range(WARM_UP + ROUNDS)
        ]
        return {
            row: statistics.median(taken.seconds for taken in times)
            for row, *times in zip(good, *rounds[WARM_UP:], strict=True)
        }

    def _with(
        self, kernel: str, row: Row, call: Callable[[], Any]
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        from fastgpt.kernels import tuned

        def timed() -> None:
            with tuned.trying({kernel: row}):
                call()

        return lambda: None, timed

    def _call(self, direction: str) -> Callable[[], Any]:
        def forward() -> list[Tensor]:
            found = self.function(*self.inputs)
            return [found] if isinstance(found, Tensor) else list(found)

        wanted = [x for x in self.inputs if isinstance(x, Tensor) and x.requires_grad]
        grads = [torch.randn_like(y) for y in forward()]

        def both() -> None:
            torch.autograd.grad(forward(), wanted, grads, allow_unused=True)

        return forward if direction == "fwd" else both
