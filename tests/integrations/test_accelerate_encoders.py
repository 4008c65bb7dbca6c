"""`accelerate` on encoders that are known by the code of their forward: RoBERTa's, ALBERT's, CLIP's and their kind."""

import pickle

import pytest
import torch
import transformers

import fastgpt
from tests.support.client_models import VOCAB, assert_same, batch, loss_and_gradients

SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64, pad_token_id=0, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
DISTIL = dict(
    vocab_size=VOCAB, dim=32, n_layers=2, n_heads=4, hidden_dim=48, max_position_embeddings=64, dropout=0.0,
    attention_dropout=0.0,
)  # fmt: skip
LOSS, GELU = "linear_cross_entropy", "linear_gelu"
# The configuration, and the ops that a training step must call beside attention and norms.
FAMILIES = {
    "Roberta": (SIZES, {LOSS, GELU}),
    "XLMRoberta": (SIZES, {LOSS, GELU}),
    "Camembert": (SIZES, {LOSS, GELU}),
    "Data2VecText": (SIZES, {LOSS, GELU}),
    "Ernie": (SIZES, {LOSS, GELU}),
    "Albert": (SIZES | {"embedding_size": 16}, {LOSS}),
    "DistilBert": (DISTIL, {LOSS}),
}


def build(name):
    options = FAMILIES[name][0]
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForMaskedLM")(getattr(transformers, f"{name}Config")(**options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def called(model, inputs):
    return {decision.op for decision in fastgpt.explain(model, **inputs).decisions}


@pytest.mark.parametrize("padding", [None, "right"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_stay_and_restore_undoes_all(name, training, padding):
    model, inputs = build(name).train(training), batch(f"{name}ForMaskedLM", padding)
    classes = {key: type(module) for key, module in model.named_modules()}
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(model, inputs))
    if training:
        found = called(model, inputs)
        assert FAMILIES[name][1] <= found, found
        assert model(**inputs).logits is None
        other = pickle.loads(pickle.dumps(model))
        assert torch.equal(other(**inputs).loss, model(**inputs).loss)
    fastgpt.restore(model)
    assert {key: type(module) for key, module in model.named_modules()} == classes
    assert torch.equal(loss_and_gradients(model, inputs)[0], before[0])


def test_a_head_with_other_code_is_left():
    class Scaled(transformers.models.roberta.modeling_roberta.RobertaLMHead):
        def forward(self, features, **kwargs):
            return 2 * super().forward(features, **kwargs)

    model, inputs = build("Roberta"), batch("RobertaForMaskedLM")
    model.lm_head.__class__ = Scaled
    before = loss_and_gradients(model, inputs)
    report = fastgpt.accelerate(model)
    assert any("its head is a Scaled" in entry.detail for entry in report.left)
    assert_same(before, loss_and_gradients(model, inputs))


def test_a_model_of_esm_adds_its_bias_after_the_head_and_keeps_its_loss():
    config = transformers.EsmConfig(
        vocab_size=33, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=48,
        mask_token_id=32, pad_token_id=1, max_position_embeddings=64, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.EsmForMaskedLM(config).train()
    tokens = torch.randint(4, 24, (2, 12))
    before = loss_and_gradients(model, {"input_ids": tokens, "labels": tokens})
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(model, {"input_ids": tokens, "labels": tokens}))


@pytest.mark.parametrize("kind", ["ViT", "Dinov2", "Siglip"])
def test_feed_forward_blocks_of_images_run_linear_gelu(kind):
    sizes = dict(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        image_size=16,
        patch_size=8,
    )
    if kind == "ViT":
        config = transformers.ViTConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        model = transformers.ViTModel(config, add_pooling_layer=False)
    elif kind == "Dinov2":
        model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).eval()
    else:
        model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes))
    images = torch.randn(2, 3, 16, 16)
    expected = model(pixel_values=images).last_hidden_state
    fastgpt.accelerate(model)
    torch.testing.assert_close(model(pixel_values=images).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
    assert GELU in called(model, {"pixel_values": images})


@pytest.mark.parametrize("kind", ["GPTNeoX", "GPTJ", "GPTNeo", "GPTBigCode"])
def test_feed_forward_blocks_of_decoders_run_linear_gelu(kind):
    names = {
        "GPTNeoX": dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48),
        "GPTJ": dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, rotary_dim=4, resid_pdrop=0.0, embd_pdrop=0.0),
        "GPTNeo": dict(
            hidden_size=32, num_layers=2, num_heads=4, intermediate_size=48, attention_types=[[["global"], 2]],
            resid_dropout=0.0, embed_dropout=0.0, attention_dropout=0.0,
        ),
        "GPTBigCode": dict(n_embd=32, n_layer=2, n_head=4, n_inner=48, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    }[kind]  # fmt: skip
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCAB, bos_token_id=0, eos_token_id=0, **names)
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).train()
    inputs = batch(f"{kind}ForCausalLM", "right")
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(model, inputs))
    assert GELU in called(model, inputs)
    fastgpt.restore(model)
    assert torch.equal(loss_and_gradients(model, inputs)[0], before[0])
