"""PyTorch's own modules: GELU, LayerNorm, RMSNorm, CrossEntropyLoss, MultiheadAttention and the layers made of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as T

from fastgpt import functional
from fastgpt.integrations.replacement import OwnerOfGelu, Replacement


class GELU(Replacement, nn.GELU):
    replaces, option, runs = nn.GELU, "gelu", "gelu"
    scripts = True

    def forward(self, input: Tensor) -> Tensor:
        return functional.gelu(input, approximate=self.approximate)


class LayerNorm(Replacement, nn.LayerNorm):
    replaces, option, runs = nn.LayerNorm, "layer_norm", "add_layer_norm"
    scripts = True

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(Replacement, nn.RMSNorm):
    replaces, option, runs = nn.RMSNorm, "rms_norm", "rms_norm"
    scripts = True

    def forward(self, x: Tensor) -> Tensor:
        return functional.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class CrossEntropyLoss(Replacement, nn.CrossEntropyLoss):
    replaces, option, runs = nn.CrossEntropyLoss, "cross_entropy", "cross_entropy"
    scripts = True

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return functional.cross_entropy(
            input,
            target,
            weight=self.weight,
            ignore_index=self.ignore_index,
            reduction=self.reduction,
            label_smoothing=self.label_smoothing,
        )


class MultiheadAttention(Replacement, nn.MultiheadAttention):
    """Without weights (`need_weights=False`) and for a batch; everything else PyTorch computes, as before."""

    replaces, option, runs = nn.MultiheadAttention, "attention", "attention"

    @classmethod
    def refusal(cls, module: Any) -> str | None:
        if module.bias_k is not None or module.bias_v is not None:
            return "it appends a bias to keys and values"
        if module.add_zero_attn:
            return "it appends a zero to keys and values"
        return None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if need_weights or not self._takes(query, key, value, key_padding_mask, attn_mask, is_causal):
            return super().forward(
                query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
            )
        causal = is_causal and key_padding_mask is None  # a hint, which PyTorch follows then only
        mask = None if causal else self._mask(attn_mask, key_padding_mask)
        q, k, v = (self._heads(x) for x in self._project(query, key, value))  # (B, H, L, D)
        options = (mask, self.dropout if self.training else 0.0, causal, None, False)
        out = functional.attention(q, k, v, *options)
        if out is None:
            out = functional.pytorch_attention(q, k, v, *options)
        out = out.permute(0, 2, 1, 3) if self.batch_first else out.permute(2, 0, 1, 3)
        return T.linear(out.flatten(2), self.out_proj.weight, self.out_proj.bias), None

    def _takes(
        self, q: Tensor, k: Tensor, v: Tensor, padding: Tensor | None, mask: Tensor | None, is_causal: bool
    ) -> bool:
        """Return whether the arguments are a batch that PyTorch accepts; PyTorch reports errors in others."""
        if any(x.is_nested or x.dim() != 3 for x in (q, k, v)) or (is_causal and mask is None):
            return False
        sizes = (self.embed_dim, self.kdim, self.vdim)
        if tuple(x.shape[2] for x in (q, k, v)) != sizes or k.shape[:2] != v.shape[:2]:
            return False
        batch, length = (0, 1) if self.batch_first else (1, 0)
        if q.shape[batch] != k.shape[batch]:
            return False
        if padding is not None and tuple(padding.shape) != (k.shape[batch], k.shape[length]):
            return False
        if any(
            m is not None and m.dtype != torch.bool and not m.is_floating_point() for m in (mask, padding)
        ):
            return False
        if mask is None:
            return True
        rows_and_columns = (q.shape[length], k.shape[length])
        return tuple(mask.shape) in (
            rows_and_columns,
            (q.shape[batch] * self.num_heads, *rows_and_columns),
        )

    def _mask(self, mask: Tensor | None, padding: Tensor | None) -> Tensor | None:
        """One mask, broadcastable to (B, H, L, S), of the two: True takes part, or to be added."""
        if mask is not None:
            mask = mask.unflatten(0, (-1, self.num_heads)) if mask.dim() == 3 else mask
        if padding is not None:
            padding = padding[:, None, None]
        given = [m for m in (mask, padding) if m is not None]
        if all(m.dtype == torch.bool for m in given):
            kept = [~m for m in given]
            return kept[0] & kept[1] if len(kept) == 2 else kept[0] if kept else None
        dtype = next(m.dtype for m in given if m.is_floating_point())
        added = [m if m.is_floating_point() else _added(m, dtype) for m in given]
        return added[0] + added[1] if len(added) == 2 else added[0]

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values, from one product where they are made of one tensor."""
        if self._qkv_same_embed_dim and query is key and key is value:
            return T.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        if self._qkv_same_embed_dim:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return tuple(map(T.linear, (query, key, value), weights, biases))

    def _heads(self, x: Tensor) -> Tensor:
        """(B, L, E) or, unless batch_first, (L, B, E) as (B, H, L, D)."""
        x = x.unflatten(2, (self.num_heads, self.head_dim))
        return x.permute(0, 2, 1, 3) if self.batch_first else x.permute(1, 2, 0, 3)


def _added(mask: Tensor, dtype: Any) -> Tensor:
    """A mask whose True does not take part, as one to be added."""
    return mask.new_zeros(mask.shape, dtype=dtype).masked_fill_(mask, -float("inf"))


class TransformerEncoderLayer(OwnerOfGelu, nn.TransformerEncoderLayer):
    """The feed-forward block of an encoder layer; attention and norms are modules of their own.

    Without gradients, in evaluation, PyTorch's encoder has its own fused path, which stays.
    """

    replaces, first, then = nn.TransformerEncoderLayer, "linear1", "activation"

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activated(x))))


class TransformerDecoderLayer(OwnerOfGelu, nn.TransformerDecoderLayer):
    """Its feed-forward block."""

    replaces, first, then = nn.TransformerDecoderLayer, "linear1", "activation"

    def _ff_block(self, x: Tensor) -> Tensor:
        return self.dropout3(self.linear2(self.dropout(self.activated(x))))


REPLACEMENTS = (
    GELU,
    LayerNorm,
    RMSNorm,
    CrossEntropyLoss,
    MultiheadAttention,
    TransformerEncoderLayer,
    TransformerDecoderLayer,
)
