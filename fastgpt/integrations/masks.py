"""Masks of transformers' models that are causality and little more, without their (L, L) elements.

A model makes its mask once and hands it to every layer. Where it is causality, perhaps within a window, beside padding
or within packed documents, it need not be made: the kernels skip what these hide. `attention_mask` then returns a
`CausalMask`, which says so, and which becomes the dense mask for whoever else looks into it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from transformers import masking_utils
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from fastgpt.ops._transforms import unserved


@dataclass(frozen=True)
class Documents:
    """Sequences that lie one after another in the (B, L) tokens of a batch, row after row.

    cu_seqlens: (documents + 1,) int32, where each begins, and the number of tokens.
    longest:    the largest number of tokens of one.
    """

    cu_seqlens: Tensor
    longest: int

    @classmethod
    def beginning(cls, begins: Tensor) -> Documents:
        """Documents of begins (B, L) bool; every row of the batch begins one."""
        begins = begins.clone()
        begins[:, 0] = True
        end = torch.tensor([begins.numel()], device=begins.device)
        cu_seqlens = torch.cat((begins.flatten().nonzero()[:, 0], end)).to(torch.int32)
        return cls(cu_seqlens, int(cu_seqlens.diff().max()))

    def numbers(self, batch: int, length: int) -> Tensor:
        """The number of each token's document, (B, L)."""
        tokens = torch.arange(batch * length, device=self.cu_seqlens.device)
        return torch.bucketize(tokens, self.cu_seqlens, right=True).view(batch, length)


@dataclass(frozen=True)
class Causality:
    """What a row sees: the columns up to its own, and of those

    window:    the last `window` alone, if not None;
    padding:   those that are True in (B, L) bool, if not None;
    documents: those of its own document, if not None.
    """

    window: int | None = None
    padding: Tensor | None = None
    documents: Documents | None = None

    def mask(self, batch: int, length: int, device: Any) -> Tensor:
        """The columns that are seen, (B, 1, L, L) bool."""
        place = torch.arange(length, device=device)
        distance = place[:, None] - place
        seen = (distance >= 0)[None, None]
        if self.window is not None:
            seen = seen & (distance < self.window)
        if self.padding is not None:
            seen = seen & self.padding[:, None, None]
        if self.documents is not None:
            numbers = self.documents.numbers(batch, length)
            seen = seen & (numbers[:, None, :, None] == numbers[:, None, None])
        return seen.expand(batch, 1, length, length)


class CausalMask(Tensor):
    """A mask (B, 1, L, L) of bool without elements: `seen` says what they are.

    A function of PyTorch that is given it and reads elements is given those instead.
    """

    seen: Causality

    @staticmethod
    def __new__(cls, batch: int, length: int, device: Any, seen: Causality) -> CausalMask:
        nothing = torch.zeros((), dtype=torch.bool, device=device).expand(batch, 1, length, length)
        mask = nothing.as_subclass(cls)
        mask.seen = seen
        return mask

    def dense(self) -> Tensor:
        """The mask with elements."""
        return self.seen.mask(self.shape[0], self.shape[-1], self.device)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func not in _WITHOUT_ELEMENTS:
            args, kwargs = tree_map_only(CausalMask, CausalMask.dense, (args, kwargs or {}))
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


# What is asked of a mask on its way to attention.
_ATTRIBUTES = ("shape", "ndim", "dtype", "device", "layout", "is_nested", "requires_grad", "grad_fn")
_WITHOUT_ELEMENTS = {
    *(getattr(Tensor, name).__get__ for name in _ATTRIBUTES),
    *(Tensor.dim, Tensor.size, Tensor.stride, Tensor.storage_offset, Tensor.numel, Tensor.is_floating_point),
}


