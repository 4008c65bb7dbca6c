"""The error rule and input makers of fastgpt's tests, for users who test their own ops.

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
) -> float:
    """The error rule: err(actual) ≤ 2·err(pytorch) + one rounding of the largest exact value.

    For float64 results, which have no finer measure, the error is bounded by 1e-13 of the largest value.

    Args:
        pytorch_error: what `error` gives for PyTorch's result in the same dtype.
        terms: the size of the terms that the arithmetic adds up. Where they cancel (the gradient of a
            softmax over one element is exactly 0), a few roundings of them remain: 8 of float32.
        rounding: the dtype in which the result was rounded, if it is not the result's own (autocast).

    Returns:
        The error as a share of what the rule allows: at most 1.

    Raises:
        AssertionError: the rule is broken; the message gives both errors.
    """
    finite = exact[exact.isfinite()]
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    working = 8 * torch.finfo(torch.float32).eps if actual.dtype != torch.float64 else 1e-13
    atol = torch.finfo(rounding or actual.dtype).eps / 2 * largest + working * max(largest, terms)
    ours = error(actual, exact)
    bound = 2 * pytorch_error + atol
    assert ours <= bound, f"{what}: error {ours:.3g}, PyTorch's {pytorch_error:.3g}, allowance {atol:.3g}"
    return ours / bound if bound else 0.0


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
    ErrorRule(pytorch, inputs, rounding=rounding).check(ours)


class ErrorRule:
    """The error rule at given inputs, ready to judge several functions: float64 is computed once.

    Args:
        pytorch: the function in plain PyTorch; its error is the measure.
        inputs: as for `check_error_rule`.
        exact: the function to run in float64; default `pytorch`.
        part: where float64 of everything would not fit into memory: maps the list of inputs, of outputs, of
            upstream gradients and of gradients each to the part that is compared. The judged function still
            runs whole.
        places: how many places beside the inputs PyTorch's error is taken at.
        rounding: see `assert_no_worse`.
    """

    def __init__(
        self,
        pytorch: Function,
        inputs: Sequence[Any],
        *,
        exact: Function | None = None,
        part: Callable[[list[Any]], list[Any]] = list,
        places: int = 2,
        rounding: torch.dtype | None = None,
    ) -> None:
        exact = exact or pytorch
        # Leaves of their own: a tensor given twice has two gradients here as it has in float64.
        self.inputs, self.part, self.rounding = [_leaf(x, x) for x in inputs], part, rounding
        # Upstream gradients that the dtype can hold, so that all see the same ones.
        low = next(x.dtype for x in inputs if isinstance(x, Tensor) and x.is_floating_point())
        outputs = run_with_gradients(pytorch, [_detached(x) for x in inputs], None)[0]
        self.grads = [torch.randn_like(o, dtype=torch.float32).to(low).double() for o in outputs]
        del outputs

        small = [_leaf(p, x) for p, x in zip(part(list(inputs)), inputs, strict=True)]
        grads = part(self.grads)
        truth = run_with_gradients(exact, as_float64(small), grads)
        self.n_outputs = len(truth[0])
        self.exact = [*truth[0], *truth[1]]
        theirs = run_with_gradients(pytorch, small, grads)
        self.dtypes = [t.dtype for t in (*theirs[0], *theirs[1])]
        self.errors = [error(t, e) for t, e in zip((*theirs[0], *theirs[1]), self.exact, strict=True)]
        for _ in range(places if low != torch.float64 else 0):
            place = nearby(small)
            outputs, gradients = run_with_gradients(pytorch, place, grads)
            truth = run_with_gradients(exact, as_float64(place), grads)
            pairs = zip((*outputs, *gradients), (*truth[0], *truth[1]), strict=True)
            self.errors = [max(known, error(t, e)) for known, (t, e) in zip(self.errors, pairs, strict=True)]
        everything = [t.nan_to_num(0, 0, 0).abs().max() for t in (*self.exact, *grads) if t.numel()]
        self.terms = max([1.0, *map(float, everything)])

    def check(self, function: Function, factor: float = 2.0) -> float:
        """Hold a function to the rule; returns its largest error as a share of what the rule allows.

        Args:
            factor: how many times PyTorch's error is allowed; 2 is the rule.

        Raises:
            AssertionError: a shape, a dtype or the rule is broken.
        """
        outputs, gradients = run_with_gradients(function, self.inputs, self.grads)
        found = [*self.part(outputs), *self.part(gradients)]
        assert len(found) == len(self.exact), (
            f"{len(found)} outputs and gradients instead of {len(self.exact)}"
        )
        worst = 0.0
        for i, (a, e, dtype, theirs) in enumerate(
            zip(found, self.exact, self.dtypes, self.errors, strict=True)
        ):
            what = f"output {i}" if i < self.n_outputs else f"gradient {i - self.n_outputs}"
            assert a.dtype == dtype, f"{what}: dtype {a.dtype} instead of {dtype}"
            share = assert_no_worse(a, e, factor / 2 * theirs, what, terms=self.terms, rounding=self.rounding)
            worst = max(worst, share)
        return worst


def _detached(x: Any) -> Any:
    return x.detach() if isinstance(x, Tensor) else x


def _leaf(part: Any, whole: Any) -> Any:
    """A part of an input as a leaf of its own that requires a gradient where the whole does."""
    if not isinstance(part, Tensor):
        return part
    return part.detach().requires_grad_(whole.requires_grad)


@contextlib.contextmanager
def poisoned_memory(deterministic: bool = True) -> Iterator[None]:
    """Fresh memory is full of NaN, so that a slot nobody writes shows.

    Args:
        deterministic: under deterministic algorithms, where PyTorch itself fills the memory that is allocated in
            C++. Python's `torch.empty` and its relatives are patched either way.
    """

    def poison(function: Function) -> Function:
        def filled(*args: Any, **kwargs: Any) -> Tensor:
            fresh = function(*args, **kwargs)
            return fresh.fill_(torch.nan) if fresh.is_floating_point() else fresh

        return filled

    before = torch.are_deterministic_algorithms_enabled()
    fill_before = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    torch.use_deterministic_algorithms(deterministic)
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
