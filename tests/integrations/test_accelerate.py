"""`accelerate` and `restore` on models of transformers: the same function before, during and after."""

import copy
import pickle

import pytest
import torch
from torch import nn

import fastgpt
from fastgpt.integrations.replacement import Replacement
from tests.support.client_models import FAMILIES, VOCAB, assert_same, batch, build, loss_and_gradients


def types(model):
    return {name: type(module) for name, module in model.named_modules()}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_the_same_and_restore_undoes_all(name, training, padding):
    model, inputs = build(name).train(training), batch(name, padding)
    classes, keys, attributes = types(model), list(model.state_dict()), set(vars(model))
    before = loss_and_gradients(model, inputs)

    report = fastgpt.accelerate(model)
    assert report.model is model
    assert any(isinstance(module, Replacement) for module in model.modules())
    assert list(model.state_dict()) == keys
    assert_same(before, loss_and_gradients(model, inputs))

    fastgpt.restore(model)
    assert types(model) == classes
    assert set(vars(model)) == attributes
    assert model.config._attn_implementation == "sdpa"
    after = loss_and_gradients(model, inputs)
    assert torch.equal(after[0], before[0])
    assert all(torch.equal(after[1][key], gradient) for key, gradient in before[1].items())


@pytest.mark.parametrize("name", FAMILIES)
def test_every_part_of_a_known_family_is_replaced(name):
    report = fastgpt.accelerate(build(name))
    assert not report.left, str(report)
    runs = " ".join(entry.detail for entry in report.replaced)
    wanted = {"attention", "linear_gelu", "add_layer_norm"}
    wanted |= set() if name == "ElectraForPreTraining" else {"linear_cross_entropy"}
    assert wanted <= set(runs.split())


def test_ops_are_called_that_the_report_names():
    model, inputs = build("GPT2LMHeadModel"), batch("GPT2LMHeadModel")
    fastgpt.accelerate(model)
    decisions = fastgpt.explain(model, **inputs).decisions
    assert {d.op for d in decisions} == {"attention", "linear_gelu", "add_layer_norm", "linear_cross_entropy"}
    assert {d.backend for d in decisions} == {"cpp"}


@pytest.mark.parametrize("option", ["attention", "cross_entropy", "gelu", "layer_norm"])
def test_option_leaves_its_part_alone_and_says_so(option):
    model, inputs = build("GPT2LMHeadModel"), batch("GPT2LMHeadModel")
    before = loss_and_gradients(model, inputs)
    report = fastgpt.accelerate(model, **{option: False})
    ops = {"attention": "attention", "cross_entropy": "linear_cross_entropy", "gelu": "linear_gelu"}
    called = {decision.op for decision in fastgpt.explain(model, **inputs).decisions}
    assert ops.get(option, "add_layer_norm") not in called
    assert len(called) == 3
    assert any(f"{option}=False" in entry.detail for entry in report.left)
    assert_same(before, loss_and_gradients(model, inputs))
    fastgpt.restore(model)


def test_training_makes_no_logits_and_evaluation_makes_them():
    model, inputs = build("GPT2LMHeadModel"), batch("GPT2LMHeadModel")
    expected = model(**inputs)
    fastgpt.accelerate(model)
    output = model(**inputs)
    assert output.logits is None
    assert output["loss"] is output.loss is output[0]
    assert "logits" not in output
    torch.testing.assert_close(model.eval()(**inputs).logits, expected.logits)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {"num_items_in_batch": torch.tensor(17)},
        {"num_items_in_batch": 17},
        {"shift_labels": torch.randint(0, VOCAB, (3, 24))},
        {"ignore_index": 5},
        {"output_hidden_states": True},
        {"use_cache": False},
        {"return_dict": False},
        {"logits_to_keep": 4, "labels": torch.randint(0, VOCAB, (3, 4))},
        {"logits_to_keep": torch.tensor([1, 2, 23]), "labels": torch.randint(0, VOCAB, (3, 3))},
    ],
    ids="-".join,
)
def test_options_of_the_loss_are_honoured(options, training):
    model = build("GPT2LMHeadModel").train(training)
    inputs = batch("GPT2LMHeadModel") | options
    expected = model(**inputs)
    fastgpt.accelerate(model)
    output = model(**inputs)
    if "return_dict" in options:  # as a tuple, with the logits in their place
        assert len(output) == len(expected)
        torch.testing.assert_close(output[:2], expected[:2])
        return
    torch.testing.assert_close(output.loss, expected.loss)
    if "output_hidden_states" in options:
        torch.testing.assert_close(output.hidden_states, expected.hidden_states)


