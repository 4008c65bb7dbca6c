"""Floating-point operations of the ops, for PyTorch's FlopCounterMode, by its conventions.

Matrix products count, each as 2·M·N·K, and nothing else does; attention counts as if nothing were masked, and its
backward has five products. What an op computes again in its backward counts again.

PyTorch's counter imports Triton, so that its module is not imported here: the formulas are registered when it is.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from math import prod
from typing import Any

from torch import Tensor

_COUNTER = "torch.utils.flop_counter"

# By the op's name without its backend; each is called with the arguments of the op.
Formula = Callable[..., int]


def _product(x: Tensor, weight: Tensor) -> int:
    """x (M, K) @ weight (N, K).T"""
    return 2 * prod(x.shape) * weight.shape[0]


def _scores(q: Tensor, k: Tensor, v: Tensor, qk: int, pv: int) -> int:
    """Of each pair of row and column, `qk` products over the columns of q and `pv` over those of v."""
    batch, heads, rows, size = q.shape
    return 2 * batch * heads * rows * k.shape[2] * (qk * size + pv * v.shape[3])


def _pairs(cu_q: Tensor, cu_k: Tensor, longest: tuple[int, int]) -> int:
    """Pairs of row and column in all documents; where the bounds cannot be read, as if each were the longest."""
    if type(cu_q) is not Tensor or cu_q.device.type == "meta":  # fake
        return (cu_q.shape[0] - 1) * longest[0] * longest[1]
    return int((cu_q.cpu().long().diff() * cu_k.cpu().long().diff()).sum())


def _varlen(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, longest: Any, qk: int, pv: int
) -> int:
    return 2 * q.shape[1] * _pairs(cu_q, cu_k, longest) * (qk * q.shape[2] + pv * v.shape[2])


FORMULAS: dict[str, Formula] = {
    "linear_fwd": lambda x, weight, *_: _product(x, weight),
    "linear_bwd": lambda grad, x, weight, with_x, with_weight, *_: (
        _product(x, weight) * (with_x + with_weight)
    ),
    "linear_gelu_fwd": lambda x, weight, *_: _product(x, weight),
    "mlp_bwd": lambda grad, z, weight, *_: _product(z, weight),
    "linear_cross_entropy_fwd": lambda hidden, weight, *rest: (
        _product(hidden, weight) * (3 if rest[-1] else 1)
    ),
    "linear_cross_entropy_bwd": lambda grad, hidden, weight, *_: 3 * _product(hidden, weight),
    "attention_fwd": lambda q, k, v, *_: _scores(q, k, v, 1, 1),
    "attention_bwd": lambda grad, grad_lse, q, k, v, *_: _scores(q, k, v, 3, 2),
    "attention_varlen_fwd": lambda q, k, v, cu_q, cu_k, slopes, seed, rows, columns, *_: _varlen(
        q, k, v, cu_q, cu_k, (rows, columns), 1, 1
    ),
    "attention_varlen_bwd": lambda grad, lse_grad, q, k, v, out, lse, cu_q, cu_k, slopes, seed, rows, columns, *_: (
        _varlen(q, k, v, cu_q, cu_k, (rows, columns), 3, 2)
    ),
}


def _none(*_: Any) -> int:
    """No matrix product."""
    return 0


_waiting: list[tuple[Any, Formula]] = []


def register(name: str, overloads: Sequence[Any]) -> None:
    """Give PyTorch's counter the formula of an op, for each of its backends."""
    formula = FORMULAS.get(name, _none)
    _waiting.extend((overload.overloadpacket, formula) for overload in overloads)
    if _COUNTER in sys.modules:
        _hand_over(sys.modules[_COUNTER])


def _hand_over(counter: Any) -> None:
    while _waiting:
        packet, formula = _waiting.pop()
        if packet not in counter.flop_registry:
            counter.register_flop_formula(packet, get_raw=True)(_of_tensors(formula))


def _of_tensors(formula: Formula) -> Formula:
    return lambda *args, out_val=None, **_: formula(*args)


class _AtImport(MetaPathFinder, Loader):
    """Hands the formulas over once the module of PyTorch's counter has been imported."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name != _COUNTER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None:
            self.loader: Any = spec.loader
            spec.loader = self
        return spec

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        self.loader.exec_module(module)
        _hand_over(module)


if _COUNTER not in sys.modules:
    sys.meta_path.insert(0, _AtImport())
