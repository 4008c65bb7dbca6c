"""`accelerate` on models whose code looks at its own attention or that are built of several, and on wrapped ones."""

import pytest
import torch
from client_models import VOCAB, assert_same, batch, loss_and_gradients
from transformers import DeepseekV32Config, Gemma4TextConfig, GlmMoeDsaConfig
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32ForCausalLM
from transformers.models.gemma4.modeling_gemma4 import Gemma4ForCausalLM
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaForCausalLM

import fastgpt
from fastgpt.integrations.attention import attention_forward

SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
SPARSE = SMALL | dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1, index_topk=4,
    index_n_heads=2, index_head_dim=16, first_k_dense_replace=1,
)  # fmt: skip
TOKENS = torch.arange(1, 33).reshape(2, 16)


def details(entries):
    return " ".join(entry.detail for entry in entries)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize(
    ("model", "config"),
    [(GlmMoeDsaForCausalLM, GlmMoeDsaConfig), (DeepseekV32ForCausalLM, DeepseekV32Config)],
)
def test_sparse_attention_is_left_alone(model, config, implementation):
    model = model(config(**SPARSE, attn_implementation=implementation))
    inputs = batch(type(model).__name__)
    before = loss_and_gradients(model, inputs)
    report = fastgpt.accelerate(model)
    assert "asks whether its attention is 'sdpa'" in details(report.left)
    assert model.config._attn_implementation == implementation
    assert_same(before, loss_and_gradients(model, inputs))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_queries_that_a_model_drops_keep_their_place(implementation):
    config = Gemma4TextConfig(
        **SMALL | {"num_hidden_layers": 4}, vocab_size_per_layer_input=VOCAB, num_key_value_heads=2, head_dim=8,
        global_head_dim=8, hidden_size_per_layer_input=8, sliding_window=64, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, attn_implementation=implementation,
    )  # fmt: skip
    model = Gemma4ForCausalLM(config).eval()
    with torch.no_grad():
        expected = [model(TOKENS, logits_to_keep=n).logits for n in (1, 3, 0)]
        assert "asks whether" in details(fastgpt.accelerate(model).left)
        torch.testing.assert_close([model(TOKENS, logits_to_keep=n).logits for n in (1, 3, 0)], expected)


@pytest.mark.parametrize("keyword", ["indices", "block_indices", "s_aux", "sinks"])
def test_keyword_that_changes_the_attention_is_an_error(keyword):
    q = torch.randn(1, 2, 3, 4)
    module = torch.nn.Identity()
    out, _ = attention_forward(module, q, q, q, None, **{keyword: None}, sliding_window=4)
    assert out.shape == (1, 3, 2, 4)
    with pytest.raises(ValueError, match=keyword):
        attention_forward(module, q, q, q, None, **{keyword: torch.zeros(2)})
