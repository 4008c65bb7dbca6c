"""Attention of every model of transformers that takes its attention from `AttentionInterface`, by that interface."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function, sdpa_mask, sliding_window_causal_mask_function

from fastgpt import functional, ops
from fastgpt.ops._fallback import goes_to_pytorch, plain_reason
from fastgpt.ops.attention import MAX_HEAD_DIM
from fastgpt.ops.attention import refusal as kernel_refusal

_collector: Any = None
with contextlib.suppress(ImportError):  # before 5.2; the outputs that the caller of the running model wants
    from transformers.utils.output_capturing import _active_collector as _collector

NAME = "fastgpt"
_REPLACED = ("sdpa", "eager")  # whose masks and results these functions give
# What models hand to an attention that computes something else with it.
_UNSERVED = {
    "indices": "sparse attention",
    "block_indices": "sparse attention",
    "sinks": "attention sinks by this name",
}
# Keywords of a model's call that `attention_forward` computes, or that its mask says already.
_SERVED = {"dropout", "scaling", "is_causal", "softcap", "sliding_window", "position_bias", "s_aux"}
# Parameters that are added to the scores: the mask requires a gradient then, which only PyTorch computes.
_LEARNED_BIAS = re.compile(r"(^|\.)(relative_position_bias(_table)?|relative_attention_bias)(\.|$)")
# Modules that ask for "eager" and compute the same then: GPT-2's reorder_and_upcast_attn differs by rounding alone.
_HARMLESS = (
    "transformers.models.gpt2.modeling_gpt2",
    "transformers.models.decision_transformer.modeling_decision_transformer",
)


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers' "sdpa" computes it, for `AttentionInterface`; and with softcap and sinks.

    Args:
        query: (B, H, Lq, D).
        key, value: (B, Hk, Lk, D) and (B, Hk, Lk, Dv), Hk dividing H.
        attention_mask: broadcastable to (B, H, Lq, Lk), bool (True takes part) or added; without one the module's
            (or the argument's) is_causal says whether rows see later columns. One of no columns, (1, 1, W, 0), stands
            for causality within a window of W columns (`attention_mask` below).
        dropout, scaling: of the probabilities, and of the scores (None for 1/√D).
        softcap: scores become c·tanh(scores/c).
        position_bias: added to the scores, where the mask shows them.
        s_aux: (H,), attention sinks: one logit per head that takes part in the softmax without a value.

    Returns:
        (B, Lq, H, Dv), and None for the weights.

    Raises:
        ValueError: the model has sparse attention (indices), which this does not compute; or its weights are requested.
    """
    collected = _collector.get() if _collector is not None else None
    if others.get("output_attentions") or (collected and {"attentions", "cross_attentions"} & set(collected)):
        raise ValueError(
            "fastgpt's attention makes no weights (output_attentions=True): use set_attn_implementation('eager')"
        )
    for keyword, meaning in _UNSERVED.items():
        if others.get(keyword) is not None:
            raise ValueError(
                f"fastgpt's attention has no {meaning} ({keyword}): use set_attn_implementation('eager')"
            )
    if attention_mask is not None and attention_mask.shape[-1] == 0 < key.shape[2]:
        window = attention_mask.shape[-2]
        if position_bias is None:
            out = _windowed(query, key, value, window, dropout, scaling, softcap, s_aux)
            return out.transpose(1, 2).contiguous(), None
        attention_mask = _band(query, key, window)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = bool(query.shape[2] > 1 and attention_mask is None and causal)  # a tensor in torch.jit.trace
    if position_bias is not None:
        attention_mask, causal = _with_bias(position_bias, attention_mask, causal, query, key), False
    if softcap is not None or s_aux is not None:
        out = _extended(query, key, value, attention_mask, dropout, causal, scaling, softcap, s_aux)
    else:
        gqa = bool(query.shape[1] != key.shape[1])
        options = (attention_mask, dropout, causal, scaling, gqa)
        found = functional.attention(query, key, value, *options)
        out = functional.pytorch_attention(query, key, value, *options) if found is None else found
    return out.transpose(1, 2).contiguous(), None


def _windowed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window: int,
    dropout: float,
    scale: Any,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Causal attention to the last `window` columns, the row's own included."""
    reason = plain_reason(q, k, v, optional=(sinks,))
    if not goes_to_pytorch("attention", q, reason, lambda b: kernel_refusal(b, q, v, None)):
        options: dict[str, Any] = {"causal": "lower_right", "window": (window - 1, 0), "softcap": softcap}
        return ops.attention(q, k, v, scale=scale, sinks=sinks, dropout_p=dropout, **options)
    mask = _band(q, k, window)
    if softcap is not None or sinks is not None:
        return _extended(q, k, v, mask, dropout, False, scale, softcap, sinks)
    return functional.pytorch_attention(q, k, v, mask, dropout, False, scale, bool(q.shape[1] != k.shape[1]))


