"""Registers the ops: one schema an op, one fake, an implementation per backend.

For an op X and each backend b the library `fastgpt` holds `X_fwd_b` and `X_bwd_b`, all with X's
one schema. The reference and Triton are Python and registered here, as is what the CUDA backend makes of
PyTorch's products; compiled libraries supply theirs with TORCH_LIBRARY_IMPL. The implementations are opaque to
`torch.compile`.
"""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor

from .._ops import NAMESPACE, ops
from ..backends import BACKENDS
from . import _flops

_library = torch.library.Library(NAMESPACE, "DEF")

Kernel = Callable[..., Any]


def define(
    name: str,
    schema: str,
    *,
    fake: Kernel,
    reference: Kernel,
    check: Callable[..., object],
    module: str | None,
    triton: Kernel | None = None,
    cuda: Kernel | str | None = None,
) -> dict[str, Kernel]:
    """Define `fastgpt::{name}_{backend}` for every backend and return the overloads by backend.

    Args:
        name: the op and its direction, such as "gelu_fwd".
        schema: arguments and results in PyTorch's schema language, without a name.
        fake: computes the results' shapes, dtypes and strides from fake tensors.
        reference: the implementation of the reference backend.
        check: raises where arguments do not fit each other, so that no kernel leaves a tensor's memory. Called with the
            op's full name and the arguments before every implementation in Python; compiled ones check for themselves.
        module: the file in `fastgpt.kernels` whose function `name` is Triton's launcher, or None.
        triton: the implementation of the Triton backend where it is not in `fastgpt.kernels`.
        cuda: that of the CUDA backend where it is Python: a function, or "file.function" in `fastgpt.kernels`, a file
            that does not import Triton. None where the compiled library has the op.
    """
    overloads = {}
    for backend in BACKENDS:
        op = f"{name}_{backend}"
        _library.define(op + schema)
        torch.library.register_fake(f"{NAMESPACE}::{op}", _on_one_device(op, fake), lib=_library)
        overloads[backend] = getattr(ops, op).default
    _flops.register(name, list(overloads.values()))
    overloads["cuda"] = _naming_failed_allocations(overloads["cuda"])
    kernels = {
        "reference": reference,
        "triton": triton if module is None else f"{module}.{name}",
        "cuda": cuda,
    }
    for backend, kernel in kernels.items():
        if kernel is not None:
            op = f"{name}_{backend}"
            _library.impl(op, _checked(op, check, kernel), "CompositeExplicitAutograd")
    return overloads


def _checked(op: str, check: Callable[..., object], kernel: Kernel | str) -> Kernel:
    """The kernel after its checks. Autocast has been applied in `ops`; inside a kernel it must not act again.

    Args:
        kernel: itself, or "file.function" in `fastgpt.kernels`, imported at the first call (and Triton with it, if the
            file imports it).
    """

    def run(*args: Any) -> Any:
        nonlocal kernel
        check(op, *args)
        if isinstance(kernel, str):
            module, _, function = kernel.partition(".")
            kernel = cast(
                Kernel, getattr(importlib.import_module(f"..kernels.{module}", __package__), function)
            )
        with torch._C._DisableAutocast():
            return kernel(*args)

    return run


def _on_one_device(op: str, fake: Kernel) -> Kernel:
    """The fake, which PyTorch calls for real tensors, too, where some are on the meta device and others are not."""

    def run(*args: Any) -> Any:
        devices = {t.device for t in args if isinstance(t, Tensor)}
        if len(devices) > 1:
            raise ValueError(f"{op}: the tensors must be on one device, got {', '.join(map(str, devices))}")
        return fake(*args)

    return run


def _naming_failed_allocations(op: Kernel) -> Kernel:
    """The op, which raises torch.OutOfMemoryError where its C++ finds no memory on the GPU.

    PyTorch's stable ABI drops the reason why an allocation failed: the same allocation from Python fails with it.
    """

    def run(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return op(*args)
        try:
            return op(*args)
        except RuntimeError as error:
            found = re.search(r"fastgpt: could not allocate (\d+) bytes", str(error))
            if found:
                device = next(t.device for t in args if isinstance(t, Tensor))
                torch.empty(int(found[1]), dtype=torch.uint8, device=device)
            raise

    return run


def vjp(
    function: Callable[..., Any],
    inputs: tuple[Tensor | None, ...],
    grads: Any,
    *,
    create_graph: bool = False,
) -> Any:
    """Gradients of `function(*inputs)` with respect to each input (None for a None input).

    With `create_graph`, in grad mode, the inputs must be part of a graph and the result is differentiable again;
    without, they are detached first. Tangents of `grads` are carried on either way. This is the backward of every
    reference, and what every backend uses for second derivatives.
    """
    if torch._C._are_functorch_transforms_active():
        return _vjp_in_functorch(function, inputs, grads)
    create_graph = create_graph and torch.is_grad_enabled()
    with _autograd_on():
        # Aliases where the graph goes on: one input may be made of another, as tied weights are, and what reaches it by
        # that way is not this function's.
        fresh = _alias if create_graph else _detached
        inputs = tuple(None if x is None else fresh(x) for x in inputs)
        outputs = function(*inputs)
        if isinstance(outputs, Tensor):
            outputs, grads = (outputs,), (grads,)
        pairs = [(o, g) for o, g in zip(outputs, grads, strict=True) if g is not None and o.requires_grad]
        wanted = [x for x in inputs if x is not None and x.requires_grad]
        found: list[Any] = [None] * len(wanted)
        if pairs and wanted:
            outs, gs = zip(*pairs, strict=True)
            found = list(torch.autograd.grad(outs, wanted, gs, allow_unused=True, create_graph=create_graph))
        result: list[Tensor | None] = []
        for x in inputs:
            if x is None or not x.requires_grad:
                result.append(None)
                continue
            g = found.pop(0)
            result.append(torch.zeros_like(x) if g is None else g)
        return tuple(result)


def _vjp_in_functorch(function: Callable[..., Any], inputs: tuple[Tensor | None, ...], grads: Any) -> Any:
    """`vjp` for a backward that torch.func transforms, where no tensor may be made a leaf; differentiable again."""
    given = [i for i, x in enumerate(inputs) if x is not None]

    def of_given(*tensors: Tensor) -> Any:
        return function(*(tensors[given.index(i)] if i in given else None for i in range(len(inputs))))

    outputs, pull = torch.func.vjp(of_given, *(inputs[i] for i in given))  # type: ignore[misc]
    if not isinstance(outputs, Tensor):
        grads = tuple(torch.zeros_like(o) if g is None else g for o, g in zip(outputs, grads, strict=True))
    found = dict(zip(given, pull(grads), strict=True))
    return tuple(found.get(i) for i in range(len(inputs)))


def _alias(x: Tensor) -> Tensor:
    return x.view_as(x)


def _detached(x: Tensor) -> Tensor:
    return x.detach().requires_grad_(x.is_floating_point())


@contextlib.contextmanager
def _autograd_on() -> Iterator[None]:
    """Autograd inside an op's implementation, also where the caller runs below it (as compiled code does)."""
    include = torch._C._dispatch_tls_local_include_set()
    exclude = torch._C._dispatch_tls_local_exclude_set()
    for key in (torch._C.DispatchKey.AutogradCPU, torch._C.DispatchKey.AutogradCUDA):
        exclude = exclude.remove(key)
    with torch._C._ForceDispatchKeyGuard(include, exclude), torch.enable_grad():
        yield