@pytest.mark.parametrize("training", [True, False])
def test_label_smoothing_is_that_of_pytorch(training):
    model, inputs = build("GPT2LMHeadModel").train(training), batch("GPT2LMHeadModel", "right")
    logits = model(**inputs).logits[:, :-1].flatten(0, 1)
    expected = nn.functional.cross_entropy(logits, inputs["labels"][:, 1:].flatten(), label_smoothing=0.1)
    fastgpt.accelerate(model)
    torch.testing.assert_close(model(**inputs, label_smoothing=0.1).loss, expected)


def test_loss_of_a_bfloat16_model_is_float32_as_before():
    model, inputs = build("GPT2LMHeadModel").bfloat16(), batch("GPT2LMHeadModel")
    expected = model(**inputs).loss
    fastgpt.accelerate(model)
    for training in (True, False):
        loss = model.train(training)(**inputs).loss
        assert loss.dtype == expected.dtype == torch.float32
        torch.testing.assert_close(loss, expected, rtol=2e-2, atol=0)


def test_everything_ignored_is_nan_and_a_wrong_length_an_error_as_before():
    model, inputs = build("GPT2LMHeadModel"), batch("GPT2LMHeadModel")
    nothing = inputs | {"labels": torch.full_like(inputs["labels"], -100)}
    wrong = inputs | {"labels": inputs["labels"][:, :-1]}
    for _ in range(2):
        assert model(**nothing).loss.isnan()
        with pytest.raises(ValueError):
            model(**wrong)
        if not hasattr(model, "_fastgpt_accelerated"):
            fastgpt.accelerate(model)
    with pytest.raises(IndexError):
        model(**(inputs | {"labels": torch.full_like(inputs["labels"], VOCAB)}))
    assert model(**inputs).loss.isfinite(), "an error in the head leaves it as it was"
    assert model(input_ids=inputs["input_ids"]).logits.shape[-1] == VOCAB


def test_dropout_repeats_by_seed_and_has_the_same_mean():
    """Over many masks the mean loss agrees with the unmodified model's, to five standard errors."""
    model, inputs = build("GPT2LMHeadModel", dropout=0.2), batch("GPT2LMHeadModel")

    def losses(count):
        with torch.no_grad():
            return torch.stack([model(**inputs).loss for _ in range(count)])

    before = losses(150)
    fastgpt.accelerate(model)
    after = losses(150)
    error = (before.var() / 150 + after.var() / 150).sqrt()
    assert abs(before.mean() - after.mean()) < 5 * error
    assert 0.5 < after.std() / before.std() < 2
    torch.manual_seed(3)
    first = loss_and_gradients(model, inputs)
    torch.manual_seed(3)
    assert_same(first, loss_and_gradients(model, inputs), rtol=1e-6)
    assert not torch.equal(first[0], loss_and_gradients(model, inputs)[0])
    model.eval()
    assert losses(2).unique().numel() == 1


