"""Models of transformers with attention sinks (keyword `s_aux`): GPT-OSS and others that have its attention."""

import pytest
import torch
import transformers

import fastgpt
from fastgpt import ops
from fastgpt.integrations import attention
from fastgpt.integrations.masks import Causality, CausalMask
from tests.integrations.test_accelerate_masks import one_by_one, packed
from tests.support.client_models import VOCAB, assert_same, batch, loss_and_gradients

SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=6, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2)
LAYERS = dict(layer_types=["sliding_attention", "full_attention"])
MODELS = {
    "GptOss": EXPERTS | LAYERS,
    "GraniteSWA": LAYERS,
    "GraniteMoeSWA": EXPERTS | LAYERS | dict(shared_intermediate_size=16),
    "Flint": LAYERS | dict(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16,
        mlp_only_layers=[0],
    ),
    "MiMoV2Flash": LAYERS | dict(
        swa_num_attention_heads=4, swa_num_key_value_heads=2, swa_head_dim=8, v_head_dim=8, swa_v_head_dim=8,
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, mlp_layer_types=["dense", "dense"],
    ),
}  # fmt: skip


def build(name, **options):
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {name}")
    config = getattr(transformers, f"{name}Config")(**{**SMALL, **MODELS[name], **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_((0.8 if key.endswith("sinks") else 0.05) * torch.randn_like(parameter))
    return model.train()


@pytest.fixture
def seen(monkeypatch):
    """The sinks, mask and window of every call of attention."""
    calls, right = [], ops.attention

    def recorded(*args, **options):
        calls.append(tuple(options.get(name) for name in ("sinks", "attn_mask", "window")))
        return right(*args, **options)

    monkeypatch.setattr(ops, "attention", recorded)
    return calls


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_stay_and_restore_undoes_all(name, padding, seen):
    model, inputs = build(name), batch(name, padding)
    if name == "MiMoV2Flash" and padding == "left":
        # Its layers without sinks: "eager" gives a row of padding alone a mean, the kernels 0.
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"].cumsum(1) == 1, -100)
    before = loss_and_gradients(model, inputs)
    sinks = [key for key in before[1] if key.endswith("sinks")]
    assert sinks and all(before[1][key].abs().max() > 1e-5 for key in sinks)
    fastgpt.accelerate(model)
    assert model.config._attn_implementation == "fastgpt"
    assert_same(before, loss_and_gradients(model, inputs))
    assert len([s for s, *_ in seen if s is not None]) == len(sinks)
    windows = [window for *_, window in seen if window is not None]
    assert windows == [(5, 0)]
    fastgpt.restore(model)
    assert model.config._attn_implementation == "eager"
    after = loss_and_gradients(model, inputs)
    assert torch.equal(after[0], before[0])


@pytest.mark.parametrize("name", MODELS)
def test_generation_with_a_cache_beyond_the_window_is_the_same(name, seen):
    model = build(name).eval()
    tokens = batch(name)["input_ids"][:, :10]
    options = dict(max_new_tokens=8, do_sample=False, output_logits=True, return_dict_in_generate=True)
    expected = model.generate(tokens, **options)
    fastgpt.accelerate(model)
    found = model.generate(tokens, **options)
    assert seen and torch.equal(found.sequences, expected.sequences)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-5)


def test_a_classifier_of_tokens_sees_both_directions():
    if not hasattr(transformers, "OpenAIPrivacyFilterConfig"):
        pytest.skip(f"transformers {transformers.__version__} has no OpenAIPrivacyFilter")
    config = transformers.OpenAIPrivacyFilterConfig(**SMALL, **EXPERTS, num_labels=3)
    model = transformers.OpenAIPrivacyFilterForTokenClassification(config)
    inputs = batch("", "left") | {"labels": torch.randint(0, 3, (3, 24))}
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.add_((0.8 if key.endswith("sinks") else 0.05) * torch.randn_like(parameter))
    before = loss_and_gradients(model, inputs)
    report = fastgpt.accelerate(model)
    assert model.config._attn_implementation == "fastgpt", report
    assert_same(before, loss_and_gradients(model, inputs))


def test_a_compiled_model_has_the_same_loss():
    model, inputs = build("GptOss"), batch("GptOss")
    expected = model(**inputs).loss
    fastgpt.accelerate(model)
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager")(**inputs).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("masked", ["causal", "window", "bool", "additive"])
def test_where_no_kernel_serves_pytorch_computes_the_same(masked, softcap, monkeypatch):
    q, k, v = (torch.randn(2, heads, 9, 8, requires_grad=True) for heads in (4, 2, 2))
    sinks = torch.randn(4, requires_grad=True)
    masks = {
        "causal": None,
        "window": CausalMask(2, 9, "cpu", Causality(window=4)),
        "bool": (torch.rand(2, 1, 9, 9) > 0.3).index_fill(2, torch.tensor([3]), False),  # a row sees nothing
        "additive": torch.randn(2, 1, 9, 9),
    }

    def results():
        out, weights = attention.attention_forward(
            torch.nn.Module(), q, k, v, masks[masked], softcap=softcap, s_aux=sinks
        )
        assert weights is None
        return out, *torch.autograd.grad(out.sin().sum(), (q, k, v, sinks))

    expected = results()
    monkeypatch.setattr(attention, "goes_to_pytorch", lambda *_: True)
    torch.testing.assert_close(results(), expected, rtol=1e-4, atol=1e-5)


def test_a_forward_that_changes_its_mask_is_not_known():
    """DeepSeek V4's adds a bias of numbers to the columns of a mask, which with "eager" has numbers."""

    def forward(self, x, attention_mask):
        attention_mask = torch.cat([attention_mask, x], dim=-1)
        return attention_interface(self, x, x, x, attention_mask, s_aux=x)  # noqa: F821

    assert attention._keywords(forward) == {"s_aux", "attention_mask"}
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    assert "attention_mask" in attention._keywords(v4.DeepseekV4Attention.forward.__wrapped__)


@pytest.mark.parametrize("use_cache", [False, True], ids=["no cache", "cache"])
def test_packed_documents_are_as_documents_run_alone(use_cache):
    model, inputs = build("GptOss"), packed("GptOss", use_cache)
    before = one_by_one(model, inputs)
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(model, inputs))
