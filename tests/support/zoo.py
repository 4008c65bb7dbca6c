"""Every language model of transformers, by its registry, from a small configuration that is made by rule."""

import contextlib

import torch
import transformers
from transformers.models.auto import modeling_auto

_REGISTRIES = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
)
VOCABULARY, LENGTH, LARGEST = 97, 16, 30_000_000  # of tokens, and of parameters

# A configuration's sizes, by what they are called.
_SIZES = {
    VOCABULARY: "vocab_size text_vocab_size",
    64: "max_position_embeddings n_positions n_ctx max_seq_len max_source_positions max_target_positions",
    48: "intermediate_size d_ff n_inner encoder_ffn_dim decoder_ffn_dim hidden_dim ffn_dim dff",
    32: "hidden_size d_model n_embd dim model_dim emb_dim embed_dim d_embed",
    16: "embedding_size moe_intermediate_size expert_ffn_hidden_size shared_expert_intermediate_size "
    "moe_shared_expert_intermediate_size",
    8: "head_dim d_kv dim_head",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads num_experts num_local_experts n_routed_experts "
    "moe_num_experts rotary_dim",
    2: "num_hidden_layers num_layers n_layer n_layers encoder_layers decoder_layers num_decoder_layers "
    "num_encoder_layers num_key_value_heads num_experts_per_tok moe_k",
    0.0: "hidden_dropout_prob attention_probs_dropout_prob dropout attention_dropout activation_dropout resid_pdrop "
    "embd_pdrop attn_pdrop dropout_rate hidden_dropout embed_dropout resid_dropout embedding_dropout layerdrop "
    "classifier_dropout decoder_layerdrop encoder_layerdrop residual_dropout mlp_dropout embeddings_dropout",
}
# Latent attention, whose heads all have keys of their own, in two parts.
_LATENT = {
    "num_key_value_heads": 4,
    "head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
_BY_LAYER = ("layer_types", "mlp_layer_types", "layers_block_type", "indexer_types")

# Classes without a small model by these rules, or whose model does not run with tokens and labels within a minute.
_UNBUILT = """
AXK1ForCausalLM BailingHybridForCausalLM BambaForCausalLM BeamForCausalLM BltForCausalLM CohereCompassForCausalLM
DbrxForCausalLM DeepseekV2ForCausalLM DeepseekV32ForCausalLM DoryForCausalLM Dots1ForCausalLM Dots3NoteForCausalLM
EsmForMaskedLM FalconH1ForCausalLM FunnelForMaskedLM GPTNeoForCausalLM Gemma3nForCausalLM
Gemma3nForConditionalGeneration Gemma4AssistantForCausalLM Gemma4ForCausalLM Gemma4ForConditionalGeneration
Gemma4UnifiedAssistantForCausalLM Gemma4UnifiedForCausalLM Gemma4UnifiedForConditionalGeneration GitForCausalLM
GraniteMoeHybridForCausalLM HunYuanDenseV1ForCausalLM HunYuanMoEV1ForCausalLM Inkling2ForCausalLM
Inkling2LoopForCausalLM JambaForCausalLM KimiLinearForCausalLM Lfm2MoeForCausalLM LukeForMaskedLM Mamba2ForCausalLM
MinistralForCausalLM MptForCausalLM MusicgenForCausalLM MusicgenMelodyForCausalLM
Nemotron3_5TranscribeForConditionalGeneration NemotronForCausalLM NemotronHForCausalLM PerceiverForMaskedLM
ProphetNetForCausalLM ProphetNetForConditionalGeneration Qwen4ExpForCausalLM RecurrentGemmaForCausalLM
ReformerForMaskedLM ReformerModelWithLMHead SqueezeBertForMaskedLM VibeVoiceAsrForConditionalGeneration
VoxtralRealtimeForConditionalGeneration XLNetLMHeadModel XmodForCausalLM XmodForMaskedLM ZambaForCausalLM
ZayaForCausalLM xLSTMForCausalLM
"""
UNBUILT = frozenset(_UNBUILT.split())


def names():
    """The classes' names, in the registries' order."""
    return list(
        dict.fromkeys(name for registry in _REGISTRIES for name in getattr(modeling_auto, registry).values())
    )


def small(config):
    """A configuration of a class, of two layers and few channels."""
    usual = config()
    sizes = {name: size for size, names in _SIZES.items() for name in names.split()}
    given = {name: size for name, size in sizes.items() if getattr(usual, name, None) is not None} | _SPECIAL
    if hasattr(usual, "qk_rope_head_dim"):
        given |= {name: size for name, size in _LATENT.items() if hasattr(usual, name)}
    for name, value in vars(usual).items():
        if isinstance(value, transformers.PretrainedConfig):
            given[name] = small(type(value)).to_dict()
        if name in _BY_LAYER and isinstance(value, list) and value:
            given[name] = (list(dict.fromkeys(value)) * 2)[:2]  # of two kinds, if there are
    with contextlib.suppress(Exception):  # too few heads for these sizes
        return config(**given)
    return config(
        **{name: size for name, size in given.items() if name not in ("num_key_value_heads", "head_dim")}
    )


def build(name):
    """A model in training mode, with random numbers in the place of zeros and ones.

    Raises:
        ValueError: it has more than `LARGEST` parameters.
    """
    kind = getattr(transformers, name)
    config = small(kind.config_class)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in kind(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{name} has {size:,} parameters")
    model = kind(config).float()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def batch(padding=None):
    """Tokens and labels of two rows; padding is "left", "right" or None. A row of padding alone predicts nothing."""
    tokens = torch.randint(5, VOCABULARY - 7, (2, LENGTH))
    shown = torch.ones_like(tokens)
    if padding is not None:
        shown[0, slice(0, 5) if padding == "left" else slice(LENGTH - 5, LENGTH)] = 0
    labels = tokens.masked_fill(shown.cumsum(1) < 2 if padding == "left" else shown == 0, -100)
    labels[1, :3] = -100
    return {"input_ids": tokens, "labels": labels} | ({"attention_mask": shown} if padding else {})