def test_generation_is_the_same():
    model = build("GPT2LMHeadModel").eval()
    tokens, mask = torch.randint(1, VOCAB, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    mask[0, :3] = 0
    options = dict(attention_mask=mask, max_new_tokens=9, do_sample=False, pad_token_id=0)
    expected = model.generate(tokens, **options)
    fastgpt.accelerate(model)
    assert torch.equal(model.generate(tokens, **options), expected)


def test_accelerated_model_saves_loads_copies_and_pickles(tmp_path):
    model, inputs = build("GPT2LMHeadModel"), batch("GPT2LMHeadModel")
    expected = model.eval()(**inputs).logits
    fastgpt.accelerate(model)
    model.save_pretrained(tmp_path)
    assert "fastgpt" not in (tmp_path / "config.json").read_text()
    loaded = type(model).replaces.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, expected)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        torch.testing.assert_close(twin(**inputs).logits, expected)
        fastgpt.restore(twin)
        assert torch.equal(twin(**inputs).logits, expected)
    assert isinstance(model, Replacement), "a copy that is restored leaves the original"


def test_eager_model_is_replaced_and_restored_and_padding_is_mentioned():
    model, inputs = build("GPT2LMHeadModel", attn_implementation="eager"), batch("GPT2LMHeadModel", "right")
    before = loss_and_gradients(model, inputs)
    assert "eager" in str(fastgpt.accelerate(model))
    assert_same(before, loss_and_gradients(model, inputs))
    fastgpt.restore(model)
    assert model.config._attn_implementation == "eager"


def test_switch_that_the_user_turned_since_is_the_users():
    model = build("GPT2LMHeadModel")
    fastgpt.accelerate(model)
    model.set_attn_implementation("eager")
    fastgpt.restore(model)
    assert model.config._attn_implementation == "eager"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda m: setattr(m, "loss_function", lambda *_, **__: 0), "loss_function of its own"),
        (lambda m: setattr(m, "lm_head", nn.Sequential(m.lm_head)), "its head is a Sequential"),
        (lambda m: setattr(m.transformer.h[0].mlp, "act", nn.SiLU()), "SiLU"),
        (lambda m: setattr(m.transformer.h[0].mlp, "forward", lambda x: x), "forward was replaced"),
        (lambda m: setattr(m.transformer.h[0].mlp.c_fc, "forward", lambda x: x), "c_fc: its forward"),
        (lambda m: setattr(m.config, "_attn_implementation_internal", "flex_attention"), "flex_attention"),
        (lambda m: setattr(m.config, "_output_attentions", True), "output_attentions"),
    ],
)
def test_what_is_not_known_is_left_with_the_reason(change, reason):
    model = build("GPT2LMHeadModel")
    change(model)
    report = fastgpt.accelerate(model)
    assert any(reason in entry.detail for entry in report.left), str(report)
    fastgpt.restore(model)


def test_subclass_and_unknown_modules_are_left_with_the_reason():
    class Odd(nn.LayerNorm):
        def forward(self, x):
            return x

    class SelfAttention(nn.Module):
        pass

    report = fastgpt.accelerate(nn.Sequential(Odd(4), SelfAttention(), nn.ReLU()))
    assert not report.replaced
    reasons = {entry.kind: entry.detail for entry in report.left}
    assert "LayerNorm of its own kind" in reasons["Odd"]
    assert "patch_functional" in reasons["SelfAttention"]
    assert "ReLU" not in reasons


def test_adapter_put_on_an_accelerated_layer_is_not_bypassed():
    """As PEFT does it: the layer is wrapped after accelerate."""

    class Adapter(nn.Module):
        def __init__(self, layer, width):
            super().__init__()
            self.layer, self.width = layer, width

        def forward(self, x):
            return self.layer(x) + x.mean(-1, keepdim=True)

    def wrap(model):
        model.transformer.h[0].mlp.c_fc = Adapter(model.transformer.h[0].mlp.c_fc, 128)
        model.lm_head = Adapter(model.lm_head, VOCAB)
        return model

    model, inputs = build("GPT2LMHeadModel"), batch("GPT2LMHeadModel")
    before = loss_and_gradients(wrap(copy.deepcopy(model)), inputs)
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(wrap(model), inputs))


def test_hooks_see_the_layers_that_fuse():
    model, inputs = build("GPT2LMHeadModel"), batch("GPT2LMHeadModel")
    fastgpt.accelerate(model)
    seen = []
    for layer in (model.transformer.h[0].mlp.c_fc, model.lm_head):
        layer.register_forward_pre_hook(lambda module, args: seen.append(type(module).__name__))
    model(**inputs)
    assert seen == ["Conv1DGelu", "LossHead"]


