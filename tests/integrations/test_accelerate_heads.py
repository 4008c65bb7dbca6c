"""`accelerate` on language models of any code: the logits of their head are deferred while they train."""

import copy
import pickle

import pytest
import torch
import transformers
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.nn import functional as T

import fastgpt
from fastgpt.integrations.replacement import Replacement
from tests.integrations.test_accelerate_recognized import called
from tests.support.client_models import LENGTH, VOCAB, assert_same, batch, loss_and_gradients

TOKENS = dict(vocab_size=VOCAB, pad_token_id=0, bos_token_id=1, eos_token_id=2)
BERT = TOKENS | dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, max_position_embeddings=64,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
BART = TOKENS | dict(
    d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
    encoder_ffn_dim=48, decoder_ffn_dim=48, max_position_embeddings=64, dropout=0.0, decoder_start_token_id=2,
    forced_eos_token_id=None, attention_dropout=0.0, encoder_layerdrop=0.0, decoder_layerdrop=0.0,
)  # fmt: skip
T5 = TOKENS | dict(
    d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, dropout_rate=0.0, decoder_start_token_id=0
)
GPT2 = dict(vocab_size=VOCAB, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
WHISPER = BART | dict(num_mel_bins=8, max_source_positions=16, max_target_positions=64)
MODERN = BERT | dict(cls_token_id=1, sep_token_id=2)
ALBERT = BERT | dict(embedding_size=16, classifier_dropout_prob=0.0)
# The class, its configuration, and its options.
FAMILIES = {
    "T5": ("T5ForConditionalGeneration", "T5Config", T5),
    "T5 1.1": (
        "T5ForConditionalGeneration",
        "T5Config",
        T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    ),
    "MT5": ("MT5ForConditionalGeneration", "MT5Config", T5),
    "BART": ("BartForConditionalGeneration", "BartConfig", BART),
    "MBart": ("MBartForConditionalGeneration", "MBartConfig", BART),
    "Marian": ("MarianMTModel", "MarianConfig", BART),
    "M2M100": ("M2M100ForConditionalGeneration", "M2M100Config", BART),
    "Whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER),
    "ModernBERT": ("ModernBertForMaskedLM", "ModernBertConfig", MODERN),
    "ModernBERT, sparse": (
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        MODERN | dict(sparse_prediction=True),
    ),
    "ALBERT": ("AlbertForPreTraining", "AlbertConfig", ALBERT),
    "GPT-2": ("GPT2DoubleHeadsModel", "GPT2Config", GPT2),
    "GPT-NeoX": ("GPTNeoXForCausalLM", "GPTNeoXConfig", BERT),
    "XLM": (
        "XLMWithLMHeadModel",
        "XLMConfig",
        dict(vocab_size=VOCAB, emb_dim=32, n_layers=2, n_heads=4, dropout=0.0, attention_dropout=0.0),
    ),
}


def build(name, **options):
    model, config, given = FAMILIES[name]
    torch.manual_seed(0)
    model = getattr(transformers, model)(getattr(transformers, config)(**given | options))
    with torch.no_grad():
        for tensor in (*model.parameters(), *(b for n, b in model.named_buffers() if "final_logits" in n)):
            tensor.add_(0.05 * torch.randn_like(tensor))
    return model.train()


def inputs_of(name, padding=None):
    model = FAMILIES[name][0]
    given = batch(model, padding)
    if model.startswith("GPT2"):  # one choice each
        return {key: value[:, None] for key, value in given.items()} | {
            "mc_labels": torch.zeros(3, dtype=torch.long)
        }
    if model.startswith("Whisper"):
        return {"input_features": torch.randn(3, 8, 32), "labels": given["labels"]}
    if model.startswith("Albert"):
        given["sentence_order_label"] = torch.randint(0, 2, (3,))
    return given


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_stay_and_restore_undoes_all(name, training, padding):
    model, inputs = build(name).train(training), inputs_of(name, padding)
    classes = {key: type(module) for key, module in model.named_modules()}
    attributes, keys = set(vars(model)), list(model.state_dict())
    expected = model(**inputs)
    before = loss_and_gradients(model, inputs)
    report = fastgpt.accelerate(model)
    assert "linear_cross_entropy" in str(report)
    assert list(model.state_dict()) == keys
    assert_same(before, loss_and_gradients(model, inputs))
    output = model(**inputs)
    missing = expected.keys() - output.keys()
    if training:
        assert "linear_cross_entropy" in called(model, inputs)
        assert missing in ({"logits"}, {"prediction_logits"})
    else:
        assert not missing
        torch.testing.assert_close(output.to_tuple()[1], expected.to_tuple()[1], rtol=1e-3, atol=1e-4)
    fastgpt.restore(model)
    assert {key: type(module) for key, module in model.named_modules()} == classes
    assert set(vars(model)) == attributes
    assert torch.equal(loss_and_gradients(model, inputs)[0], before[0])


def test_a_tuple_and_a_call_without_labels_have_logits():
    model, inputs = build("T5"), inputs_of("T5")
    expected = model(**inputs)
    fastgpt.accelerate(model)
    loss, logits, *_ = model(**inputs, return_dict=False)
    torch.testing.assert_close(loss, expected.loss)
    torch.testing.assert_close(logits, expected.logits, rtol=1e-4, atol=1e-5)
    given = {"input_ids": inputs["input_ids"], "decoder_input_ids": inputs["labels"]}
    assert type(model(**given).logits) is torch.Tensor
    model.eval()
    assert model.generate(inputs["input_ids"], max_new_tokens=3, do_sample=False).shape[0] == 3


def test_logits_without_a_loss_are_returned():
    model, inputs = build("ALBERT"), inputs_of("ALBERT")
    del inputs["sentence_order_label"]  # without which there is no loss at all
    expected = model(**inputs)
    assert expected.loss is None
    fastgpt.accelerate(model)
    found = model(**inputs).prediction_logits
    torch.testing.assert_close(found, expected.prediction_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("padding", [None, "right"])
def test_an_encoder_with_a_decoder_that_is_known_otherwise_is_fused(padding):
    encoder = transformers.BertModel(transformers.BertConfig(**BERT))
    decoder = transformers.BertLMHeadModel(
        transformers.BertConfig(**BERT, is_decoder=True, add_cross_attention=True)
    )
    model = transformers.EncoderDecoderModel(encoder=encoder, decoder=decoder).train()
    model.config.decoder_start_token_id, model.config.pad_token_id = 1, 0
    inputs = batch("EncoderDecoderModel", padding)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(model, inputs))
    assert "linear_cross_entropy" in called(model, inputs)
    fastgpt.restore(model)
    assert not any(isinstance(module, Replacement) for module in model.modules())


def test_label_smoothing_and_a_count_of_items_are_understood():
    model, inputs = build("GPT-NeoX"), batch("GPTNeoXForCausalLM", "left")
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    targets = inputs["labels"][:, 1:].flatten()
    fastgpt.accelerate(model)
    loss = model(**inputs, label_smoothing=0.1, num_items_in_batch=7).loss
    expected = T.cross_entropy(logits, targets, label_smoothing=0.1, reduction="sum") / 7
    torch.testing.assert_close(loss, expected)


def test_a_loss_function_of_the_users_own_and_hooks_get_the_logits():
    model, inputs, seen = build("ModernBERT"), inputs_of("ModernBERT"), []
    fastgpt.accelerate(model)
    expected = model(**inputs).loss
    handle = model.decoder.register_forward_hook(lambda *args: seen.append(type(args[2])))
    output = model(**inputs)
    handle.remove()
    torch.testing.assert_close(output.loss, expected)
    assert seen == [torch.Tensor]
    assert output.logits is not None
    model.loss_function = lambda logits, labels, **_: logits.sum()
    output = model(**inputs)
    torch.testing.assert_close(output.loss, output.logits.sum())
    other = build("ModernBERT")
    other.loss_function = model.loss_function
    report = fastgpt.accelerate(other)
    assert any("a loss_function of its own" in entry.detail for entry in report.left)


def test_another_module_in_the_heads_place_is_called():
    model, inputs = build("T5"), inputs_of("T5")
    expected = model(**inputs).loss
    fastgpt.accelerate(model)
    model.lm_head = nn.Sequential(model.lm_head)
    assert model(**inputs).logits is not None
    torch.testing.assert_close(model(**inputs).loss, expected)
    fresh = build("T5")
    fresh.lm_head = nn.Sequential(fresh.lm_head)
    report = fastgpt.accelerate(fresh)
    assert any("its head is a Sequential" in entry.detail for entry in report.left)


def test_a_head_that_the_model_does_not_call_is_left():
    config = transformers.MobileBertConfig(
        vocab_size=VOCAB, hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=48, intra_bottleneck_size=32,
    )  # fmt: skip
    model = transformers.MobileBertForMaskedLM(config).train()
    report = fastgpt.accelerate(model)
    assert any("its head is not called" in entry.detail for entry in report.left)


def test_a_replaced_model_is_copied_pickled_and_saved(tmp_path):
    model, inputs = build("BART"), inputs_of("BART")
    fastgpt.accelerate(model)
    loss = model(**inputs).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).loss, loss)
        assert called(other, inputs) == called(model, inputs)
        fastgpt.restore(other)
        assert not any(isinstance(module, Replacement) for module in other.modules())
    model.save_pretrained(tmp_path)
    again = transformers.BartForConditionalGeneration.from_pretrained(tmp_path).train()
    torch.testing.assert_close(again(**inputs).loss, loss)


