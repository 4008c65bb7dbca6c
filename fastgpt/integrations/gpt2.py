"""transformers' GPT-2, whose linear layers are "Conv1D": a weight of (in, out)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.gpt2 import modeling_gpt2
from transformers.pytorch_utils import Conv1D

from fastgpt.integrations.language_model import OwnerOfHead, causal_loss, with_fused_loss
from fastgpt.integrations.replacement import OwnerOfGelu, Replacement, linear_gelu


class Conv1DGelu(Replacement, Conv1D):
    """`LinearGelu` with a weight of (in, out)."""

    replaces, option, runs = Conv1D, "gelu", "linear_gelu"

    def forward(self, x: Tensor, approximate: str | None = None) -> Tensor:
        if approximate is None:
            return super().forward(x)
        return linear_gelu(x, self.weight.T, self.bias, approximate)


class GPT2MLP(OwnerOfGelu, modeling_gpt2.GPT2MLP):
    replaces = modeling_gpt2.GPT2MLP
    first, first_class, then = "c_fc", Conv1DGelu, "act"

    def forward(self, hidden_states: Any) -> Tensor:
        return self.dropout(self.c_proj(self.activated(hidden_states)))


class GPT2LMHeadModel(OwnerOfHead, modeling_gpt2.GPT2LMHeadModel):
    replaces, head = modeling_gpt2.GPT2LMHeadModel, "lm_head"
    forward = with_fused_loss(modeling_gpt2.GPT2LMHeadModel.forward, head, causal_loss)


REPLACEMENTS = (GPT2MLP, GPT2LMHeadModel)
