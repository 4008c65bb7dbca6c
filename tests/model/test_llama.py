"""Llama and Mistral checkpoints: transformers and this model agree on logits, loss and gradients, both ways."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.checkpoints.load import open_model
from fastgpt.model import GPT
from fastgpt.tokenizer import ByteTokenizer
from tests.model.test_model import lively, tokens

SIZES = {
    **{"vocab_size": 61, "hidden_size": 32, "intermediate_size": 72, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "max_position_embeddings": 24},
}
LLAMA = {"position": "rotary", "norm": "rms", "activation": "swiglu", "n_head": 4, "bias": False}


def hugging_face(kind: str = "Llama", **options: object):
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers, which is not installed"
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, "num_key_value_heads": 2, **options})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    with torch.no_grad():  # weights of norms are 1, which would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


CASES = [
    ("Llama", {}),
    ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    ("Llama", {"num_key_value_heads": 1, "rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}),
    ("Llama", {"attention_bias": True, "mlp_bias": True}),
    ("Mistral", {"sliding_window": 5}),
    ("Mistral", {"sliding_window": None}),
]


@pytest.mark.parametrize(("kind", "options"), CASES, ids=lambda one: str(one).replace("'", ""))
def test_a_checkpoint_of_transformers_has_its_loss_and_gradients(tmp_path: Path, kind: str, options: dict):
    theirs = hugging_face(kind, **options)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = GPT.from_pretrained(tmp_path / "theirs")
    idx, targets = tokens(3, 24), tokens(3, 24, seed=2)

    logits = theirs(idx).logits
    torch.testing.assert_close(ours(idx)[0], logits, rtol=1e-4, atol=1e-4)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    loss = ours(idx, targets)[1]
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    # One step against the gradients, written and read by both: it shows every gradient.
    expected.backward()
    loss.backward()
    for model in (theirs, ours):
        torch.optim.SGD(model.parameters(), lr=1.0).step()
    theirs.save_pretrained(tmp_path / "their_step")
    ours.save_pretrained(tmp_path / "our_step")
    wanted, found = (load_file(tmp_path / name / "model.safetensors") for name in ("their_step", "our_step"))
    assert wanted.keys() == found.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5, msg=name)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"n_kv_head": 2, "tie_head": False, "dropout": 0.25, "rope_theta": 300.0},
        {"n_inner": 40, "bias": True, "layer_norm_eps": 1e-3},
        {"window": 7, "n_kv_head": 1},
        {"window": (9, 9)},
    ],
    ids=str,
)
def test_transformers_loads_what_we_write(tmp_path: Path, options: dict):
    transformers = pytest.importorskip("transformers")
    ours = lively(**{**LLAMA, **options}).eval()
    ours.save_pretrained(tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    idx = tokens(3, 24)
    torch.testing.assert_close(loaded(idx).logits, ours(idx)[0], rtol=1e-4, atol=1e-4)
    again = GPT.from_pretrained(tmp_path / "model", dropout=options.get("dropout", 0.0))
    assert torch.equal(again(idx)[0], ours(idx)[0])
    assert again.num_parameters() == ours.num_parameters()


def test_the_tokenizer_travels_with_the_model(tmp_path: Path):
    lively(**LLAMA, vocab_size=256).save_pretrained(tmp_path / "model", ByteTokenizer())
    model, tokenizer = open_model(tmp_path / "model")
    assert model.config.norm == "rms" and tokenizer.decode(tokenizer.encode("größer")) == "größer"


def test_a_body_without_head_is_read_if_the_head_is_tied(tmp_path: Path):
    theirs = hugging_face(tie_word_embeddings=True)
    theirs.save_pretrained(tmp_path)
    idx = tokens(2, 9)
    expected = GPT.from_pretrained(tmp_path)(idx)[0]
    weights = load_file(tmp_path / "model.safetensors")
    plain = {name.removeprefix("model."): tensor for name, tensor in weights.items()}
    plain |= {"layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # as old versions wrote
    save_file(plain, tmp_path / "model.safetensors")
    assert torch.equal(GPT.from_pretrained(tmp_path)(idx)[0], expected)


def test_what_this_model_would_compute_otherwise_is_refused(tmp_path: Path):
    hugging_face().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    long = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    for change, message in [
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"head_dim": 16}, "head_dim=16"),
        ({"attention_bias": True}, "biases in a part"),
        ({"rope_scaling": long}, "rope_scaling"),
        ({"rope_parameters": long}, "rope_parameters"),
        ({"num_key_value_heads": 3}, "not divisible by n_kv_head=3"),
        ({"num_key_value_heads": 4}, r"k_proj.weight has shape \(16, 32\), expected \(32, 32\)"),
        ({"num_attention_heads": 3}, "n_embd=32 is not divisible by n_head=3"),
        ({"intermediate_size": 80}, "shape"),
        ({"num_hidden_layers": 3}, "lacks the tensor 'layers.2"),
        ({"num_hidden_layers": 1}, "has the tensor 'layers.1"),
        ({"tie_word_embeddings": 1}, "tie_head must be of type bool"),
        ({"rms_norm_eps": 0}, "layer_norm_eps must be positive"),
        ({"attention_bias": True, "mlp_bias": True}, "lacks the tensor .*bias"),
    ]:
        changed = {
            name: value for name, value in good.items() if not (name == "head_dim" and "num" in str(change))
        }
        file.write_text(json.dumps(changed | change))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)


def test_damaged_tensors_are_named(tmp_path: Path):
    hugging_face().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    good, name = load_file(file), "model.layers.1.self_attn.v_proj.weight"
    for shape in ((), (16,), (16, 32, 1), (32, 16), (0, 32)):
        save_file(good | {name: torch.zeros(shape)}, file)
        with pytest.raises(
            ValueError, match=r"layers.1.self_attn.v_proj.weight has shape .* expected \(16, 32\)"
        ):
            GPT.from_pretrained(tmp_path)
    save_file({key: tensor for key, tensor in good.items() if key != name}, file)
    with pytest.raises(ValueError, match=r"lacks the tensor 'layers.1.self_attn.v_proj.weight'"):
        GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "value", [None, True, "x", [], [1, 2], {}, -1, 0, 10**30, 1e999, float("nan")], ids=repr
)
def test_whatever_a_config_holds_is_an_error_or_a_model(tmp_path: Path, value: object):
    hugging_face("Mistral", sliding_window=5).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    for name in (*good, "rope_theta", "rope_scaling", "attention_bias", "head_dim", "n_ctx"):
        file.write_text(json.dumps(good | {name: value}))
        try:
            GPT.from_pretrained(tmp_path)
        except ValueError as error:
            assert len(str(error)) < 500


def test_what_no_architecture_of_transformers_has_is_not_written(tmp_path: Path):
    for options, message in [
        ({**LLAMA, "qk_norm": True}, "Llama does not support qk_norm=True"),
        ({**LLAMA, "softcap": 30.0}, r"Llama does not support softcap=30\.0"),
        ({**LLAMA, "activation": "relu2"}, "Llama does not support activation='relu2'"),
        ({**LLAMA, "position": "learned"}, "Llama does not support position='learned'"),
        ({**LLAMA, "window": (4, 0)}, "Mistral does not support window"),
        ({"position": "rotary"}, "GPT-2 does not support rotary"),
        ({"activation": "swiglu"}, "GPT-2 does not support activation='swiglu'"),
        ({"n_kv_head": 1}, "GPT-2 does not support n_kv_head=1"),
        ({"window": 4}, "GPT-2 does not support window"),
    ]:
        with pytest.raises(ValueError, match=message):
            lively(**options).save_pretrained(tmp_path / "model")
        assert not (tmp_path / "model").exists()