def attention_mask(
    *,
    batch_size: int = 1,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **options: Any,
) -> Tensor | None:
    """Make the mask of transformers' "sdpa", for `AttentionMaskInterface`.

    Args:
        options: further arguments of transformers, by its version: the number of rows (q_length) or, before 5.4, their
            positions (cache_position).

    Returns:
        (B, 1, Lq, Lk) bool; a `CausalMask` where that says all, but not under `torch.compile`; None where the kernel's
        own causality is the whole mask, also under `torch.compile`, where older versions of transformers build it.
    """
    positions = options.get("cache_position")
    rows = options["q_length"] if positions is None else positions.shape[0]
    if torch.compiler.is_compiling():  # which cannot look into a function
        plain = mask_function is causal_mask_function and local_size is None and attention_mask is None
        if allow_is_causal_skip and plain and rows == kv_length:
            return None
    elif 1 < rows == kv_length and unserved() is None:
        device = options.get("device") if positions is None else positions.device
        found = _causal_mask(mask_function, attention_mask, batch_size, kv_length, device)
        if found is not None:
            return found
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )


def _causal_mask(
    mask_function: Any, padding: Tensor | None, batch: int, length: int, device: Any
) -> CausalMask | None:
    """Return the mask of a mask function of transformers and of padding, if it hides more than causality does."""
    code = _code(mask_function)
    if code not in _CAUSAL + _PACKED or (padding is not None and code in _PACKED):
        return None
    if padding is not None and (type(padding) is not Tensor or padding.shape != (batch, length)):
        return None
    if padding is not None and bool(padding.all()):  # on a GPU this waits for it, as transformers does
        padding = None
    window = _closed_over(mask_function, "sliding_window")
    if window is not None and window >= length:
        window = None
    numbers = _closed_over(mask_function, "packed_sequence_mask")
    if window is None and padding is None and numbers is None:
        return None
    documents = None
    if numbers is not None:
        numbers = numbers.expand(batch, length)
        documents = Documents.beginning(numbers.diff(dim=1, prepend=numbers[:, :1]) != 0)
    return CausalMask(batch, length, device, Causality(window, padding, documents))


def _code(function: Any) -> Any:
    """The code of a function and of the functions that it calls by its closure."""
    if not hasattr(function, "__code__"):
        return None
    return [function.__code__, *map(_code, _inner(function))]


def _inner(function: Any) -> Iterator[Any]:
    """The functions that a function calls by its closure."""
    for cell in function.__closure__ or ():
        inside = cell.cell_contents
        yield from (one for one in (inside if isinstance(inside, tuple) else (inside,)) if callable(one))


def _closed_over(function: Any, name: str) -> Any:
    """The value of a variable in the closure of a function or of one that it calls by it; None without one."""
    for variable, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        if variable == name:
            return cell.cell_contents
    found = (_closed_over(inner, name) for inner in _inner(function))
    return next((value for value in found if value is not None), None)


def _packed(function: Any) -> list[Any]:
    """The codes of a mask function within packed sequences; versions from 5.4 on count the positions of each."""
    numbers = torch.zeros(1, 1)
    of_positions = getattr(masking_utils, "remap_positions_for_packed_sequence", lambda function, _: function)
    within = packed_sequence_mask_function(numbers)
    return [_code(and_masks(inner, within)) for inner in (function, of_positions(function, numbers))]


_WINDOW = sliding_window_causal_mask_function(1)
_CAUSAL = [_code(causal_mask_function), _code(_WINDOW)]
_PACKED = _packed(causal_mask_function) + _packed(_WINDOW)

# The positions that were last asked about, by a weak reference, their version, and the answer.
_asked: tuple[Any, int, Documents | None] | None = None


def documents_of(position_ids: Tensor) -> Documents | None:
    """Return the documents of positions (1, L) that begin again at 0 and otherwise count up; None for other positions.

    transformers masks documents by their positions itself, but not where it keeps a cache, as models do in training by
    default. All layers ask about the same positions, and on a GPU an answer waits for it: the last one is kept.
    """
    global _asked  # noqa: PLW0603
    version = -1 if position_ids.is_inference() else position_ids._version
    if _asked is not None and _asked[0]() is position_ids and _asked[1] == version != -1:
        return _asked[2]
    begins = position_ids == 0
    counts = position_ids[:, 1:] - position_ids[:, :-1] == 1
    packed = bool((begins[:, 1:] | counts).all() & begins[:, 1:].any())
    documents = Documents.beginning(begins) if packed else None
    _asked = (weakref.ref(position_ids), version, documents)
    return documents