@pytest.mark.parametrize("name", ["T5", "BART", "ModernBERT", "GPT-NeoX"])
def test_autocast_checkpointing_and_fake_tensors_give_the_same(name):
    model, inputs = build(name), inputs_of(name)
    before = loss_and_gradients(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(**inputs).loss
    fastgpt.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**inputs).loss
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)
    model.gradient_checkpointing_enable()
    assert_same(before, loss_and_gradients(model, inputs))
    model.gradient_checkpointing_disable()
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {key: mode.from_tensor(value) for key, value in inputs.items()}
        assert model(**fake).loss.shape == ()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["T5", "BART", "GPT-NeoX"])
def test_losses_keep_their_dtype(name, dtype):
    model, inputs = build(name).to(dtype), inputs_of(name)
    expected = model(**inputs).loss
    fastgpt.accelerate(model)
    loss = model(**inputs).loss
    assert loss.dtype == expected.dtype
    torch.testing.assert_close(loss, expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("name", ["BART", "GPT-2"])
def test_a_compiled_model_keeps_its_loss_on_logits(name):
    model, inputs = build(name), inputs_of(name)
    expected = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    torch._dynamo.reset()
    output = torch.compile(model, backend="aot_eager")(**inputs)
    assert output.logits is not None
    torch.testing.assert_close(output.loss, expected[0], rtol=1e-5, atol=1e-5)
    model.zero_grad()
    output.loss.backward()
    for key, parameter in model.named_parameters():
        if key in expected[1]:
            torch.testing.assert_close(parameter.grad, expected[1][key], rtol=1e-3, atol=1e-5)


def test_a_frozen_model_whose_hidden_states_are_given_trains_them():
    model, inputs = build("GPT-NeoX").requires_grad_(False), batch("GPTNeoXForCausalLM")
    states = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()

    def gradient():
        return torch.autograd.grad(model(inputs_embeds=states, **inputs).loss, states)[0]

    expected = gradient()
    fastgpt.accelerate(model)
    torch.testing.assert_close(gradient(), expected, rtol=2e-4, atol=1e-7)
    assert states.shape[1] == LENGTH
