"""Choice of the backend that serves a call: a static preference table, `use_backend`, and the reasons.

A backend is a set of implementations of the ops in `fastgpt.ops`:

    reference   plain PyTorch, any device and dtype; the specification
    cpp         C++ for the CPU, compiled ahead of time
    triton      Triton for GPUs (and, for tests, Triton's interpreter on the CPU)
    cuda        CUDA C++ for GPUs, compiled ahead of time

The choice is made in Python, per call, and under `torch.compile` at trace time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import sys
import threading
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import torch

from . import extension

BACKENDS = ("reference", "cpp", "triton", "cuda")

# Below, Triton multiplies matrices without tensor cores, with more shared memory than a block has.
TRITON_CAPABILITY = (8, 0)

# The first backend in the row that can run the case serves it under "auto".
PREFERENCE: dict[str, tuple[str, ...]] = {
    "cpu": ("cpp", "reference"),
    "cuda": ("triton", "cuda", "reference"),
}

# The ops, by what matters most to a training step. The files of each are found by its name.
OPS = (
    *("attention", "cross_entropy", "linear_cross_entropy", "attention_varlen", "linear"),
    *("gelu", "bias_gelu", "linear_gelu", "mlp", "geglu", "swiglu", "relu_squared"),
    *("add_layer_norm", "add_rms_norm", "rms_norm", "rope"),
)
# Ops without files of their own, and whose they share.
SHARED_FILES = {"bias_gelu": "gelu", "add_rms_norm": "rms_norm"}

PYTORCH = "pytorch"  # what the drop-in falls back to; not a backend one can ask for


class BackendUnavailable(RuntimeError):  # noqa: N818  (the name is public)
    """A backend that was chosen by name cannot run the case; the message says why."""


@dataclasses.dataclass(frozen=True)
class Availability:
    """Availability of a backend on this machine; false has a reason."""

    available: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.available


@dataclasses.dataclass(frozen=True)
class Decision:
    """The backend chosen for one call of one op, and why each other one was not."""

    op: str
    backend: str | None
    reasons: dict[str, str]
    drop_in: bool = dataclasses.field(
        default=False, compare=False, repr=False
    )  # who asked: not yet the op itself

    def __str__(self) -> str:
        lines = [f"{self.op}: {self.backend or 'no backend can run this'}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """Result of `explain`: one `Decision` per op called, in order."""

    decisions: tuple[Decision, ...]

    @property
    def backend(self) -> str | None:
        """The backend of the first op called."""
        return self.decisions[0].backend if self.decisions else None

    @property
    def reasons(self) -> dict[str, str]:
        """Reasons why the other backends would not serve the first op called."""
        return self.decisions[0].reasons if self.decisions else {}

    def __str__(self) -> str:
        counted = Counter(map(str, self.decisions))
        lines = [f"{n} × {decision}" if n > 1 else decision for decision, n in counted.items()]
        return "\n".join(lines) or "no fastgpt op was called"


class _ThreadState(threading.local):
    backend: str = "auto"
    recording: list[Decision] | None = None


_thread = _ThreadState()

# What `torch.compile` reads while tracing: Dynamo guards a module global, so that code compiled
# under one backend is compiled again under another. It follows the last `use_backend` of any thread.
_traced_backend = "auto"


def current_backend() -> str:
    """Return the backend chosen in this thread: "auto" or a name."""
    return _traced_backend if torch.compiler.is_compiling() else _thread.backend


class use_backend(contextlib.ContextDecorator):  # noqa: N801  (reads as a verb, like torch.no_grad)
    """Context manager that runs the ops on one backend, or restores the choice with "auto".

    Nestable, thread-safe (each thread starts at "auto") and usable as a decorator. A named backend
    that cannot run a case raises `BackendUnavailable` with the reason; it never falls back.

    Under `torch.compile` the choice is taken while tracing and guarded: entering another backend
    compiles again. Threads that *compile* under different backends at the same time are not supported.

    Args:
        name: "auto", "reference", "cpp", "triton" or "cuda".

    Raises:
        ValueError: the name is another.
    """

    def __init__(self, name: str) -> None:
        if name != "auto" and name not in BACKENDS:
            known = ", ".join(("auto", *BACKENDS))
            raise ValueError(f"there is no backend {name!r}; choose one of {known}")
        self.name = name
        self._outer: list[str] = []

    def __enter__(self) -> use_backend:
        global _traced_backend  # noqa: PLW0603
        self._outer.append(_thread.backend)
        _thread.backend = _traced_backend = self.name
        return self

    def __exit__(self, *exc: object) -> None:
        global _traced_backend  # noqa: PLW0603
        _thread.backend = _traced_backend = self._outer.pop()

    def _recreate_cm(self) -> use_backend:  # a decorated function may run in several threads
        return use_backend(self.name)


def triton_interpreted() -> bool:
    """Return whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # an import hook forbids it, or it is half imported
        return False


