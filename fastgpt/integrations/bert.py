"""transformers' BERT."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.bert import modeling_bert

from fastgpt import functional
from fastgpt.integrations.language_model import OwnerOfHead, causal_loss, masked_loss, with_fused_loss
from fastgpt.integrations.replacement import OwnerOfGelu

_HEAD = "cls.predictions.decoder"


class BertIntermediate(OwnerOfGelu, modeling_bert.BertIntermediate):
    replaces, then = modeling_bert.BertIntermediate, "intermediate_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activated(hidden_states)


class BertPredictionHeadTransform(OwnerOfGelu, modeling_bert.BertPredictionHeadTransform):
    replaces, then = modeling_bert.BertPredictionHeadTransform, "transform_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.activated(hidden_states))


class BertForMaskedLM(OwnerOfHead, modeling_bert.BertForMaskedLM):
    replaces, head = modeling_bert.BertForMaskedLM, _HEAD
    forward = with_fused_loss(modeling_bert.BertForMaskedLM.forward, _HEAD, masked_loss)


def _next_sentence_loss(output: Any, labels: Tensor) -> Tensor:
    return functional.cross_entropy(output.seq_relationship_logits.view(-1, 2), labels.view(-1))


class BertForPreTraining(OwnerOfHead, modeling_bert.BertForPreTraining):
    replaces, head = modeling_bert.BertForPreTraining, _HEAD
    forward = with_fused_loss(
        modeling_bert.BertForPreTraining.forward,
        _HEAD,
        masked_loss,
        logits="prediction_logits",
        rest=("next_sentence_label", _next_sentence_loss),
    )


class BertLMHeadModel(OwnerOfHead, modeling_bert.BertLMHeadModel):
    replaces, head = modeling_bert.BertLMHeadModel, _HEAD
    forward = with_fused_loss(modeling_bert.BertLMHeadModel.forward, _HEAD, causal_loss, no_cache=True)


REPLACEMENTS = (
    BertIntermediate,
    BertPredictionHeadTransform,
    BertForMaskedLM,
    BertForPreTraining,
    BertLMHeadModel,
)
