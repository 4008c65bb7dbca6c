"""Models of transformers that learn a bias of their attention's scores: T5 and its kind, BEiT, Swin."""

import pytest
import torch
import transformers

import fastgpt
from fastgpt import ops
from tests.support.client_models import VOCAB, assert_same, batch, loss_and_gradients

T5 = dict(
    vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0,
    decoder_start_token_id=0, pad_token_id=0,
)  # fmt: skip
IMAGES = dict(image_size=32, patch_size=4, hidden_dropout_prob=0.0, drop_path_rate=0.0, num_labels=5)
SWIN = IMAGES | dict(embed_dim=16, depths=[2], num_heads=[2], window_size=4)
BEIT = IMAGES | dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48)
MODELS = {
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "MT5": ("MT5ForConditionalGeneration", "MT5Config", T5),
    "T5, SiLU": ("T5ForConditionalGeneration", "T5Config", T5 | dict(feed_forward_proj="gated-silu")),
    "UMT5": ("UMT5ForConditionalGeneration", "UMT5Config", T5),
    "Swin": ("SwinForImageClassification", "SwinConfig", SWIN),
    "BEiT": ("BeitForImageClassification", "BeitConfig", BEIT | dict(use_relative_position_bias=True)),
    "BEiT, shared": (
        "BeitForImageClassification",
        "BeitConfig",
        BEIT | dict(use_shared_relative_position_bias=True),
    ),
}
TEXT = [name for name in MODELS if "T5" in name]


def build(name, **options):
    model, config, given = MODELS[name]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**given | options))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def inputs_of(name, padding=None):
    if name in TEXT:
        return batch(name, padding)
    return {"pixel_values": torch.randn(3, 3, 32, 32), "labels": torch.randint(0, 5, (3,))}


@pytest.fixture
def masks(monkeypatch):
    """The mask, and the direction of causality, of every call of attention."""
    calls, right = [], ops.attention

    def recorded(*args, **options):
        calls.append((options.get("attn_mask"), options.get("causal")))
        return right(*args, **options)

    monkeypatch.setattr(ops, "attention", recorded)
    return calls


@pytest.mark.parametrize(
    ("name", "padding"),
    [(name, side) for name in MODELS for side in (None, "left", "right") if name in TEXT or not side],
)
def test_the_bias_learns_what_it_did(name, padding, masks):
    model, inputs = build(name), inputs_of(name, padding)
    before = loss_and_gradients(model, inputs)
    biases = [key for key in before[1] if "relative" in key and before[1][key].abs().max() > 0]
    assert biases
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(model, inputs))
    assert any(mask is not None and mask.requires_grad for mask, _ in masks)


@pytest.mark.parametrize("name", TEXT)
def test_a_batch_without_padding_has_the_bias_alone_for_a_mask(name, masks):
    """Of one entry, and causality stays the kernel's."""
    model = build(name)
    fastgpt.accelerate(model)
    model(**inputs_of(name)).loss.backward()
    assert len(masks) == 6
    assert all(mask is None or mask.shape[0] == 1 for mask, _ in masks)
    assert sum(causal in ("lower_right", "upper_left") for _, causal in masks) >= 2


@pytest.mark.parametrize("name", ["T5", "Swin"])
def test_gradient_checkpointing(name):
    model, inputs = build(name), inputs_of(name)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    model.gradient_checkpointing_enable()
    assert_same(before, loss_and_gradients(model, inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["T5", "Swin"])
def test_compiled(name):
    model, inputs = build(name), inputs_of(name)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    torch._dynamo.reset()
    model.compile(backend="aot_eager")
    assert_same(before, loss_and_gradients(model, inputs))
