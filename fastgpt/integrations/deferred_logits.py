"""Logits that are not made until something reads them; a cross-entropy of them is one op with their head.

A model's own forward runs as it is, with its labels. Where its head returns `DeferredLogits`, what the forward does to
them on the way to its loss (reshape, shift, cast, scale, cap, add a bias) is done to the hidden states or noted, and
`torch.nn.functional.cross_entropy` runs `linear_cross_entropy`. Any other function makes the logits and gets those, so
the results of the forward do not change.
"""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastgpt import functional
from fastgpt.ops._fallback import plain_reason

_thread = threading.local()


@contextmanager
def requested(head: nn.Module | None) -> Iterator[bool]:
    """Within, a head's calls in this thread return deferred logits, and others' do not.

    Yields whether they are requested of this head further out too.
    """
    heads = _thread.__dict__.setdefault("heads", [])
    around = head in heads
    heads.append(head)
    try:
        yield around
    finally:
        heads.pop()


def deferred(head: nn.Linear, hidden: Tensor) -> Tensor | None:
    """Return the logits of a head, deferred, if that is `requested`, and possible for such hidden states."""
    heads = getattr(_thread, "heads", None)
    if not heads or heads[-1] is not head:
        return None
    weight, dtype = head.weight, hidden.dtype
    # Of these two kinds of device it is known that autograd and autocast are as `_Call` has them.
    if hidden.device.type not in ("cpu", "cuda") or plain_reason(hidden, weight, optional=(head.bias,)):
        return None
    if hidden.is_inference():
        return None
    if torch.is_autocast_enabled(hidden.device.type) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(hidden.device.type)
    elif dtype != weight.dtype:
        return None
    call = _Call(head, hidden)
    return DeferredLogits(call, _Form(hidden), lambda: call(hidden), dtype)


class _Call:
    """One call of a head, and the modes of autograd and autocast that it was made in."""

    def __init__(self, head: nn.Linear, hidden: Tensor) -> None:
        self.head, self.hidden, self.version = head, hidden, hidden._version
        self.modes = self._modes()
        self.deferred: list[weakref.ref[DeferredLogits]] = []
        self.made = self.has_loss = False

    def _modes(self) -> tuple[bool, bool, torch.dtype]:
        device = self.hidden.device.type
        return torch.is_grad_enabled(), torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)

    def follows(self) -> bool:
        """Return whether what happens now can still be noted instead of done."""
        return not self.made and self.modes == self._modes()

    def __call__(self, hidden: Tensor, *wanted: Any) -> Tensor:
        if self.hidden._version != self.version:
            raise RuntimeError(
                "the hidden states were changed in place between the head and the use of its logits: call "
                "fastgpt.accelerate(model, cross_entropy=False) for such a model"
            )
        with requested(None):
            found: Tensor = self.head(hidden, *wanted)
        return found

    def make(self) -> None:
        """Make the logits, and all that was noted of them, in the modes of the call."""
        self.made = True
        grad, autocast, dtype = self.modes
        device = self.hidden.device.type
        with torch.set_grad_enabled(grad), torch.autocast(device, dtype=dtype, enabled=autocast):
            for node in [found for ref in self.deferred if (found := ref()) is not None]:
                node.value()


@dataclass(frozen=True)
class _Form:
    """What deferred logits are: scale y, or scale tanh(inner y), where y = hidden @ weight.T + bias.

    bias: added to the head's own; float32: they have been cast to it.
    """

    hidden: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    inner: float | None = None
    float32: bool = False


