"""`accelerate` on PyTorch's own modules."""

import pytest
import torch
from torch import nn

import fastgpt
from tests.support.client_models import NanoGPT, assert_same, loss_and_gradients

B, L, S, E, H = 2, 5, 7, 16, 4


def called(function, *args, **kwargs):
    return {decision.op for decision in fastgpt.explain(function, *args, **kwargs).decisions}


@pytest.mark.parametrize(
    ("module", "inputs", "op"),
    [
        (nn.GELU(), (torch.randn(3, 5),), "gelu"),
        (nn.GELU(approximate="tanh"), (torch.randn(3, 5),), "gelu"),
        (nn.LayerNorm(5), (torch.randn(3, 5),), "add_layer_norm"),
        (nn.LayerNorm((3, 5), elementwise_affine=False), (torch.randn(2, 3, 5),), "add_layer_norm"),
        (nn.RMSNorm(5), (torch.randn(3, 5),), "rms_norm"),
        (nn.RMSNorm((3, 5), eps=0.1, elementwise_affine=False), (torch.randn(2, 3, 5),), "rms_norm"),
        (nn.CrossEntropyLoss(), (torch.randn(3, 5), torch.tensor([1, -100, 4])), "cross_entropy"),
        (
            nn.CrossEntropyLoss(weight=torch.rand(5), label_smoothing=0.2, ignore_index=1, reduction="none"),
            (torch.randn(3, 5, 2), torch.tensor([[1, 0], [2, 2], [4, 1]])),
            "cross_entropy",
        ),
    ],
)
def test_module_computes_the_same_on_our_op(module, inputs, op):
    expected = module(*inputs)
    fastgpt.accelerate(module)
    assert called(module, *inputs) == {op}
    torch.testing.assert_close(module(*inputs), expected)
    fastgpt.restore(module)
    assert called(module, *inputs) == set()


def causal():
    return nn.Transformer.generate_square_subsequent_mask(L)


MASKS = {
    "none": lambda: {},
    "bool": lambda: {"attn_mask": torch.rand(L, S) < 0.3},
    "a head's": lambda: {"attn_mask": torch.rand(B * H, L, S) < 0.3},
    "added": lambda: {"attn_mask": torch.randn(L, S)},
    "padding": lambda: {"key_padding_mask": torch.arange(S).expand(B, S) >= torch.tensor([[S], [3]])},
    "added padding": lambda: {"key_padding_mask": torch.randn(B, S)},
    "both": lambda: MASKS["bool"]() | MASKS["padding"](),
    "added and bool": lambda: MASKS["added"]() | MASKS["padding"](),
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.filterwarnings("ignore:Support for mismatched")
def test_multihead_attention_of_two_sequences(mask, batch_first):
    module = nn.MultiheadAttention(E, H, batch_first=batch_first, kdim=6, vdim=10)
    given = [torch.randn(B, n, e, requires_grad=True) for n, e in ((L, E), (S, 6), (S, 10))]
    q, k, v = given if batch_first else [x.transpose(0, 1) for x in given]
    options = MASKS[mask]()

    def run():
        out, weights = module(q, k, v, need_weights=False, **options)
        assert weights is None
        return out, *torch.autograd.grad(out, (*given, *module.parameters()), torch.ones_like(out))

    before = run()
    fastgpt.accelerate(module)
    assert called(module, q, k, v, need_weights=False, **options) == {"attention"}
    torch.testing.assert_close(run(), before, rtol=2e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"attn_mask": causal(), "is_causal": True}, {"attn_mask": causal() < 0}],
    ids=["full", "causal", "mask"],
)
def test_self_attention_of_one_tensor(options, training):
    module = nn.MultiheadAttention(E, H, batch_first=True).train(training)
    x = torch.randn(B, L, E)
    before = module(x, x, x, need_weights=False, **options)[0]
    fastgpt.accelerate(module)
    assert called(module, x, x, x, need_weights=False, **options) == {"attention"}
    torch.testing.assert_close(module(x, x, x, need_weights=False, **options)[0], before)
    with torch.no_grad():
        torch.testing.assert_close(module(x, x, x, need_weights=False, **options)[0], before)


