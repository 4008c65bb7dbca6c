"""One case of one op: check every contender against the reference, then time them in turns.

A contender is one of our backends or a peer. All get the same inputs, threads and heap. First each is held to
the error rule (`fastgpt.testing.ErrorRule`, float64 from our reference): ours to twice PyTorch's error, which
is the contract, peers to ten times, which tells a wrong result from another choice of rounding. Then rounds: in
each, every contender runs once, so that whatever else the machine does hits all of them; a ratio is the median
over rounds of the two times of a round. Inputs rotate through more memory than the last cache holds.
"""

from __future__ import annotations

import gc
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastgpt
from bench.harness.cases import Case, Function, Op
from bench.harness.machine import DTYPES, ROOF_ROUNDS, Machine, percentile
from bench.harness.peers import MissingError
from bench.harness.records import EMPTY, Record
from fastgpt.testing import ErrorRule

OUR_FACTOR, PEER_FACTOR = 2.0, 10.0
_MAX_SETS = 8


@dataclass(frozen=True)
class Plan:
    """How much time a case may take.

    Attributes:
        seconds: for the rounds of one direction, about.
        min_rounds, max_rounds: whatever the time.
        directions: what is timed.
        backends: those of ours that take part; None for all that are available.
        peers: names of those that take part; None for all.
    """

    seconds: float = 8.0
    min_rounds: int = 5
    max_rounds: int = 41
    directions: tuple[str, ...] = ("fwd", "fwd+bwd")
    backends: tuple[str, ...] | None = None
    peers: tuple[str, ...] | None = None

    def rounds(self, seconds: float) -> int:
        """How many, where one takes so many seconds."""
        return max(self.min_rounds, min(self.max_rounds, int(self.seconds / max(seconds, 1e-9))))

    def ours(self, op: str) -> list[str]:
        """Those of our backends that can run an op here and are wanted."""
        found = [
            b for b, available in fastgpt.available_backends(op).items() if available and b != "reference"
        ]
        return [b for b in found if self.backends is None or b in self.backends]

    def wants(self, peer: str) -> bool:
        """Whether a peer takes part."""
        return self.peers is None or peer in self.peers


@dataclass
class Contender:
    """One of ours or a peer in a case, and what became of it."""

    backend: str
    peer: str | None
    make: Callable[[], Function]
    mutates: bool = False
    function: Function | None = None
    status: str = "ok"
    reason: str | None = None
    error: float | None = None
    times: dict[str, list[float]] = field(default_factory=dict)
    host_times: dict[str, list[float]] = field(default_factory=dict)  # on a GPU
    peak_bytes: int | None = None

    def fail(self, status: str, error: BaseException | str) -> None:
        """Out of the race, with the reason."""
        while isinstance(error, BaseException) and error.__cause__ is not None:
            error = error.__cause__  # compilers wrap what happened
        text = f"{type(error).__name__}: {error}" if status == "failed" else str(error)
        self.status, self.function = status, None
        self.reason = " ".join(text.split())[:300]

    def summary(self, direction: str) -> Record:
        """The fields of a record that describe the times of a direction."""
        found = summary(self.times[direction])
        if direction in self.host_times:
            found["host_seconds"] = statistics.median(self.host_times[direction])
        return found

    def record(self) -> Record:
        """What a record says of it, whatever was measured."""
        return EMPTY | {
            "backend": self.backend,
            "peer": self.peer,
            "status": self.status,
            "reason": self.reason,
            "verified": self.status == "ok",
            "error": self.error,
        }


def run_case(op: Op, case: Case, machine: Machine, plan: Plan) -> list[Record]:
    """Verify and time every contender of a case; one record a contender and direction, ours first."""
    contenders = _contenders(op, case, plan)
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _verify(op, case, machine, contenders)
        sets = _input_sets(op, case, machine, contenders)
        for direction in plan.directions:
            turn = partial(_turn, direction, sets)
            race(direction, contenders, turn, machine, plan)
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
    """The contenders of a case, verified but not timed, and inputs to call them with."""
    contenders = _contenders(op, case, plan)
    _verify(op, case, machine, contenders)
    return contenders, _input_sets(op, case, machine, contenders)[0]


def _contenders(op: Op, case: Case, plan: Plan) -> list[Contender]:
    found = []
    for backend in plan.ours(op.name):
        found.append(Contender(backend, None, partial(_on, backend, op.ours(case))))
    for peer in op.peers:
        if plan.wants(peer.name):
            found.append(Contender(peer.package, peer.name, partial(peer.make, case), peer.mutates))
    return found


def _on(backend: str, function: Function) -> Function:
    """The function with our backend pinned."""

    def pinned(*inputs: Any) -> Any:
        with fastgpt.use_backend(backend):
            return function(*inputs)

    return pinned


def _verify(op: Op, case: Case, machine: Machine, contenders: list[Contender]) -> None:
    inputs = op.inputs(case, machine.device)
    rule = ErrorRule(
        op.pytorch(case),
        inputs,
        exact=_on("reference", op.ours(case)),
        part=lambda t: op.part(case, t),
        places=0,
    )
    for contender in contenders:
        try:
            contender.function = contender.make()
            if contender.mutates:
                judged = contender.function
                function: Function = lambda *x, f=judged: f(*map(_copied, x))  # noqa: E731
            else:
                function = contender.function
            factor = OUR_FACTOR if contender.peer is None else PEER_FACTOR
            contender.error = rule.check(function, factor) * factor / OUR_FACTOR
        except MissingError as error:
            contender.fail("missing", error)
        except AssertionError as error:
            contender.fail("wrong", error)
        except Exception as error:  # whatever a peer raises is its own row's affair
            contender.fail("failed", error)


