"""Rotary position embedding of queries and keys: contract, registration, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..backends import select
from ._checks import (
    ANY,
    FLOATS,
    Checks,
    check_floating,
    check_same_dtype,
    check_tensors,
    distinct,
    no_float64_on_gpu_backends,
    unit_stride,
)
from ._library import define
from ._transforms import twice_differentiable

# The backward is the rotation by the negative angle. It is one kernel with the forward, and nothing but cos and sin is
# saved for it.


def _check_sizes(op: str, name: str, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    check, (batch, _, length, size) = Checks(op, f"{name}q", q, (ANY,) * 4), q.shape
    check(f"{name}k", k, (batch, ANY, length, size), q.dtype)
    check("cos", cos, (length, ANY) if cos.dim() == 2 else (batch, length, ANY), *FLOATS)
    check("sin", sin, cos.shape, cos.dtype)
    if 2 * cos.shape[-1] > size:
        raise ValueError(f"{op}: cos rotates {2 * cos.shape[-1]} channels of {size}")


def _by_position(t: Tensor) -> Tensor:
    """An empty tensor like t (B, H, T, D), laid out as (B, T, H, D)."""
    batch, heads, length, size = t.shape
    return t.new_empty(batch, length, heads, size).transpose(1, 2)


def _rotated(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The reference in the layout of the results, differentiable."""
    q, k = reference.rope(q, k, cos, sin, interleaved=interleaved)
    return _by_position(q).copy_(q), _by_position(k).copy_(k)


_FWD = define(
    "rope_fwd",
    "(Tensor q, Tensor k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    fake=lambda q, k, *_: (_by_position(q), _by_position(k)),
    reference=_rotated,
    check=lambda op, q, k, cos, sin, _: _check_sizes(op, "", q, k, cos, sin),
    module="rope",
)
_BWD = define(
    "rope_bwd",
    "(Tensor grad_q, Tensor grad_k, Tensor cos, Tensor sin, bool interleaved) -> (Tensor, Tensor)",
    fake=lambda q, k, *_: (_by_position(q), _by_position(k)),
    reference=lambda q, k, cos, sin, interleaved: _rotated(q, k, cos, -sin, interleaved),
    check=lambda op, q, k, cos, sin, _: _check_sizes(op, "grad_", q, k, cos, sin),
    module="rope",
)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        ctx.set_materialize_grads(False)
        ctx.interleaved, ctx.backend = interleaved, backend
        return _FWD[backend](q, k, cos, sin, interleaved)

    @staticmethod
    def backward(ctx: Any, grad_q: Tensor | None, grad_k: Tensor | None) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        grad_q = grad_q if ctx.needs_input_grad[0] else None
        grad_k = grad_k if ctx.needs_input_grad[1] else None
        given = grad_k if grad_q is None else grad_q
        if given is None:
            return (None,) * 6
        none = given[:, :0]  # no heads: what needs no gradient is not rotated
        pair = (none if grad_q is None else grad_q, none if grad_k is None else grad_k)
        if twice_differentiable(*pair):
            dq, dk = _rotated(*pair, cos, -sin, ctx.interleaved)
        else:
            dq, dk = _BWD[ctx.backend](*distinct(*map(unit_stride, pair)), cos, sin, ctx.interleaved)
        return None if grad_q is None else dq, None if grad_k is None else dk, None, None, None, None


def rope(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, interleaved: bool = False
) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of queries and keys, in one pass (Su et al., arXiv:2104.09864).

    The first R channels of every head are rotated in pairs, the other channels are copied:

        (x_i, x_j) → (x_i·cos_p - x_j·sin_p,  x_j·cos_p + x_i·sin_p)     for pair p = 0, …, R/2 - 1

    Args:
        q: (B, H, T, D), any strides; float32, bfloat16, float16, float64. A last dimension of stride 1 is read in
            place, for example a view of one projection (B, T, (H + 2·Hk)·D).
        k: (B, Hk, T, D), q's dtype, any strides.
        cos: (T, R/2), or (B, T, R/2) where the rows of the batch have other positions; R ≤ D; any floating dtype. The
            rotation is computed in float32 (float64 for float64) and rounded once to q's dtype.
        sin: cos's shape and dtype.
        interleaved: pair p has the channels 2p and 2p + 1 (RoFormer, GPT-J); without it p and p + R/2 (GPT-NeoX,
            Llama).

    Returns:
        q and k rotated, of their shapes and dtype, each a view of a contiguous (B, T, heads, D), which is the layout
        of the results of `attention`. cos and sin have a gradient on the reference backend only.

    Raises:
        TypeError: an argument is not a floating tensor, or the dtypes of q and k, or of cos and sin, differ.
        ValueError: shapes or devices do not fit.
        BackendUnavailable: the chosen backend cannot run this case.
    """
    check_tensors("rope", q=q, k=k, cos=cos, sin=sin)
    check_floating("rope", q=q, k=k, cos=cos, sin=sin)
    check_same_dtype("rope", q=q, k=k)
    check_same_dtype("rope", cos=cos, sin=sin)
    _check_shapes(q, k, cos, sin)
    of_angles = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)

    def refusal(backend: str) -> str | None:
        if of_angles and backend != "reference":
            return f"cos or sin requires a gradient, which the {backend} kernel does not compute"
        return no_float64_on_gpu_backends(backend, q.dtype)

    backend = select("rope", q.device, refusal)
    if of_angles:
        return _rotated(q, k, cos, sin, interleaved)
    return _Rope.apply(*distinct(*map(unit_stride, (q, k, cos, sin))), interleaved, backend)


def _check_shapes(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    shapes = tuple(q.shape), tuple(k.shape)
    if not q.dim() == k.dim() == 4:
        raise ValueError(
            "rope: q and k must be (batch, heads, length, head_dim), got {} and {}".format(*shapes)
        )
    if (q.shape[0], q.shape[2]) != (k.shape[0], k.shape[2]):
        raise ValueError("rope: q and k must agree in batch and length, got {} and {}".format(*shapes))
    if q.shape[3] != k.shape[3]:
        raise ValueError(f"rope: q and k must have one head_dim, got {q.shape[3]} and {k.shape[3]}")
    batch, _, length, size = shapes[0]
    if tuple(cos.shape[:-1]) not in ((length,), (batch, length)):
        raise ValueError(
            f"rope: cos must be ({length}, R/2) or ({batch}, {length}, R/2), got {tuple(cos.shape)}"
        )
    if sin.shape != cos.shape:
        raise ValueError(f"rope: sin must have cos's shape {tuple(cos.shape)}, got {tuple(sin.shape)}")
    if 2 * cos.shape[-1] > size:
        raise ValueError(
            f"rope: cos has {cos.shape[-1]} columns, one for each pair of rotated channels; "
            f"a head_dim of {size} has at most {size // 2}"
        )