def test_weights_and_single_sequences_are_pytorchs():
    module, x = nn.MultiheadAttention(E, H, batch_first=True), torch.randn(B, L, E)
    before, alone = module(x, x, x), module(x[0], x[0], x[0], need_weights=False)
    fastgpt.accelerate(module)
    torch.testing.assert_close(module(x, x, x), before)
    torch.testing.assert_close(module(x[0], x[0], x[0], need_weights=False), alone)


@pytest.mark.parametrize(
    "wrong",
    [
        {"attn_mask": torch.zeros(3, 3)},
        {"key_padding_mask": torch.zeros(B, 9, dtype=torch.bool)},
        {"is_causal": True},
        {"attn_mask": torch.zeros(L, L, dtype=torch.int64)},
    ],
)
def test_wrong_arguments_raise_what_pytorch_raises(wrong):
    x = torch.randn(B, L, E)
    module = nn.MultiheadAttention(E, H, batch_first=True)
    with pytest.raises(Exception) as expected:
        module(x, x, x, need_weights=False, **wrong)
    fastgpt.accelerate(module)
    with pytest.raises(type(expected.value)):
        module(x, x, x, need_weights=False, **wrong)


@pytest.mark.parametrize("options", [{"add_bias_kv": True}, {"add_zero_attn": True}])
def test_attention_with_appended_keys_is_left_with_the_reason(options):
    report = fastgpt.accelerate(nn.MultiheadAttention(E, H, **options))
    assert not report.replaced
    assert "appends" in report.left[0].detail


@pytest.mark.parametrize("activation", ["gelu", "relu", nn.GELU("tanh")])
@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_encoder_computes_the_same(activation, norm_first):
    layer = nn.TransformerEncoderLayer(
        E, H, 24, dropout=0.0, activation=activation, batch_first=True, norm_first=norm_first
    )
    model, x = nn.TransformerEncoder(layer, 2), torch.randn(B, L, E)
    padding = torch.tensor([[False] * L, [False] * 3 + [True] * (L - 3)])

    class Loss(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = model

        def forward(self, options):
            return self.encoder(x, **options).masked_fill(padding[..., None], 0).square().mean()

    whole = Loss()
    for options in ({}, {"src_key_padding_mask": padding}, {"mask": causal(), "is_causal": True}):
        before = loss_and_gradients(whole, (options,))
        with torch.no_grad():
            evaluated = whole.eval()(options)
        report = fastgpt.accelerate(whole.train())
        ops = {"attention", "add_layer_norm"} | (set() if activation == "relu" else {"linear_gelu"})
        assert called(whole, options) == ops
        assert any(entry.kind == "TransformerEncoderLayer" for entry in report.left) == (activation == "relu")
        assert_same(before, loss_and_gradients(whole, (options,)))
        with torch.no_grad():
            torch.testing.assert_close(whole.eval()(options), evaluated)
        fastgpt.restore(whole.train())


def test_decoder_computes_the_same():
    layer = nn.TransformerDecoderLayer(E, H, 24, dropout=0.0, activation="gelu", batch_first=True)
    model, x, memory = nn.TransformerDecoder(layer, 2), torch.randn(B, L, E), torch.randn(B, S, E)
    options = {"tgt_mask": causal(), "tgt_is_causal": True}
    before = model(x, memory, **options)
    fastgpt.accelerate(model)
    assert called(model, x, memory, **options) == {"attention", "add_layer_norm", "linear_gelu"}
    torch.testing.assert_close(model(x, memory, **options), before)


def test_own_model_is_accelerated_and_report_names_patch_functional():
    model = NanoGPT()
    tokens = torch.randint(0, 200, (2, 9))
    before = loss_and_gradients(model, (tokens, tokens))
    fastgpt.accelerate(model)
    assert called(model, tokens, tokens) == {"add_layer_norm"}
    assert_same(before, loss_and_gradients(model, (tokens, tokens)))