def _band(q: Tensor, k: Tensor, window: int) -> Tensor:
    """The mask of causality within a window, (Lq, Lk) bool."""
    rows, columns = q.shape[2], k.shape[2]
    seen = torch.ones(rows, columns, dtype=torch.bool, device=q.device)
    return seen.tril(columns - rows).triu(columns - rows - window + 1)


def _extended(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    dropout: float,
    causal: bool,
    scale: Any,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Attention with a softcap or sinks, for which PyTorch has no function; its operators, where no kernel serves."""
    reason = plain_reason(q, k, v, optional=(mask, sinks))
    if not goes_to_pytorch("attention", q, reason, lambda b: kernel_refusal(b, q, v, mask)):
        direction = "upper_left" if causal else "none"
        options: dict[str, Any] = {"causal": direction, "softcap": softcap, "sinks": sinks}
        return ops.attention(q, k, v, scale=scale, attn_mask=mask, dropout_p=dropout, **options)
    k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], dim=1) for t in (k, v))
    scores = q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.view(-1, 1, 1).expand(*scores.shape[:3], 1)), dim=-1)
    p = torch.softmax(scores, dim=-1, dtype=torch.float32)[..., : k.shape[2]].to(q.dtype)
    return torch.dropout(p.nan_to_num(0.0), dropout, dropout > 0) @ v


def _with_bias(bias: Tensor, mask: Tensor | None, causal: bool, q: Tensor, k: Tensor) -> Tensor:
    """One mask to be added: the bias, and the least number of the dtype where nothing is seen."""
    if mask is None and causal:
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril()
    if mask is None:
        return bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(k.dtype).min)
    return bias + mask


def attention_mask(
    *,
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
        (B, 1, Lq, Lk) bool, or None where the kernel's own causality is the whole mask; also under `torch.compile`,
        where older versions of transformers build it. Where causality within a window of W columns is the whole mask,
        (1, 1, W, 0): no mask is made, and `attention_forward` reads the window off its shape (not while compiling).
    """
    rows = options["q_length"] if "q_length" in options else options["cache_position"].shape[0]
    plain = mask_function is causal_mask_function and local_size is None and attention_mask is None
    if allow_is_causal_skip and plain and torch.compiler.is_compiling() and rows == kv_length:
        return None
    if (
        allow_is_causal_skip
        and not torch.compiler.is_compiling()  # which cannot look into a function
        and rows == kv_length
        and local_size is not None
        and local_size < kv_length
        and _is_window(mask_function)
        and _hides_nothing(attention_mask)
    ):
        return torch.empty(1, 1, local_size, 0, dtype=torch.bool, device=options.get("device"))
    return sdpa_mask(
        kv_length=kv_length,
        mask_function=mask_function,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=allow_is_causal_skip,
        **options,
    )


def _is_window(mask_function: Any) -> bool:
    """Return whether a mask function of transformers is causality within a window and nothing else."""
    plain = sliding_window_causal_mask_function(1)
    return _code(mask_function) is not None and _code(mask_function) == _code(plain)


def _code(function: Any) -> Any:
    """The code of a function and of the functions that it calls by its closure."""
    if not hasattr(function, "__code__"):
        return None
    found = [function.__code__]
    for cell in function.__closure__ or ():
        inner = cell.cell_contents
        found += [_code(one) for one in (inner if isinstance(inner, tuple) else (inner,)) if callable(one)]
    return found


def _hides_nothing(padding: Tensor | None) -> bool:
    """Return whether a padding mask (B, L) is absent or shows every token.

    On a GPU this waits for it, once a forward, as transformers does for its other masks.
    """
    return padding is None or (type(padding) is Tensor and bool(padding.all()))


def refusal(model: PreTrainedModel, name: str = "") -> str | None:
    """Return why a model's attention must be left unchanged, or None; `name` is its name within a larger model."""
    current = model.config._attn_implementation
    reason = None
    if current == NAME:
        reason = "its attention is fastgpt's already, by way of a model with the same config or that holds it"
    elif current not in _REPLACED:
        reason = f"its attention is {current!r}, which was chosen"
    elif not model._can_set_attn_implementation():
        reason = "it does not take its attention from AttentionInterface"
    elif (asking := _asks(model, current)) is not None:
        reason = f"its code asks whether its attention is {asking!r}, and may compute something else if not"
    elif not model._supports_sdpa and not _passes_what_is_served(model):
        reason = "it has no 'sdpa': its attention is a variant that is not known"
    elif getattr(model.config, "output_attentions", False):
        reason = "it returns its attention weights (output_attentions)"
    elif any(_LEARNED_BIAS.search(n) for n, p in model.named_parameters() if p.requires_grad):
        reason = (
            "it learns a bias of its scores, whose gradient no kernel computes: in training PyTorch would run"
        )
    elif (size := max(map(_head_dim, model.modules()), default=0)) > MAX_HEAD_DIM:
        reason = f"its head_dim is {size}, and the kernels go up to {MAX_HEAD_DIM}"
    return f"{name}: {reason}" if name and reason else reason


def _passes_what_is_served(model: PreTrainedModel) -> bool:
    """Return whether every call of an attention interface in a model's attentions has known keywords alone.

    A model without "sdpa" may lack it for a softcap or sinks only, which PyTorch's function does not have.
    """
    forwards = {type(module).forward for module in model.modules() if uses_interface(module)}
    found = [_keywords(inspect.unwrap(forward)) for forward in forwards]
    calls = [keywords for keywords in found if keywords is not None]
    return bool(calls) and all(keywords <= _SERVED for keywords in calls)


@functools.cache
def _keywords(forward: Any) -> frozenset[str] | None:
    """Return the keywords of the calls of `attention_interface` in a forward; None if there is no such call.

    "attention_mask" is among them where the forward changes its mask (DeepSeek V4), which may not fit ours.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(forward)))
    except (OSError, TypeError, SyntaxError):
        return frozenset({"unknown"})
    calls = [
        node for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "attention_interface"
    ]  # fmt: skip
    named = [keyword.arg for call in calls for keyword in call.keywords if keyword.arg is not None]
    stored = [
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    ]
    return frozenset([*named, *({"attention_mask"} & set(stored))]) if calls else None


def _head_dim(module: nn.Module) -> int:
    """The columns of a head, of a module of transformers that is an attention; 0 of all others."""
    size = getattr(module, "head_dim", 0) if uses_interface(module) else 0
    return size if isinstance(size, int) else 0


def _asks(model: PreTrainedModel, current: str) -> str | None:
    """Return the implementation that a model's code compares its own with: "sdpa", the current one, or None."""
    classes = {cls for kind in {type(module) for module in model.modules()} for cls in kind.__mro__}
    asked = frozenset().union(*map(_compared, {cls.__module__ for cls in classes}))
    return next((name for name in ("sdpa", current) if name in asked), None)


@functools.cache
def _compared(module: str) -> frozenset[str]:
    """Of `_REPLACED`, what a module of models compares with after a model has been built."""
    package, _, inside = module.partition(".")
    ours = package in ("builtins", "torch", "fastgpt") or package == "transformers"
    if (ours and not inside.startswith("models.")) or module in _HARMLESS:
        return frozenset()
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):  # a notebook
        return frozenset()
    if not any(name in source for name in _REPLACED):
        return frozenset()
    finder = _Comparisons()
    finder.visit(ast.parse(source))
    return frozenset(finder.found)