def test_other_causal_models_get_attention_and_a_fused_loss():
    from transformers import OPTConfig
    from transformers.models.opt.modeling_opt import OPTForCausalLM

    config = OPTConfig(
        vocab_size=VOCAB, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0,
    )  # fmt: skip
    model, inputs = OPTForCausalLM(config), batch("OPTForCausalLM", "left")
    before = loss_and_gradients(model, inputs)
    report = fastgpt.accelerate(model)
    called = {decision.op for decision in fastgpt.explain(model, **inputs).decisions}
    assert called == {"attention", "add_layer_norm", "linear_cross_entropy"}
    assert "on logits" not in str(report)
    assert_same(before, loss_and_gradients(model, inputs))
    fastgpt.restore(model)
    assert "_loss_function" not in vars(model)


def test_softcap_of_gemma_is_computed():
    from transformers import Gemma2Config
    from transformers.models.gemma2.modeling_gemma2 import Gemma2ForCausalLM

    config = Gemma2Config(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=8, attn_logit_softcapping=3.0,
        attn_implementation="eager",
    )  # fmt: skip
    model, inputs = Gemma2ForCausalLM(config), batch("Gemma2ForCausalLM", "right")
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    assert_same(before, loss_and_gradients(model, inputs))


def test_twice_is_a_no_op_that_says_so():
    model = build("GPT2LMHeadModel")
    fastgpt.accelerate(model)
    classes = types(model)
    report = fastgpt.accelerate(model, attention=False)
    assert "already" in report.note
    assert str(report) == report.note
    assert types(model) == classes
    fastgpt.restore(model)
    with pytest.raises(ValueError, match="not accelerated"):
        fastgpt.restore(model)


@pytest.mark.parametrize("wrong", [None, "gpt2", torch.zeros(3)])
def test_what_is_no_model_is_refused(wrong):
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        fastgpt.accelerate(wrong)
    with pytest.raises(ValueError, match="not accelerated"):
        fastgpt.restore(wrong)


def test_nothing_to_replace_is_said_and_can_be_restored():
    model = nn.Linear(3, 3)
    assert "nothing" in str(fastgpt.accelerate(model))
    fastgpt.restore(model)


@pytest.mark.parametrize("after", [0, 1, 5])
def test_exception_on_the_way_leaves_the_model_as_it_was(after, monkeypatch):
    model, inputs = build("GPT2LMHeadModel", attn_implementation="eager"), batch("GPT2LMHeadModel")
    classes, attributes = types(model), dict(vars(model))
    before = loss_and_gradients(model, inputs)
    from fastgpt.integrations.accelerate import _Work

    note, calls = _Work._note, []

    def failing(self, entries, *arguments):
        calls.append(arguments)
        if len(calls) > after:
            raise KeyboardInterrupt
        note(self, entries, *arguments)

    monkeypatch.setattr(_Work, "_note", failing)
    with pytest.raises(KeyboardInterrupt):
        fastgpt.accelerate(model)
    assert types(model) == classes
    assert vars(model).keys() == attributes.keys()
    assert model.config._attn_implementation == "eager"
    assert torch.equal(loss_and_gradients(model, inputs)[0], before[0])
    monkeypatch.undo()
    fastgpt.accelerate(model)
    fastgpt.restore(model)


def test_report_is_a_table():
    text = str(fastgpt.accelerate(build("BertForMaskedLM")))
    assert "replaced" in text
    row = next(line for line in text.splitlines() if "BertIntermediate" in line)
    assert row.split() == ["2", "×", "BertIntermediate", "bert.encoder.layer.*.intermediate", "linear_gelu"]
    inside = next(line for line in text.splitlines() if "intermediate_act_fn" in line)
    assert inside.split("intermediate_act_fn")[1].split() == ["within", "linear_gelu"]
    assert "no logits" in next(line for line in text.splitlines() if "BertForMaskedLM" in line)
