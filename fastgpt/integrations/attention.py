"""Attention of every model of transformers that takes its attention from `AttentionInterface`, by that interface."""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from fastgpt import functional, ops
from fastgpt.integrations.masks import Causality, CausalMask, Documents, attention_mask, documents_of
from fastgpt.ops._fallback import goes_to_pytorch, plain_reason
from fastgpt.ops._transforms import unserved
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
            (or the argument's) is_causal says whether rows see later columns. A `CausalMask` has no elements.
        dropout, scaling: of the probabilities, and of the scores (None for 1/√D).
        softcap: scores become c·tanh(scores/c).
        position_bias: added to the scores, where the mask shows them.
        s_aux: (H,), attention sinks: one logit per head that takes part in the softmax without a value.
        others: documents packed in the one row of a batch are those of cu_seq_lens_q and max_length_q, or of
            position_ids that begin again at 0 (not under `torch.compile`); rows see their own document.

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
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    seen, length = None, query.shape[2]
    if isinstance(attention_mask, CausalMask):
        if attention_mask.shape == (len(query), 1, length, key.shape[2]):
            seen, attention_mask = attention_mask.seen, None
        else:
            attention_mask = attention_mask.dense()
    if attention_mask is None and causal and (seen is None or seen.padding is None):
        documents = _documents(query, key, others)
        if documents is not None:
            seen = Causality(seen.window if seen else None, None, documents)
    if position_bias is not None and attention_mask is None and causal and 1 < length == key.shape[2]:
        seen = seen or Causality(None, None, None)
    if seen is not None:
        found = _causal(query, key, value, seen, dropout, scaling, softcap, s_aux, position_bias)
        if found is not None:
            return found.contiguous(), None
        attention_mask = seen.mask(len(query), length, query.device)
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


def _documents(query: Tensor, key: Tensor, given: dict[str, Any]) -> Documents | None:
    """The documents packed in the one row of a batch, by what the model hands to its attention; None without."""
    length = query.shape[2]
    if len(query) != 1 or not 1 < length == key.shape[2]:
        return None
    cu_seqlens, longest = given.get("cu_seq_lens_q"), given.get("max_length_q")
    if cu_seqlens is not None and longest is not None:
        return Documents(cu_seqlens, int(longest))
    positions = given.get("position_ids")
    if torch.compiler.is_compiling() or type(positions) is not Tensor or unserved() is not None:
        return None
    return documents_of(positions) if positions.shape == (1, length) else None


def _causal(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seen: Causality,
    dropout: float,
    scale: Any,
    softcap: float | None,
    sinks: Tensor | None,
    bias: Tensor | None,
) -> Tensor | None:
    """Attention of B × L rows to as many columns, (B, L, H, Dv); None where no kernel serves it."""
    window, padding, documents = seen.window, seen.padding, seen.documents
    op = "attention" if documents is None else "attention_varlen"
    reason = plain_reason(q, k, v, optional=(sinks, bias, padding, documents and documents.cu_seqlens))
    if reason is None and documents is not None and bias is not None:
        reason = "attention_varlen adds nothing to the scores"
    if goes_to_pytorch(op, q, reason, lambda b: kernel_refusal(b, q, v, bias)):
        return None
    options: dict[str, Any] = {
        "scale": scale,
        "dropout_p": dropout,
        "softcap": softcap,
        "sinks": sinks,
        "causal": "lower_right",
    }
    options["window"] = None if window is None else (window - 1, 0)
    if documents is None:
        mask = bias if padding is None else padding[:, None, None]
        if bias is not None and padding is not None:
            mask = torch.where(padding[:, None, None], bias, -torch.inf)
        out: Tensor = ops.attention(q, k, v, attn_mask=mask, **options)
        return out.transpose(1, 2)
    batch, length, cu_seqlens, longest = len(q), q.shape[2], documents.cu_seqlens, documents.longest
    q, k, v = (t.transpose(1, 2).flatten(0, 1) for t in (q, k, v))
    out = ops.attention_varlen(q, k, v, cu_seqlens, cu_seqlens, longest, longest, **options)
    return out.unflatten(0, (batch, length))


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
    elif (size := max(map(_head_dim, model.modules()), default=0)) > MAX_HEAD_DIM:
        reason = f"its head_dim is {size}, and the kernels go up to {MAX_HEAD_DIM}"
    return f"{name}: {reason}" if name and reason else reason


def _passes_what_is_served(model: PreTrainedModel) -> bool:
    """Return whether all attentions of a model call the interface with known keywords alone, and tell their causality.

    A model without "sdpa" may lack it for a softcap or sinks alone, which PyTorch's function does not have; or because
    is_causal is false on attentions whose mask is causal: "eager" always makes one.
    """
    modules = [module for module in model.modules() if uses_interface(module)]
    calls = [(module, _keywords(inspect.unwrap(type(module).forward))) for module in modules]
    return any(keywords is not None for _, keywords in calls) and all(
        keywords is None or (keywords <= _SERVED and _tells_causality(module)) for module, keywords in calls
    )


def _tells_causality(module: nn.Module) -> bool:
    """Return whether an attention is causal by its is_causal, or no model of its file makes a causal mask."""
    return getattr(module, "is_causal", False) is True or not _makes_causal_masks(type(module).__module__)


@functools.cache
def _makes_causal_masks(module: str) -> bool:
    """Return whether the code of a module of transformers names a causal mask, or cannot be read."""
    try:
        return "causal_mask" in inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return True


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
