"""What fastgpt's own tests stand on, for users who test ops of their own.

The error rule: a kernel may err at most twice as much as PyTorch does in the same dtype, plus one
rounding of the result, both measured against float64. It is never loosened.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

Function = Callable[..., Any]


def error(actual: Tensor, exact: Tensor) -> float:
    """The largest absolute difference, in float64; NaN and infinities must stand in the same places.

    Raises:
        AssertionError: shapes differ, or NaN or infinity where the other has none.
    """
    assert actual.shape == exact.shape, f"shape {tuple(actual.shape)} instead of {tuple(exact.shape)}"
    a, e = actual.detach().double(), exact.detach().double()
    finite = e.isfinite()
    assert torch.equal(a.isfinite(), finite), (
        "NaN or infinity where the exact result is finite, or the reverse"
    )
    assert torch.equal(a.isnan(), e.isnan()), "NaN where the exact result is infinite, or the reverse"
    return float((a - e)[finite].abs().max()) if finite.any() else 0.0


def assert_no_worse(
    actual: Tensor,
    exact: Tensor,
    pytorch_error: float,
    what: str = "result",
    *,
    terms: float = 1.0,
    rounding: torch.dtype | None = None,
) -> None:
    """The error rule: err(actual) ≤ 2·err(pytorch) + one rounding of the largest exact value.

    For float64 results, which have no finer measure, the error is bounded by 1e-13 of the largest value.

    Args:
        pytorch_error: what `error` gives for PyTorch's result in the same dtype.
        terms: the size of the terms that the arithmetic adds up. Where they cancel (the gradient of a
            softmax over one element is exactly 0), a few roundings of them remain: 8 of float32.
        rounding: the dtype in which the result was rounded, if it is not the result's own (autocast).

    Raises:
        AssertionError: the rule is broken; the message gives both errors.
    """
    finite = exact[exact.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    working = 8 * torch.finfo(torch.float32).eps if actual.dtype != torch.float64 else 1e-13
    atol = torch.finfo(rounding or actual.dtype).eps / 2 * largest + working * max(largest, terms)
    ours = error(actual, exact)
    assert ours <= 2 * pytorch_error + atol, (
        f"{what}: error {ours:.3g}, PyTorch's {pytorch_error:.3g}, allowance {atol:.3g}"
    )


def run_with_gradients(function: Function, inputs: Sequence[Tensor], grads: Sequence[Tensor] | None) -> Any:
    """Outputs and the gradients of those inputs that require one.

    Returns:
        (outputs, gradients), two lists; the outputs are detached.
    """
    found = function(*inputs)
    outputs = [found] if isinstance(found, Tensor) else list(found)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not wanted:
        return [o.detach() for o in outputs], []
    if grads is None:
        grads = [torch.ones_like(o) for o in outputs]
    gradients = torch.autograd.grad(
        outputs, wanted, [g.to(o.dtype) for g, o in zip(grads, outputs, strict=True)], allow_unused=True
    )
    zeros = [torch.zeros_like(x) if g is None else g for g, x in zip(gradients, wanted, strict=True)]
    return [o.detach() for o in outputs], zeros


def as_float64(inputs: Sequence[Any]) -> list[Any]:
    """Copies in float64 of the floating tensors, requiring gradients where the originals do."""
    copies: list[Any] = []
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            copies.append(x.detach().double().requires_grad_(x.requires_grad))
        else:
            copies.append(x)
    return copies


def nearby(inputs: Sequence[Any]) -> list[Any]:
    """Copies of the inputs whose floating elements are moved by a few roundings of their dtype."""
    copies: list[Any] = []
    for x in inputs:
        if isinstance(x, Tensor) and x.is_floating_point():
            moved = x.detach().double() * (1 + 4 * torch.finfo(x.dtype).eps * torch.rand(x.shape).double())
            copies.append(moved.to(x.dtype).requires_grad_(x.requires_grad))
        else:
            copies.append(x)
    return copies


def check_error_rule(
    ours: Function, pytorch: Function, inputs: Sequence[Any], *, rounding: torch.dtype | None = None
) -> None:
    """The error rule for every output and every gradient, with random upstream gradients.

    PyTorch's error is the largest of three: at the inputs, and at two places a few roundings away. At one
    place alone it can be next to nothing by luck, when a result happens to lie on a number of the dtype.

    Args:
        ours: called with the inputs.
        pytorch: the same function in plain PyTorch; called with the inputs, and with them in float64.
        inputs: tensors (and anything else); gradients are compared for those that require one.
        rounding: see `assert_no_worse`.

    Raises:
        AssertionError: a shape, a dtype or the rule is broken.
    """
    shapes = [o.shape for o in run_with_gradients(pytorch, as_float64(inputs), None)[0]]
    # Upstream gradients that the dtype at hand can hold, so that all see the same ones.
    low = next(x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
    grads = [torch.randn(shape).to(low).double() for shape in shapes]

    def outputs_and_gradients(function: Function, at: Sequence[Any]) -> list[Tensor]:
        outputs, gradients = run_with_gradients(function, at, grads)
        return [*outputs, *gradients]

    exact = outputs_and_gradients(pytorch, as_float64(inputs))
    theirs = outputs_and_gradients(pytorch, inputs)
    errors = [error(t, e) for t, e in zip(theirs, exact, strict=True)]
    for place in (nearby(inputs), nearby(inputs)) if low != torch.float64 else ():
        pairs = zip(
            outputs_and_gradients(pytorch, place),
            outputs_and_gradients(pytorch, as_float64(place)),
            strict=True,
        )
        errors = [max(known, error(t, e)) for known, (t, e) in zip(errors, pairs, strict=True)]

    everything = torch.cat([t.flatten() for t in (*exact, *grads)])
    terms = float(everything.nan_to_num(0, 0, 0).abs().max().clamp(min=1)) if everything.numel() else 1.0
    found = outputs_and_gradients(ours, inputs)
    assert len(found) == len(exact), f"{len(found)} outputs and gradients instead of {len(exact)}"
    for i, (a, t, e, pytorch_error) in enumerate(zip(found, theirs, exact, errors, strict=True)):
        what = f"output {i}" if i < len(shapes) else f"gradient {i - len(shapes)}"
        assert a.dtype == t.dtype, f"{what}: dtype {a.dtype} instead of {t.dtype}"
        assert_no_worse(a, e, pytorch_error, what, terms=terms, rounding=rounding)


@contextlib.contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory is full of NaN, so that a slot nobody writes shows.

    Python's `torch.empty` and its relatives are patched; memory allocated in C++ is filled by
    PyTorch itself, which does so under deterministic algorithms.
    """

    def poison(function: Function) -> Function:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            fresh = function(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return filled

    before = torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    try:
        with contextlib.ExitStack() as stack:
            for name in ("empty", "empty_like", "empty_strided"):
                stack.enter_context(mock.patch.object(torch, name, poison(getattr(torch, name))))
            for name in ("new_empty", "new_empty_strided"):
                stack.enter_context(mock.patch.object(Tensor, name, poison(getattr(Tensor, name))))
            yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.utils.deterministic.fill_uninitialized_memory = fill_before  # type: ignore[attr-defined]


def strided(shape: Sequence[int], dtype: torch.dtype, layout: str, scale: float = 1.0) -> Tensor:
    """Random normal values of a shape, requiring a gradient, in a memory layout.

    Args:
        layout: "contiguous"; "transposed": the last two dimensions swapped in memory; "sliced":
            every second element of a larger tensor in the first dimension, with an offset;
            "gapped": a gap after each row.
        scale: the standard deviation.
    """
    shape = tuple(shape)
    if layout == "transposed" and len(shape) >= 2:
        base = torch.randn(*shape[:-2], shape[-1], shape[-2]).mul_(scale).to(dtype).transpose(-1, -2)
    elif layout == "sliced" and len(shape) >= 1:
        base = torch.randn(2 * shape[0] + 1, *shape[1:]).mul_(scale).to(dtype)[1::2][: shape[0]]
    elif layout == "gapped" and len(shape) >= 1:
        base = torch.randn(*shape[:-1], shape[-1] + 3).mul_(scale).to(dtype)[..., : shape[-1]]
    else:
        base = torch.randn(shape).mul_(scale).to(dtype)
    return base.detach().requires_grad_()


LAYOUTS = ("contiguous", "transposed", "sliced", "gapped")
