"""What the report of `accelerate` says of models of transformers, beside what runs; caches and attention weights."""

import platform
import sys

import pytest
import torch
from torch import nn

import fastgpt
from fastgpt import ops
from tests.support.client_models import VOCAB

hf = pytest.importorskip("transformers")
accelerate_module = sys.modules["fastgpt.integrations.accelerate"]  # fastgpt.accelerate is the function
TOKENS = torch.arange(1, 25).reshape(2, 12)

SMALL = dict(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
             max_position_embeddings=64, pad_token_id=0)  # fmt: skip
T5 = dict(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4, decoder_start_token_id=0)
IMAGES = dict(hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48, image_size=32,
              patch_size=8)  # fmt: skip
MODELS = {
    "mistral": lambda **o: hf.MistralForCausalLM(hf.MistralConfig(**SMALL, num_key_value_heads=2, **o)),
    "qwen2": lambda **o: hf.Qwen2ForCausalLM(hf.Qwen2Config(**SMALL, num_key_value_heads=2, **o)),
    "gpt2": lambda **o: hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, n_positions=64, **o)
    ),
    "opt": lambda **o: hf.OPTForCausalLM(
        hf.OPTConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, ffn_dim=48,
                     word_embed_proj_dim=32, max_position_embeddings=64, **o)
    ),
    "neox": lambda **o: hf.GPTNeoXForCausalLM(hf.GPTNeoXConfig(**SMALL, **o)),
    "bert": lambda **o: hf.BertForMaskedLM(hf.BertConfig(**SMALL, **o)),
    "bert decoder": lambda **o: hf.BertLMHeadModel(hf.BertConfig(**SMALL, is_decoder=True, **o)),
    "electra decoder": lambda **o: hf.ElectraForCausalLM(
        hf.ElectraConfig(**SMALL, is_decoder=True, embedding_size=16, **o)
    ),
}  # fmt: skip