def _machine_availability(backend: str) -> Availability:
    """Return whether this machine has the backend, for any op."""
    if backend == "reference":
        return Availability(True)
    if backend == "cpp":
        return Availability(extension.loaded(), extension.problem())
    if backend == "triton":
        if not _installed("triton"):
            return Availability(False, "triton is not installed (pip install triton)")
        if triton_interpreted() or torch.cuda.is_available():
            return Availability(True)
        return Availability(
            False, "no CUDA GPU is visible (TRITON_INTERPRET=1 interprets the kernels on a CPU)"
        )
    return Availability(extension.cuda_loaded(), extension.cuda_problem())


def available_backends(op: str | Callable[..., Any]) -> dict[str, Availability]:
    """The backends of one op on this machine: `{"cpp": Availability, ...}`, true or false with `.reason`.

    Args:
        op: the op or its name: `ops.gelu` or "gelu".

    Raises:
        ValueError: there is no such op.
    """
    name = getattr(op, "__name__", op)
    if name not in OPS:
        raise ValueError(f"there is no op {name!r}; the ops are {', '.join(OPS)}")
    return {backend: _machine_availability(backend) for backend in BACKENDS}


def _machine_refusal(backend: str, device: str, number: int | None) -> str | None:
    """`_refusal` for what does not depend on the case. Dynamo calls it and takes the answer as a constant."""
    return _cached_machine_refusal(backend, device, number)


# What `torch.compiler.assume_constant_result` sets; calling that would import all of Dynamo, and Triton with it.
_machine_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _cached_machine_refusal(backend: str, device: str, number: int | None) -> str | None:
    # The device first: a call on the CPU asks nothing of the GPUs, which a forked process may not.
    if backend == "cpp" and device != "cpu":
        return f"the tensors are on {device} and cpp serves the CPU"
    if backend == "triton" and device != "cuda" and not triton_interpreted():
        hint = " (TRITON_INTERPRET=1 interprets the kernels on a CPU)" if device == "cpu" else ""
        return f"the tensors are on {device} and triton serves CUDA GPUs{hint}"
    if backend == "cuda" and device != "cuda":
        return f"the tensors are on {device} and cuda serves CUDA GPUs"
    available = _machine_availability(backend)
    if not available:
        return available.reason
    if backend == "triton" and device == "cuda":
        return _triton_problem(number)
    if backend == "cuda":  # one of the GPUs has kernels, which need not be this one
        return extension.cuda_problem(number) or None
    return None


def shared_memory(device: str, number: int | None) -> int:
    """Bytes of shared memory that a block may have on a GPU. Dynamo takes the answer as a constant."""
    return _cached_shared_memory(device, number)


shared_memory._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _cached_shared_memory(device: str, number: int | None) -> int:
    if device != "cuda":
        return 0
    properties: Any = torch.cuda.get_device_properties(number)  # whose stubs lack the name
    return int(properties.shared_memory_per_block_optin)


def _triton_problem(number: int | None) -> str | None:
    """Return why Triton cannot serve a GPU, or None. It compiles a part of its driver at the first launch."""
    found = torch.cuda.get_device_capability(number)
    if found < TRITON_CAPABILITY:
        least, this = (".".join(map(str, pair)) for pair in (TRITON_CAPABILITY, found))
        return f"Triton needs compute capability {least}, and this GPU has {this}"
    try:
        from triton.runtime import driver

        driver.active.utils  # noqa: B018  (the first access compiles it)
    except Exception as error:  # no C compiler, no Python.h, no libcuda
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"Triton's driver cannot be compiled: {reason[0]}"
    return None


def kernels_off(device: torch.device) -> str:
    """Return why no compiled kernel can run on a device, and the repair; empty if one can."""
    compiled = [name for name in PREFERENCE.get(device.type, ()) if name != "reference"]
    reasons = {name: _machine_refusal(name, device.type, device.index) for name in compiled}
    if not reasons or None in reasons.values():
        return ""
    found = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    return f"the fused kernels are off on {device} and plain PyTorch runs instead: {found}"


def resolve_backend(name: str, device: torch.device) -> str:
    """Return the backend of a name on a device; "auto" is the first that this machine can run there.

    Raises:
        BackendUnavailable: a backend that was chosen by name cannot run on this machine.
    """
    if name != "auto":
        if reason := _machine_refusal(name, device.type, device.index):
            raise BackendUnavailable(f"the backend {name} cannot be used: {reason}")
        return name
    order = PREFERENCE.get(device.type, ("reference",))
    return next(backend for backend in order if _machine_refusal(backend, device.type, device.index) is None)


def _warn_if_kernels_are_off(device: torch.device) -> None:
    """Warn once a device. Dynamo calls it while tracing."""
    _warn_once(device)


