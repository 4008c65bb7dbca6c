"""Measurement of one case of an op: check every contender against the reference, then time them in rounds.

A contender is a backend of fastgpt or a peer. All have the same inputs, threads and malloc settings. First each must
pass the error rule (`fastgpt.testing.ErrorRule`, with our reference in float64). The limit for our backends is twice
PyTorch's error. The limit for peers is ten times PyTorch's error, which separates wrong results from differences in
rounding. Then each contender runs once per round, so that a disturbance of the machine affects all of them. A ratio
is the median over rounds of the ratio of two times of the same round. The inputs rotate through more memory than the
last-level cache holds.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastgpt
from bench.harness.cases import Case, Function, Op
from bench.harness.machine import Machine, percentile
from bench.harness.peers import MissingError
from bench.harness.records import EMPTY, Record
from fastgpt.testing import ErrorRule

OUR_FACTOR, PEER_FACTOR = 2.0, 10.0
_MAX_SETS = 8


@dataclass(frozen=True)
class Plan:
    """Duration and contenders of the measurement of a case.

    Attributes:
        seconds: approximate duration of the rounds of one direction.
        min_rounds, max_rounds: limits of the number of rounds, independent of `seconds`.
        directions: timed directions, "fwd" and "fwd+bwd".
        backends: backends of fastgpt that take part; None for all available ones.
        peers: names of the peers that take part; None for all.
    """

    seconds: float = 8.0
    min_rounds: int = 5
    max_rounds: int = 41
    directions: tuple[str, ...] = ("fwd", "fwd+bwd")
    backends: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None

    def rounds(self, seconds: float) -> int:
        """Return the number of rounds if one round takes `seconds`."""
        return max(self.min_rounds, min(self.max_rounds, int(self.seconds / max(seconds, 1e-9))))

    def ours(self, op: str) -> list[str]:
        """List the selected backends that can run an op on this machine."""
        found = [
            b for b, available in fastgpt.available_backends(op).items() if available and b != "reference"
        ]
        return [b for b in found if self.backends is None or b in self.backends]

    def includes(self, peer: str) -> bool:
        """Return True if a peer takes part."""
        return self.peers is None or peer in self.peers


@dataclass
class Contender:
    """A backend of fastgpt or a peer in one case, with its results.

    Attributes:
        make: returns the function to measure; raises `MissingError` if it cannot run here.
        mutates: the function overwrites its inputs.
        status: "ok", "missing", "failed" or "wrong"; `reason` explains a status other than "ok".
        error: largest error over the error that is allowed for our backends.
        times, host_times: seconds of each round by direction; host times on a GPU only.
    """

    backend: str
    peer: str | None
    make: Callable[[], Function]
    mutates: bool = False
    function: Function | None = None
    status: str = "ok"
    reason: str | None = None
    error: float | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    host_times: dict[str, list[float]] = field(default_factory=dict)
    peak_bytes: int | None = None

    def fail(self, status: str, error: BaseException | str) -> None:
        """Exclude the contender from further rounds, with the root cause of `error` as the reason."""
        while isinstance(error, BaseException) and error.__cause__ is not None:
            error = error.__cause__  # compilers wrap the original exception
        text = f"{type(error).__name__}: {error}" if status == "failed" else str(error)
        self.status, self.function = status, None
        self.reason = " ".join(text.split())[:300]

    def summary(self, direction: str) -> Record:
        """Return the fields of a record for the times of a direction."""
        found = summary(self.times[direction])
        if direction in self.host_times:
            found["host_seconds"] = statistics.median(self.host_times[direction])
        return found

    def record(self) -> Record:
        """Return the fields of a record that do not depend on the measurement."""
        return EMPTY | {
            "backend": self.backend,
            "peer": self.peer,
            "status": self.status,
            "reason": self.reason,
            "verified": self.status == "ok",
            "error": self.error,
        }


def run_case(op: Op, case: Case, machine: Machine, plan: Plan) -> list[Record]:
    """Verify and time every contender of a case.

    Returns:
        One record for each direction and contender, our backends first.
    """
    contenders = _contenders(op, case, plan)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _verify(op, case, machine, contenders)
        sets = _input_sets(op, case, machine, contenders)
        for direction in plan.directions:
            turn = partial(_turn, direction, sets)
            time_rounds(direction, contenders, turn, machine, plan)
        for one in sets:
            one.clear()
        for contender in contenders:
            if contender.status == "ok":
                measure_peak_memory(contender, _turn("fwd+bwd", sets, contender, 0), machine)
                sets[0].clear()
    gc.collect()
    return [
        _record(op, case, contender, direction, contenders, machine)
        for direction in plan.directions
        for contender in contenders
    ]


def contenders_of(op: Op, case: Case, machine: Machine, plan: Plan) -> tuple[list[Contender], InputSet]:
    """Verify the contenders of a case without timing them.

    Returns:
        The contenders, and inputs for them.
    """
    contenders = _contenders(op, case, plan)
    _verify(op, case, machine, contenders)
    return contenders, _input_sets(op, case, machine, contenders)[0]


def _contenders(op: Op, case: Case, plan: Plan) -> list[Contender]:
    found = []
    for backend in plan.ours(op.name):
        found.append(Contender(backend, None, partial(_with_backend, backend, op.ours(case))))
    for peer in op.peers:
        if plan.includes(peer.name):
            found.append(Contender(peer.package, peer.name, partial(peer.make, case), peer.mutates))
    return found


def _with_backend(backend: str, function: Function) -> Function:
    """Wrap a function so that it runs with a backend of fastgpt."""

    def pinned(*inputs: Any) -> Any:
        with fastgpt.use_backend(backend):
            return function(*inputs)

    return pinned


def _verify(op: Op, case: Case, machine: Machine, contenders: list[Contender]) -> None:
    inputs = op.inputs(case, machine.device)
    rule = ErrorRule(
        op.pytorch(case),
        inputs,
        exact=_with_backend("reference", op.ours(case)),
        part=lambda t: op.part(case, t),
        places=0,
    )
    for contender in contenders:
        try:
            contender.function = contender.make()
            if contender.mutates:
                checked = contender.function
                function: Function = lambda *x, f=checked: f(*map(_clone, x))  # noqa: E731
            else:
                function = contender.function
            factor = OUR_FACTOR if contender.peer is None else PEER_FACTOR
            contender.error = rule.check(function, factor) * factor / OUR_FACTOR
        except MissingError as error:
            contender.fail("missing", error)
        except AssertionError as error:
            contender.fail("wrong", error)
        except Exception as error:  # an error of a peer belongs in its own record
            contender.fail("failed", error)


def _clone(x: Any) -> Any:
    """Clone a tensor within autograd; return anything else unchanged."""
    return x.clone() if isinstance(x, Tensor) else x


@dataclass
class InputSet:
    """One of the rotating sets of inputs.

    Attributes:
        original: copies of the inputs for contenders that overwrite them; None if no contender does.
        upstream: gradient with respect to the output, or one for each output.
    """

    inputs: list[Any]
    original: list[Any] | None
    upstream: Any

    def clear(self) -> None:
        """Delete the gradients."""
        for x in self.inputs:
            if isinstance(x, Tensor):
                x.grad = None

    def restore(self) -> None:
        """Delete the gradients and restore the values of the inputs."""
        self.clear()
        assert self.original is not None
        with torch.no_grad():
            for x, kept in zip(self.inputs, self.original, strict=True):
                if isinstance(x, Tensor):
                    x.copy_(kept)


def _input_sets(op: Op, case: Case, machine: Machine, contenders: list[Contender]) -> list[InputSet]:
    """Create enough sets of inputs to fill four times the last-level cache; at least two and at most `_MAX_SETS`."""
    first = op.inputs(case, machine.device)
    size = sum(x.nbytes for x in first if isinstance(x, Tensor))
    count = min(_MAX_SETS, max(2, -(-4 * machine.cache_bytes() // max(1, size))))
    with torch.no_grad():
        output = op.pytorch(case)(*first)
    mutated = any(c.mutates and c.status == "ok" for c in contenders)
    sets = []
    for i in range(count):
        inputs = first if i == 0 else op.inputs(case, machine.device)
        original = [x.detach().clone() for x in inputs] if mutated else None
        upstream = (
            [torch.randn_like(y) for y in output] if isinstance(output, tuple) else torch.randn_like(output)
        )
        sets.append(InputSet(inputs, original, upstream))
    return sets


Call = Callable[[], Any]
Turn = tuple[Call, Call]  # untimed preparation, timed call


def _turn(direction: str, sets: list[InputSet], contender: Contender, number: int) -> Turn:
    """Return the turn of a contender in a round. The inputs require gradients in both directions, as in training."""
    function, one = contender.function, sets[number % len(sets)]
    assert function is not None

    def call() -> None:
        output = function(*one.inputs)
        if direction == "fwd+bwd":
            torch.autograd.backward(output, one.upstream)

    return one.restore if contender.mutates else one.clear, call


def guarded(contender: Contender, call: Call) -> Call:
    """Wrap a call so that an exception marks the contender as failed and does not stop the others."""

    def guarded_call() -> None:
        try:
            call()
        except Exception as error:
            contender.fail("failed", error)

    return guarded_call


def time_rounds(
    direction: str,
    contenders: list[Contender],
    turn: Callable[[Contender, int], Turn],
    machine: Machine,
    plan: Plan,
    *,
    whole: bool = False,
) -> None:
    """Time all verified contenders in rounds; the results are in `Contender.times` and `Contender.host_times`.

    Args:
        turn: returns the turn of a contender in the round with a given number.
        whole: on a GPU, include the host time (see `Machine.time_round`).
    """

    def one_round(number: int) -> float:
        active = [c for c in contenders if c.status == "ok"]
        # The order alternates, because a contender can find data of the previous one in the cache.
        active = active if number % 2 else active[::-1]
        turns = [(c, *turn(c, number)) for c in active]
        calls = [(before, guarded(c, call)) for c, before, call in turns]
        times = machine.time_round(calls, [id(c) for c in active], whole=whole)
        for contender, taken in zip(active, times, strict=True):
            contender.times.setdefault(direction, []).append(taken.seconds)
            if machine.is_gpu:
                contender.host_times.setdefault(direction, []).append(taken.host)
        return sum(max(taken.seconds, taken.host) for taken in times)

    taken = one_round(0)  # compilation is over: the check has run every contender
    if taken < plan.seconds / 10:
        taken = one_round(1)
    for contender in contenders:
        contender.times.pop(direction, None)
        contender.host_times.pop(direction, None)
    for number in range(plan.rounds(taken)):
        one_round(number)


def measure_peak_memory(contender: Contender, turn: Turn, machine: Machine) -> None:
    """Measure the peak memory of a turn, into `Contender.peak_bytes`."""
    before, call = turn
    before()
    contender.peak_bytes = machine.peak_bytes(guarded(contender, call))


def _record(
    op: Op, case: Case, contender: Contender, direction: str, contenders: list[Contender], machine: Machine
) -> Record:
    both = direction == "fwd+bwd"
    flops, moved = op.flops(case)[both], op.bytes(case)[both]
    record = contender.record() | {
        "op": op.name,
        "group": "scaling" if case.sweep else "ops",
        "case": case.name,
        "dims": case.dims,
        "dtype": case.dtype,
        "direction": direction,
        "flops": flops,
        "bytes": moved,
    }
    if case.sweep:
        record["sweep"] = case.sweep
    bandwidth, matmul_peak = machine.roofline_bounds(case.dtype)
    record["roofline_seconds"] = max(moved / bandwidth, flops / matmul_peak)
    record["bound"] = "memory" if moved / bandwidth > flops / matmul_peak else "compute"
    if contender.status == "ok":
        record |= contender.summary(direction)
        record["share_of_roofline"] = record["roofline_seconds"] / record["seconds"]
        if both:
            record |= {"peak_bytes": contender.peak_bytes, "min_peak_bytes": op.min_peak_bytes(case)}
        record |= ratio(contender, direction, contenders)
    return record


def summary(times: list[float]) -> Record:
    """Return the fields `seconds` (median), `spread` and `rounds` for the times of a contender."""
    median = statistics.median(times)
    spread = (percentile(times, 0.9) - percentile(times, 0.1)) / 2 / median
    return {"seconds": median, "spread": spread, "rounds": len(times)}


def ratio(contender: Contender, direction: str, contenders: list[Contender]) -> Record:
    """Return the fields of a peer's time over that of our fastest backend, round by round; empty for our backends."""
    ours = [c.times[direction] for c in contenders if c.peer is None and c.status == "ok"]
    if contender.peer is None or not ours:
        return {}
    best = min(ours, key=statistics.median)
    ratios = [t / o for t, o in zip(contender.times[direction], best, strict=True)]
    return {
        "ratio": statistics.median(ratios),
        "ratio_low": percentile(ratios, 0.1),
        "ratio_high": percentile(ratios, 0.9),
    }