class DoubledRMSNorm(hf.models.llama.modeling_llama.LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


def kinds(entries):
    return {entry.kind for entry in entries}


@pytest.mark.parametrize("name", ["mistral", "qwen2"])
def test_norms_and_gates_are_said_to_be_left(name):
    model = MODELS[name](hidden_act="relu")
    model.model.norm = DoubledRMSNorm(32)
    report = fastgpt.accelerate(model)
    found = kinds(report.left)
    for part in ("RMSNorm", "MLP"):
        assert any(kind.endswith(part) for kind in found), str(report)
    assert "patch_functional" not in str(report)


def test_keeping_freed_memory_is_advised_until_it_is_done(monkeypatch):
    monkeypatch.setattr(fastgpt.malloc, "_is_kept", False)
    libc = platform.libc_ver()[0]
    advised = str(fastgpt.accelerate(nn.GELU()))
    assert ("fastgpt.keep_freed_memory()" in advised) is (libc == "glibc")
    assert fastgpt.keep_freed_memory() is (libc == "glibc")
    if libc == "glibc":
        assert "keep_freed_memory" not in str(fastgpt.accelerate(nn.GELU()))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    monkeypatch.setattr(fastgpt.malloc, "_is_kept", False)
    assert "keep_freed_memory" not in str(fastgpt.accelerate(nn.GELU()))
    assert not fastgpt.keep_freed_memory()
    monkeypatch.setattr(fastgpt.malloc, "_is_kept", False)


def test_the_report_warns_where_the_kernels_are_off(monkeypatch):
    reason = "the fused kernels are off on cpu and plain PyTorch runs instead: for a test"
    monkeypatch.setattr(accelerate_module, "kernels_off", lambda device: reason)
    assert str(fastgpt.accelerate(nn.GELU())).startswith(f"warning: {reason}\nreplaced\n")


def test_patch_functional_is_named_where_it_changes_something():
    class PlainAttention(nn.Module):
        def forward(self, x):
            return (x @ x.mT).softmax(-1) @ x

    class FunctionalAttention(nn.Module):
        def forward(self, x):
            return self.heads(x)

        def heads(self, x):
            return nn.functional.scaled_dot_product_attention(x, x, x)

    class GatedBlock(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj = nn.Linear(4, 4), nn.Linear(4, 4)

    class LlamaRMSNorm(nn.Module):
        def forward(self, x):
            return x * x.square().mean(-1, keepdim=True).rsqrt()

    model = nn.Sequential(PlainAttention(), FunctionalAttention(), GatedBlock(), LlamaRMSNorm())
    details = {entry.kind: entry.detail for entry in fastgpt.accelerate(model).left}
    advised = {kind for kind, detail in details.items() if "patch_functional" in detail}
    assert advised == {"FunctionalAttention"}
    assert details.keys() == {"PlainAttention", "FunctionalAttention", "GatedBlock", "LlamaRMSNorm"}
    assert "gated activation" in details["GatedBlock"]


def test_norms_and_gelu_gates_of_t5_are_replaced_and_other_gates_are_not():
    report = fastgpt.accelerate(hf.MT5ForConditionalGeneration(hf.MT5Config(**T5)))
    assert {"MT5LayerNorm", "MT5DenseGatedActDense"} <= set(kinds(report.replaced))
    silu = hf.MT5Config(**T5, feed_forward_proj="gated-silu")
    report = fastgpt.accelerate(hf.MT5ForConditionalGeneration(silu))
    assert "MT5DenseGatedActDense" not in kinds(report.replaced)
    assert any("no GELU that is known" in entry.detail for entry in report.left)


@pytest.mark.parametrize(
    "build",
    [
        lambda: hf.UMT5ForConditionalGeneration(hf.UMT5Config(**T5)),
        lambda: hf.SwinModel(
            hf.SwinConfig(embed_dim=16, depths=[1], num_heads=[2], window_size=4, image_size=32, patch_size=4)
        ),
        lambda: hf.BeitModel(hf.BeitConfig(use_relative_position_bias=True, **IMAGES)),
    ],
)  # fmt: skip
def test_attention_with_a_learned_bias_is_replaced(build):
    assert "AttentionInterface" in kinds(fastgpt.accelerate(build()).replaced)


def test_head_that_no_kernel_serves_is_left_with_the_reason():
    config = hf.MistralConfig(**SMALL, head_dim=264, num_key_value_heads=2)
    report = fastgpt.accelerate(hf.MistralForCausalLM(config))
    assert "AttentionInterface" not in kinds(report.replaced)
    assert any("head_dim is 264" in entry.detail for entry in report.left)


@pytest.mark.parametrize("name", [name for name in MODELS if name != "electra decoder"])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_attention_weights_are_an_error_in_every_family(name, implementation):
    model = MODELS[name](attn_implementation=implementation).eval()
    fastgpt.accelerate(model)
    with pytest.raises(ValueError, match="makes no weights"):
        model(input_ids=TOKENS, output_attentions=True)
    assert len(model(input_ids=TOKENS, output_hidden_states=True).hidden_states) > 1
    fastgpt.restore(model)
    model.set_attn_implementation("eager")
    assert len(model(input_ids=TOKENS, output_attentions=True).attentions) == model.config.num_hidden_layers


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["bert decoder", "electra decoder", "gpt2"])
def test_no_cache_is_built_that_was_not_built_before(name, training):
    model = MODELS[name]().train(training)
    arguments = dict(input_ids=TOKENS, labels=TOKENS)
    before = set(model(**arguments))
    without_labels = set(model(input_ids=TOKENS))
    fastgpt.accelerate(model)
    after = set(model(**arguments))
    assert after <= before
    assert name == "gpt2" or not any("past" in key or "cache" in key for key in after)
    assert set(model(input_ids=TOKENS)) == without_labels
    asked = set(model(**arguments, use_cache=True))
    assert any("past" in key or "cache" in key for key in asked) == (name == "gpt2")


def test_softcap_falls_back_under_transforms_and_with_large_heads():
    from fastgpt.integrations.attention import attention_forward

    def capped(q, k, v, **options):
        return attention_forward(nn.Module(), q, k, v, None, softcap=5.0, **options)[0]

    q, k, v = torch.randn(2, 4, 5, 8), torch.randn(2, 2, 5, 8), torch.randn(2, 2, 5, 8)
    for causal in (True, False):
        expected = capped(q, k, v, is_causal=causal)
        torch.testing.assert_close(
            ops.attention(q, k, v, softcap=5.0, causal="upper_left" if causal else "none").transpose(1, 2),
            expected,
        )
        batched = torch.vmap(lambda *t, c=causal: capped(*(x[None] for x in t), is_causal=c)[0])(q, k, v)
        torch.testing.assert_close(batched, expected)
    wide = [torch.randn(1, 2, 3, 260) for _ in range(3)]
    with fastgpt.use_backend("reference"):
        expected = capped(*wide)
    torch.testing.assert_close(capped(*wide), expected)
    with fastgpt.use_backend("cpp"), pytest.raises(fastgpt.BackendUnavailable, match="head_dim"):
        capped(*wide)