def _copied(x: Any) -> Any:
    """A copy that autograd sees through."""
    return x.clone() if isinstance(x, Tensor) else x


@dataclass
class InputSet:
    """One of the rotating sets: inputs, copies for contenders that overwrite them, and upstream gradients."""

    inputs: list[Any]
    original: list[Any] | None
    upstream: Tensor

    def clear(self) -> None:
        """No gradients."""
        for x in self.inputs:
            if isinstance(x, Tensor):
                x.grad = None

    def restore(self) -> None:
        """No gradients, and the values that the inputs had."""
        self.clear()
        assert self.original is not None
        with torch.no_grad():
            for x, kept in zip(self.inputs, self.original, strict=True):
                if isinstance(x, Tensor):
                    x.copy_(kept)


def _input_sets(op: Op, case: Case, machine: Machine, contenders: list[Contender]) -> list[InputSet]:
    """As many sets of inputs as it takes to be four times the last cache; at least two."""
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
        sets.append(InputSet(inputs, original, torch.randn_like(output)))
    return sets


Call = Callable[[], Any]
Turn = tuple[Call, Call]  # what is done before, untimed, and what is timed


def _turn(direction: str, sets: list[InputSet], contender: Contender, number: int) -> Turn:
    """A contender's turn in a round. Inputs require gradients in both directions, as in training."""
    function, one = contender.function, sets[number % len(sets)]
    assert function is not None

    def call() -> None:
        output = function(*one.inputs)
        if direction == "fwd+bwd":
            output.backward(one.upstream)

    return one.restore if contender.mutates else one.clear, call


def guarded(contender: Contender, call: Call) -> Call:
    """The call, but what goes wrong stands in the contender's row and does not stop the others."""

    def guarded_call() -> None:
        try:
            call()
        except Exception as error:
            contender.fail("failed", error)

    return guarded_call


def race(
    direction: str,
    contenders: list[Contender],
    turn: Callable[[Contender, int], Turn],
    machine: Machine,
    plan: Plan,
    *,
    whole: bool = False,
) -> None:
    """Rounds in which all contenders that are right take their turns; the times are in `Contender.times`.

    Args:
        turn: for a contender and the number of the round, what is to be done.
        whole: on a GPU, whether the host's part counts (`Machine.time_round`).
    """

    def one_round(number: int) -> float:
        racing = [c for c in contenders if c.status == "ok"]
        # Alternating order, so that none always finds the same neighbour's leavings in the cache.
        racing = racing if number % 2 else racing[::-1]
        turns = [(c, *turn(c, number)) for c in racing]
        calls = [(before, guarded(c, call)) for c, before, call in turns]
        times = machine.time_round(calls, [id(c) for c in racing], whole=whole)
        for contender, taken in zip(racing, times, strict=True):
            contender.times.setdefault(direction, []).append(taken.seconds)
            if machine.is_gpu:
                contender.host_times.setdefault(direction, []).append(taken.host)
        return sum(max(taken.seconds, taken.host) for taken in times)

    taken = one_round(0)  # what had to be compiled was compiled when it was verified
    if taken < plan.seconds / 10:
        taken = one_round(1)
    for contender in contenders:
        contender.times.pop(direction, None)
        contender.host_times.pop(direction, None)
    for number in range(plan.rounds(taken)):
        one_round(number)


def measure_peak_memory(contender: Contender, turn: Turn, machine: Machine) -> None:
    """Peak memory of a turn."""
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
    bandwidth, gemm = machine.roofs(case.dtype)
    record["roof"] = max(moved / bandwidth, flops / gemm)
    record["bound"] = "memory" if moved / bandwidth > flops / gemm else "compute"
    if contender.status == "ok":
        record |= contender.summary(direction)
        record["share_of_roof"] = record["roof"] / record["seconds"]
        if both:
            record |= {"peak_bytes": contender.peak_bytes, "least_peak_bytes": op.held(case)}
        record |= ratio(contender, direction, contenders)
    return record


def summary(times: list[float]) -> Record:
    """Median, spread and count of some times."""
    median = statistics.median(times)
    spread = (percentile(times, 0.9) - percentile(times, 0.1)) / 2 / median
    return {"seconds": median, "spread": spread, "rounds": len(times)}


def ratio(contender: Contender, direction: str, contenders: list[Contender]) -> Record:
    """A peer's time over ours, round by round, for the fastest of ours; nothing for ours."""
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


def roof_records(machine: Machine, dtypes: Sequence[str]) -> Iterator[Record]:
    """The roofs of each dtype: copy bandwidth and rate of a matrix product."""
    for dtype in dtypes:
        bandwidth, gemm = machine.roofs(dtype)
        n, size = machine.roof_sizes
        for direction, name, flops, moved, seconds in (
            ("copy", f"copy of {size >> 20} MiB", 0, 2 * size, 2 * size / bandwidth),
            ("gemm", f"matrix product {n}³", 2 * n**3, 3 * n * n * DTYPES[dtype].itemsize, 2 * n**3 / gemm),
        ):
            yield EMPTY | {
                "op": "roof",
                "group": "roof",
                "case": name,
                "dims": {"N": n} if direction == "gemm" else {},
                "dtype": dtype,
                "direction": direction,
                "backend": "torch",
                "peer": "PyTorch",
                "status": "ok",
                "verified": True,
                "seconds": seconds,
                "spread": 0.0,
                "rounds": ROOF_ROUNDS,
                "flops": flops,
                "bytes": moved,
                "roof": seconds,
                "share_of_roof": 1.0,
                "bound": "memory" if direction == "copy" else "compute",
            }