class DeferredLogits(Tensor):
    """Logits (..., V) that a head has not made yet."""

    call: _Call
    form: _Form
    step: Callable[[], Tensor]
    made: Tensor | None

    @staticmethod
    def __new__(
        cls, call: _Call, form: _Form, step: Callable[[], Tensor], dtype: torch.dtype
    ) -> DeferredLogits:
        shape = (*form.hidden.shape[:-1], call.head.out_features)
        node: DeferredLogits = Tensor._make_wrapper_subclass(
            cls, shape, dtype=dtype, device=form.hidden.device
        )
        node.call, node.form, node.step, node.made = call, form, step, None
        call.deferred.append(weakref.ref(node))
        return node

    def value(self) -> Tensor:
        """Return the logits themselves."""
        if not self.call.made:
            self.call.make()  # and so all that was noted: it may refer to the same memory
        if self.made is None:
            self.made = self.step()
        return self.made

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        node, rule = (args[0] if args else None), _RULES.get(func)
        if isinstance(node, DeferredLogits):
            if func == _REQUIRES_GRAD:
                sources = (node.call.hidden, *node.call.head.parameters())
                return node.call.modes[0] and any(tensor.requires_grad for tensor in sources)
            if rule is not None and node.call.follows():
                found = rule(node, args[1:], kwargs)
                if isinstance(found, _Form):
                    dtype = torch.float32 if found.float32 else node.dtype
                    return DeferredLogits(node.call, found, lambda: _done(func, args, kwargs), dtype)
                if found is not None:
                    return found
        return _done(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        raise RuntimeError(
            f"{func} was called with logits that are not made yet, past torch's own functions: call "
            "fastgpt.accelerate(model, cross_entropy=False) for such a model"
        )


def _done(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call a function with the logits themselves."""
    args, kwargs = tree_map(_value, (args, kwargs))
    return func(*args, **kwargs)


def _value(argument: Any) -> Any:
    return argument.value() if isinstance(argument, DeferredLogits) else argument


# What can be noted, each a function of the logits, the further arguments and those by keyword. It returns the form of
# the result; or the result; or None, for the logits to be made.


def _same(node: DeferredLogits, args: Any, kwargs: Any) -> _Form | None:
    return None if args or kwargs else node.form


def _float(node: DeferredLogits, args: Any, kwargs: Any) -> _Form | None:
    if args or kwargs or node.dtype == torch.float64:
        return None
    return replace(node.form, float32=True)


def _to(node: DeferredLogits, args: Any, kwargs: Any) -> _Form | None:
    if len(args) + len(kwargs) != 1 or not kwargs.keys() <= {"device", "dtype"}:
        return None
    to = [*args, *kwargs.values()][0]
    if isinstance(to, torch.dtype):
        return node.form if to == node.dtype else _float(node, (), {}) if to == torch.float32 else None
    return node.form if isinstance(to, torch.device) and to == node.device else None


def _reshape(node: DeferredLogits, args: Any, kwargs: Any) -> _Form | None:
    shape = tuple(args[0]) if len(args) == 1 and isinstance(args[0], tuple | list) else args
    if kwargs or not all(isinstance(size, int) for size in shape) or shape[-1:] != (node.shape[-1],):
        return None
    return replace(node.form, hidden=node.form.hidden.reshape(*shape[:-1], node.form.hidden.shape[-1]))


def _index(node: DeferredLogits, args: Any, kwargs: Any) -> _Form | None:
    (index,) = args
    index = index if isinstance(index, tuple) else (index,)
    if not index:
        return None
    dimensions, rest = 0, False  # of the logits that are indexed; whether "..." stands for the others
    for i in index:
        if isinstance(i, Tensor) and i.dtype in (torch.bool, torch.int64):
            dimensions += i.dim() if i.dtype == torch.bool else 1
        elif isinstance(i, slice) or type(i) is int:
            dimensions += 1
        elif i is Ellipsis:
            rest = True
        else:
            return None
    whole = isinstance(index[-1], slice) and index[-1] == slice(None)
    if (rest and not whole and index[-1] is not Ellipsis) or (dimensions == node.dim() and not whole):
        return None
    return replace(node.form, hidden=node.form.hidden[index])


def _add(node: DeferredLogits, args: Any, kwargs: Any) -> _Form | None:
    form, bias = node.form, args[0]
    weight, classes = node.call.head.weight, node.shape[-1]
    if kwargs or form.bias is not None or form.scale != 1.0 or form.inner is not None:
        return None
    if not isinstance(bias, Tensor) or bias.numel() != classes or bias.shape[-1:] != (classes,):
        return None
    if bias.dim() > node.dim() or bias.dtype != weight.dtype or plain_reason(form.hidden, bias):
        return None
    promoted = bias.dtype != node.dtype
    if promoted and bias.dtype != torch.float32:
        return None
    return replace(form, bias=bias.reshape(-1), float32=form.float32 or promoted)


def _scale(node: DeferredLogits, args: Any, kwargs: Any, inverse: bool = False) -> _Form | None:
    if kwargs or type(args[0]) not in (int, float) or not 0 < args[0] < inf:
        return None
    return replace(node.form, scale=node.form.scale * (1 / args[0] if inverse else args[0]))


def _divide(node: DeferredLogits, args: Any, kwargs: Any) -> _Form | None:
    return _scale(node, args, kwargs, inverse=True)


def _tanh(node: DeferredLogits, args: Any, kwargs: Any) -> _Form | None:
    if args or kwargs or node.form.inner is not None:
        return None
    return replace(node.form, inner=node.form.scale, scale=1.0)


def _cross_entropy(node: DeferredLogits, args: Any, kwargs: Any) -> Tensor | None:
    given = inspect.signature(functional.cross_entropy).bind(node, *args, **kwargs)
    given.apply_defaults()
    target, reduction = given.arguments["target"], given.arguments["reduction"]
    if any(given.arguments[name] is not None for name in ("weight", "size_average", "reduce")):
        return None
    if reduction not in ("mean", "sum") or not isinstance(target, Tensor) or target.dtype != torch.int64:
        return None
    form = node.form
    if node.dim() != 2 or target.shape != node.shape[:1] or plain_reason(form.hidden, target):
        return None
    wanted: dict[str, Any] = {name: given.arguments[name] for name in ("ignore_index", "label_smoothing")}
    wanted |= {"target": target, "count": None if reduction == "mean" else 1, "float32": form.float32}
    wanted["logit_scale"] = form.scale if form.inner is None else form.inner * form.scale
    wanted["softcap"] = None if form.inner is None else form.scale
    node.call.has_loss = True
    return node.call(form.hidden, wanted, form.bias)


_REQUIRES_GRAD = Tensor.requires_grad.__get__  # type: ignore[attr-defined]
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "layout", "is_cuda")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__, Tensor.__hash__, Tensor.is_floating_point),
}
_RULES: dict[Any, Callable[[DeferredLogits, Any, Any], _Form | Tensor | None]] = {
    Tensor.contiguous: _same,
    Tensor.float: _float,
    Tensor.to: _to,
    Tensor.view: _reshape,
    Tensor.reshape: _reshape,
    Tensor.__getitem__: _index,
    Tensor.tanh: _tanh,
    torch.tanh: _tanh,
    functional.PYTORCH_CROSS_ENTROPY: _cross_entropy,
    functional.cross_entropy: _cross_entropy,
    **{getattr(Tensor, name): _add for name in ("add", "__add__")},
    **{getattr(Tensor, name): _scale for name in ("mul", "__mul__", "__rmul__")},
    **{getattr(Tensor, name): _divide for name in ("div", "__truediv__")},
}