class _Comparisons(ast.NodeVisitor):
    """Collects in `found` the names of `_REPLACED` that are compared with an `_attn_implementation`."""

    def __init__(self) -> None:
        self.found: set[str] = set()

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name not in ("__init__", "post_init"):  # these are over when a model is accelerated
            self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        if "attn_impl" in ast.unparse(node):
            values = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
            self.found.update(name for name in _REPLACED if name in values)


def outermost(model: nn.Module, name: str = "") -> Iterator[tuple[str, PreTrainedModel]]:
    """The models of transformers in a model that are in no other, with their names."""
    if isinstance(model, PreTrainedModel):
        yield name, model
        return
    for child_name, child in model.named_children():
        yield from outermost(child, f"{name}.{child_name}" if name else child_name)


def configured(model: PreTrainedModel) -> list[tuple[str, PreTrainedModel]]:
    """The models within a model, itself included, one a configuration, with their names; outermost first."""
    found: dict[int, tuple[str, PreTrainedModel]] = {}
    for name, module in model.named_modules():
        if isinstance(module, PreTrainedModel):
            found.setdefault(id(module.config), (name, module))
    return list(found.values())


def uses_interface(module: nn.Module) -> bool:
    """Return whether a module of transformers is or contains an attention, for which the model decides."""
    return type(module).__module__.startswith("transformers.") and "Attention" in type(module).__name__


def runs(before: dict[tuple[str, ...], str]) -> str:
    """Describe models that had these implementations, for the report."""
    if "eager" in before.values():
        return (
            "attention (as with 'sdpa': of padding alone it is 0, where 'eager' gives a mean, and there are no "
            "weights for output_attentions=True)"
        )
    return "attention"


def in_force(model: PreTrainedModel) -> dict[tuple[str, ...], str]:
    """Return the implementation of every configuration in a model.

    A key is the name of the submodel that has the configuration, followed by the attributes that lead to configurations
    inside it that no submodel has.
    """
    found: dict[int, tuple[tuple[str, ...], Any]] = {}

    def visit(config: Any, *key: str) -> None:
        if config is not None and id(config) not in found:
            found[id(config)] = key, config._attn_implementation
            for part in getattr(config, "sub_configs", {}):
                visit(getattr(config, part, None), *key, part)

    for name, inner in configured(model):
        visit(inner.config, name)
    return dict(found.values())


def give_back(model: nn.Module, before: dict[tuple[str, ...], str]) -> None:
    """Undo set_attn_implementation(NAME): `before` is what was `in_force`. What was set since stays."""
    for (name, *parts), implementation in before.items():
        config: Any = model.get_submodule(name).config
        for part in parts:
            config = getattr(config, part, None)
        if getattr(config, "_attn_implementation", None) == NAME:
            config._attn_implementation_internal = implementation  # of this one alone, not of those within it


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
