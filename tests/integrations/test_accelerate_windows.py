"""Sliding windows of transformers' models: the kernels' own window, and no mask of (L, L)."""

import pytest
import torch
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import fastgpt
from fastgpt import ops
from fastgpt.integrations import attention
from tests.integrations.test_accelerate_recognized import build
from tests.support.client_models import assert_same, batch, loss_and_gradients

MODELS = ("Mistral", "Exaone4", "Gemma2")


def windowed(name):
    softcap = {"attn_logit_softcapping": 3.0} if name == "Gemma2" else {}
    return build(name, sliding_window=6, **softcap)


@pytest.fixture
def seen(monkeypatch):
    """The mask and window of every call of attention."""
    calls, right = [], ops.attention

    def recorded(*args, **options):
        calls.append((options.get("attn_mask"), options.get("window")))
        return right(*args, **options)

    monkeypatch.setattr(ops, "attention", recorded)
    return calls


@pytest.mark.parametrize("padding", [None, "ones", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_a_window_needs_no_mask_unless_there_is_padding(name, padding, seen):
    model = windowed(name)
    inputs = batch(name, None if padding == "ones" else padding)
    if padding == "ones":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if name == "Gemma2" and padding == "left":  # "eager" gives a row of padding alone a mean, the kernels 0
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"].cumsum(1) == 1, -100)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    seen.clear()
    assert_same(before, loss_and_gradients(model, inputs))
    windows = [window for _, window in seen if window is not None]
    if padding in ("left", "right"):
        assert not windows
    else:
        assert windows and set(windows) == {(5, 0)}
        assert all(mask is None for mask, _ in seen)


@pytest.mark.parametrize("name", MODELS)
def test_generation_beyond_the_window_is_the_same(name):
    model = windowed(name).eval()
    tokens = batch(name)["input_ids"][:, :10]
    expected = model.generate(tokens, max_new_tokens=8, do_sample=False)
    fastgpt.accelerate(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), expected)


def test_a_window_as_long_as_the_text_is_plain_causality(seen):
    model, inputs = windowed("Mistral"), batch("Mistral")
    model.config.sliding_window = inputs["input_ids"].shape[1]
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(model, inputs))


def test_a_compiled_model_has_the_same_loss():
    model, inputs = windowed("Mistral"), batch("Mistral")
    expected = model(**inputs).loss
    fastgpt.accelerate(model)
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager")(**inputs).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_an_attention_without_sdpa_is_served_if_its_call_is_known(monkeypatch):
    model = windowed("Gemma2")
    assert attention.refusal(model) is None
    monkeypatch.setattr(attention, "_SERVED", attention._SERVED - {"softcap"})
    assert "a variant that is not known" in attention.refusal(model)

    def forward(self, x):
        return attention_interface(self, x, x, x, None, dropout=0.0, bias=x)  # noqa: F821

    assert attention._keywords(forward) == {"dropout", "bias"}
    assert attention._keywords(len) == {"unknown"}


def test_only_a_causal_window_is_one():
    is_window = attention._is_window
    assert is_window(sliding_window_causal_mask_function(7))
    for other in (
        causal_mask_function,
        sliding_window_overlay(7),
        and_masks(sliding_window_overlay(7), sliding_window_overlay(3)),
        and_masks(sliding_window_causal_mask_function(7), lambda b, h, q, k: q != k),
        or_masks(sliding_window_causal_mask_function(7), lambda b, h, q, k: q == k),
        lambda b, h, q, k: k <= q,
        None,
    ):
        assert not is_window(other)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_where_no_kernel_serves_pytorch_has_the_same_window(softcap, monkeypatch):
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    marker = torch.empty(1, 1, 4, 0, dtype=torch.bool)
    module = torch.nn.Module()
    expected, _ = attention.attention_forward(module, q, k, v, marker, softcap=softcap)
    monkeypatch.setattr(attention, "goes_to_pytorch", lambda *_: True)
    found, _ = attention.attention_forward(module, q, k, v, marker, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    place = torch.arange(9)
    band = (place[:, None] >= place) & (place[:, None] - place < 4)
    dense, _ = attention.attention_forward(module, q, k, v, band, softcap=softcap)
    torch.testing.assert_close(expected, dense, rtol=1e-4, atol=1e-5)
    biased, _ = attention.attention_forward(module, q, k, v, marker, position_bias=torch.zeros(1, 1, 9, 9))
    plain, _ = attention.attention_forward(module, q, k, v, band)
    torch.testing.assert_close(biased, plain, rtol=1e-4, atol=1e-5)


def test_packed_sequences_keep_their_mask():
    """Positions that start again: transformers masks other sequences, which is no window alone."""
    model, inputs = windowed("Mistral"), batch("Mistral")
    inputs["position_ids"] = torch.cat((torch.arange(10), torch.arange(14)))[None].expand(3, -1)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(model, inputs))
