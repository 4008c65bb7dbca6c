"""The rotation of queries and keys in attentions of transformers, as one op.

An attention calls a function of its module, `apply_rotary_pos_emb`. Its forward is code that looks this name up: the
same code gets another function under it. What the function and the angles compute is known by their fingerprints.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastgpt import ops
from fastgpt.integrations.fingerprint import fingerprint
from fastgpt.ops._checks import FLOATS, no_float64_on_gpu_backends
from fastgpt.ops._fallback import goes_to_pytorch, plain_reason

NAME = "apply_rotary_pos_emb"
_CASTS = "1ea764b5d1b09426"
# q cos + rotate_half(q) sin: of all channels, of the first ones, and with a cast to the dtype of q.
_APPLY = {
    *("8be0b948aa20534c", "6f1154285f83ceac"),
    *("8680eb38c21ec1ab", "49a0859110be5c20"),
    _CASTS,
}
_ROTATE_HALF = "602fc371108511cc"  # (-second half, first half)
# Angles that are the same in both halves of the channels.
_ANGLES = {
    *("8435643e199618da", "74fed79fd01dc1e9", "ffeab72b3921df24", "ee4ae4b90ebaa786"),
    "5f62cca82c883618",  # in float32
}


def is_known(function: Any) -> bool:
    """Return whether a forward calls a rotation that `ops.rope` computes."""
    code = getattr(function, "__code__", None)
    if code is None or NAME not in code.co_names:
        return False
    names = function.__globals__
    if fingerprint(names.get(NAME)) not in _APPLY or fingerprint(names.get("rotate_half")) != _ROTATE_HALF:
        return False
    module = vars(sys.modules[function.__module__])
    angles: list[Any] = [cls for name, cls in module.items() if name.endswith("RotaryEmbedding")]
    return bool(angles) and all(isinstance(cls, type) and makes_angles(cls) for cls in angles)


def makes_angles(kind: Any) -> bool:
    """Return whether a class computes cos and sin whose halves are the same."""
    return (fingerprint(kind.forward) or "") in _ANGLES


def with_rope(forward: Callable[..., Any]) -> Callable[..., Any] | None:
    """Return a forward that rotates by `ops.rope`, its decorators included; None if they cannot be made again."""
    inner = getattr(forward, "__wrapped__", None)
    if inner is None:
        return _with_rope(forward)
    replaced, cells = with_rope(inner), getattr(forward, "__closure__", None) or ()
    if replaced is None or not any(cell.cell_contents is inner for cell in cells):
        return None
    closure = tuple(types.CellType(replaced) if cell.cell_contents is inner else cell for cell in cells)
    made = _copied(forward, forward.__globals__, closure)
    made.__wrapped__ = replaced
    return made


def _with_rope(forward: Any) -> Any:
    names = dict(forward.__globals__)
    names[NAME] = _rotation(names[NAME])
    # Without the name of a module torch.compile reads these globals, not the module's.
    del names["__name__"]
    return _copied(forward, names, forward.__closure__)


def _copied(function: Any, names: dict[str, Any], closure: Any) -> Any:
    made = types.FunctionType(function.__code__, names, function.__name__, function.__defaults__, closure)
    made.__kwdefaults__, made.__doc__ = function.__kwdefaults__, function.__doc__
    made.__module__, made.__qualname__ = function.__module__, function.__qualname__
    made.__annotations__ = function.__annotations__
    return made


def _rotation(original: Callable[..., Any]) -> Callable[..., Any]:
    casts = fingerprint(original) == _CASTS

    def apply_rotary_pos_emb(
        q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        reason = None if not args and not kwargs else "it is called with unsqueeze_dim"
        reason = reason or plain_reason(q, k, cos, sin) or _mismatch(q, k, cos, sin, casts)
        if goes_to_pytorch("rope", q, reason, lambda b: no_float64_on_gpu_backends(b, q.dtype)):
            return original(q, k, cos, sin, *args, **kwargs)
        half = cos.shape[-1] // 2
        cos, sin = cos[..., :half], sin[..., :half]
        return ops.rope(q, k, cos[0], sin[0]) if len(cos) == 1 else ops.rope(q, k, cos, sin)

    return apply_rotary_pos_emb


def _mismatch(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, casts: bool) -> str | None:
    """Return why `ops.rope` does not compute this call as the model does, or None."""
    if q.dim() != 4 or k.dim() != 4 or cos.dim() != 3 or cos.shape != sin.shape or cos.shape[-1] % 2:
        return "the shapes are others"
    rows, _, length, channels = q.shape
    fits = k.shape[0] == rows and k.shape[2:] == q.shape[2:] and cos.shape[1] == length
    if not fits or (cos.shape[0] != 1 and cos.shape[0] != rows) or cos.shape[-1] > channels:
        return "the shapes are others"
    if q.dtype != k.dtype or cos.dtype != sin.dtype or cos.dtype not in FLOATS:
        return "the dtypes differ"
    if not casts and torch.promote_types(q.dtype, cos.dtype) != q.dtype:
        return "the result would have the dtype of the angles"
    return "the angles require a gradient" if cos.requires_grad or sin.requires_grad else None