_warn_if_kernels_are_off._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.cache
def _warn_once(device: torch.device) -> None:
    if reason := kernels_off(device):
        warnings.warn(f"fastgpt: {reason}", RuntimeWarning, stacklevel=2)


def _refusal(op: str, backend: str, device: torch.device, case: Callable[[str], str | None]) -> str | None:
    """Return why `backend` cannot run this case of `op` on `device`, or None if it can."""
    reason = _machine_refusal(backend, device.type, device.index)
    return case(backend) if reason is None else reason


def _autograd_is_traced() -> bool:
    """Return whether Dynamo traces calls of torch.autograd, through which the backward ops cannot be differentiated."""
    config: Any = sys.modules.get("torch._dynamo.config")
    return bool(getattr(config, "trace_autograd_ops", False))


_autograd_is_traced._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_autograd_in_graph(backend: str) -> str:
    return "torch._dynamo.config.trace_autograd_ops is set, and the graph may differentiate a backward"


def select(op: str, device: torch.device, case: Callable[[str], str | None], *, drop_in: bool = False) -> str:
    """The backend that serves this call.

    Args:
        op: the op's name.
        device: where its tensors are.
        case: maps a backend to the reason why it cannot run this case, or to None.
        drop_in: the caller can fall back to `torch.nn.functional`: under "auto" the answer may then
            be "pytorch", which is preferred to the (slow) reference.

    Raises:
        BackendUnavailable: a backend that was chosen by name cannot run the case.
    """
    if torch.compiler.is_compiling():
        asked = _traced_backend
        if drop_in and _autograd_is_traced():
            case = _refuse_autograd_in_graph
    elif _thread.recording is not None:
        return _select_recording(op, device, case, drop_in)
    else:
        asked = _thread.backend
    if asked != "auto":
        reason = _refusal(op, asked, device, case)
        if reason is not None:
            raise BackendUnavailable(f"{op} cannot run on the {asked} backend: {reason}")
        return asked
    for backend in PREFERENCE.get(device.type, ("reference",)):
        if backend == "reference":
            _warn_if_kernels_are_off(device)
            if drop_in:
                break
        if _refusal(op, backend, device, case) is None:
            return backend
    if drop_in:
        return PYTORCH
    # Only the reference itself can have refused here, and it says why.
    raise BackendUnavailable(f"{op} cannot run: {_refusal(op, 'reference', device, case)}")


def refuse(op: str, reason: str) -> NoReturn:
    """Raise BackendUnavailable for a call that no backend can serve; `explain` sees it."""
    if not torch.compiler.is_compiling() and _thread.recording is not None:
        _thread.recording.append(Decision(op, None, dict.fromkeys(BACKENDS, reason)))
    raise BackendUnavailable(f"{op} cannot run: {reason}")


def _select_recording(op: str, device: torch.device, case: Callable[[str], str | None], drop_in: bool) -> str:
    """`select` for `explain`: the same answer, and a record of it with every reason."""
    recording, _thread.recording = _thread.recording, None
    assert recording is not None
    reasons: dict[str, str] = {}
    chosen: str | None = None
    try:
        chosen = select(op, device, case, drop_in=drop_in)
        return chosen
    finally:
        order = PREFERENCE.get(device.type, ("reference",))
        for backend in BACKENDS:
            if backend == chosen:
                continue
            reason = _refusal(op, backend, device, case)
            if reason is None and current_backend() != "auto":
                reason = f"use_backend({current_backend()!r}) chose another"
            elif reason is None and backend in order and chosen in order:
                reason = f"{chosen} is preferred on {device.type}"
            elif reason is None and backend == "reference":
                reason = "torch.nn.functional computes the same and is faster"
            reasons[backend] = reason or f"it is never chosen automatically on {device.type}"
        # A drop-in asks before it calls the op, which asks again: that is one decision.
        before = recording[-1] if recording and not drop_in else None
        if before is not None and before.drop_in and (before.op, before.backend) == (op, chosen):
            recording.pop()
        recording.append(Decision(op, chosen, reasons, drop_in))
        _thread.recording = recording


@contextlib.contextmanager
def _record() -> Iterator[list[Decision]]:
    outer, _thread.recording = _thread.recording, []
    try:
        yield _thread.recording
    finally:
        _thread.recording = outer


def explain(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Calls `fn(*args, **kwargs)` once and reports which backend served each fastgpt op, and why.

    A `BackendUnavailable` raised on the way is part of the answer: the decision then names no backend.

        >>> print(fastgpt.explain(fastgpt.ops.gelu, torch.randn(3)))
        gelu: cpp
          not reference: cpp is preferred on cpu
          ...
    """
    with _record() as decisions, contextlib.suppress(BackendUnavailable):
        fn(*args, **kwargs)
    return Explanation(tuple(decisions))
