"""`patch_functional()`: the drop-in for code that one cannot edit, by replacing names in `torch.nn.functional`.

And what `torch.jit.script` compiles where it finds the drop-in.
"""

from __future__ import annotations

import contextlib
import threading
from functools import partial
from typing import Any

import torch.nn.functional as _torch
from torch import Tensor

from fastgpt import functional

NAMES = (
    *("scaled_dot_product_attention", "cross_entropy", "linear_cross_entropy"),
    *("gelu", "layer_norm", "rms_norm"),
)

_lock = threading.Lock()
_depth = 0
_originals: dict[str, Any] = {}


class patch_functional(contextlib.ContextDecorator):  # noqa: N801  (reads as a verb, like torch.no_grad)
    """Context manager in which `torch.nn.functional` has fastgpt's six functions.

    For code of others that calls `torch.nn.functional.X` or `F.X` (nanoGPT, x-transformers, timm, PyTorch's own
    modules); code that has imported a name directly (`from torch.nn.functional import gelu`) keeps PyTorch's. It
    acts on the process, on every thread. It may be nested; leaving the outermost gives PyTorch's functions back.
    Under `torch.compile`, compile and call within.

        >>> with fastgpt.patch_functional():
        ...     loss = model(tokens)
    """

    def __enter__(self) -> patch_functional:
        global _depth  # noqa: PLW0603
        with _lock:
            if _depth == 0:
                _originals.update({name: getattr(_torch, name) for name in NAMES if hasattr(_torch, name)})
                for name in _originals:
                    setattr(_torch, name, getattr(functional, name))
            _depth += 1
        return self

    def __exit__(self, *exc: object) -> None:
        global _depth  # noqa: PLW0603
        with _lock:
            _depth -= 1
            if _depth == 0:
                for name, original in _originals.items():
                    setattr(_torch, name, original)
                _originals.clear()


# What `torch.jit.script` compiles in the place of the drop-in: PyTorch's functions. Two of them are builtins, which it
# knows inside a function alone.
def _scripted_gelu(input: Tensor, approximate: str = "none") -> Tensor:
    return functional.PYTORCH_GELU(input, approximate=approximate)


def _scripted_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    return functional.PYTORCH_ATTENTION(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
    )


_SCRIPTED: tuple[tuple[Any, Any], ...] = (
    (functional.gelu, _scripted_gelu),
    (functional.layer_norm, functional.PYTORCH_LAYER_NORM),
    (functional.rms_norm, functional.PYTORCH_RMS_NORM),
    (functional.scaled_dot_product_attention, _scripted_attention),
    (functional.cross_entropy, functional.PYTORCH_CROSS_ENTROPY),
    (functional.linear_cross_entropy, functional.PYTORCH_LINEAR_CROSS_ENTROPY),
)
for _ours, _theirs in _SCRIPTED:
    _ours.__prepare_scriptable__ = partial(lambda function: function, _theirs)
