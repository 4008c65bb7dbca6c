"""transformers' ELECTRA: the generator (masked language model) and the discriminator (replaced tokens)."""

from __future__ import annotations

from torch import Tensor
from transformers.models.electra import modeling_electra

from fastgpt.integrations.language_model import OwnerOfHead, causal_loss, masked_loss, with_fused_loss
from fastgpt.integrations.replacement import OwnerOfGelu

_HEAD = "generator_lm_head"


class ElectraIntermediate(OwnerOfGelu, modeling_electra.ElectraIntermediate):
    replaces, then = modeling_electra.ElectraIntermediate, "intermediate_act_fn"

    def forward(self, hidden_states: Tensor) -> Tensor:
        return self.activated(hidden_states)


class ElectraGeneratorPredictions(OwnerOfGelu, modeling_electra.ElectraGeneratorPredictions):
    replaces, then = modeling_electra.ElectraGeneratorPredictions, "activation"

    def forward(self, generator_hidden_states: Tensor) -> Tensor:
        return self.LayerNorm(self.activated(generator_hidden_states))


class ElectraDiscriminatorPredictions(OwnerOfGelu, modeling_electra.ElectraDiscriminatorPredictions):
    replaces, then = modeling_electra.ElectraDiscriminatorPredictions, "activation"

    def forward(self, discriminator_hidden_states: Tensor) -> Tensor:
        return self.dense_prediction(self.activated(discriminator_hidden_states)).squeeze(-1)


class ElectraForMaskedLM(OwnerOfHead, modeling_electra.ElectraForMaskedLM):
    replaces, head = modeling_electra.ElectraForMaskedLM, _HEAD
    forward = with_fused_loss(modeling_electra.ElectraForMaskedLM.forward, _HEAD, masked_loss)


class ElectraForCausalLM(OwnerOfHead, modeling_electra.ElectraForCausalLM):
    replaces, head = modeling_electra.ElectraForCausalLM, _HEAD
    forward = with_fused_loss(modeling_electra.ElectraForCausalLM.forward, _HEAD, causal_loss, no_cache=True)


REPLACEMENTS = (
    ElectraIntermediate,
    ElectraGeneratorPredictions,
    ElectraDiscriminatorPredictions,
    ElectraForMaskedLM,
    ElectraForCausalLM,
)
