"""Model: equal to Hugging Face's GPT-2, causal, trainable in every variant, and equal with a cache."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastgpt.gpt_config import ACTIVATIONS, POSITIONS
from fastgpt.model import GPT, GPTConfig, sampling_distribution

TINY = {"vocab_size": 61, "block_size": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}


def tiny(seed: int = 0, **options: object) -> GPT:
    torch.manual_seed(seed)
    return GPT(GPTConfig(**{**TINY, **options}))


def lively(seed: int = 0, **options: object) -> GPT:
    """Make a model with weights large enough that every prediction depends on the context."""
    model = tiny(seed, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 2 else 0.1))
    return model


def tokens(*shape: int, seed: int = 1) -> Tensor:
    return torch.randint(TINY["vocab_size"], shape, generator=torch.Generator().manual_seed(seed))


# ---- Hugging Face --------------------------------------------------------------------------------


def hugging_face_gpt2(**options: object):
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers, which is not installed"
    )
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 24, "n_layer": 2, "n_head": 2, "n_embd": 32}
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **options)).eval()
    with torch.no_grad():  # initial biases are 0 and LayerNorms 1, which would hide mistakes
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("activation", ["gelu_new", "gelu", "relu"])
@pytest.mark.parametrize("tied", [True, False])
def test_from_pretrained_has_hugging_faces_logits_loss_and_gradients(
    tmp_path: Path, activation: str, tied: bool
):
    theirs = hugging_face_gpt2(
        activation_function=activation, tie_word_embeddings=tied, layer_norm_epsilon=1e-3
    )
    theirs.save_pretrained(tmp_path)
    ours = GPT.from_pretrained(tmp_path)
    idx, targets = tokens(3, 24), tokens(3, 24, seed=2)

    logits = theirs(idx).logits
    torch.testing.assert_close(ours(idx)[0], logits, rtol=1e-4, atol=1e-4)

    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected.backward()
    loss = ours(idx, targets)[1]
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    gradients = {name.removeprefix("transformer."): p.grad for name, p in theirs.named_parameters()}
    assert gradients.keys() == dict(ours.named_parameters()).keys()
    for name, parameter in ours.named_parameters():
        expected_grad = gradients[name].T if "c_" in name and name.endswith("weight") else gradients[name]
        torch.testing.assert_close(parameter.grad, expected_grad, rtol=1e-3, atol=1e-5, msg=name)


def test_from_pretrained_reads_sharded_checkpoints(tmp_path: Path):
    theirs = hugging_face_gpt2()
    theirs.save_pretrained(tmp_path, max_shard_size="40KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    idx = tokens(2, 9)
    torch.testing.assert_close(
        GPT.from_pretrained(tmp_path)(idx)[0], theirs(idx).logits, rtol=1e-4, atol=1e-4
    )


def test_from_pretrained_refuses_what_it_would_compute_otherwise(tmp_path: Path):
    hugging_face_gpt2().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    good = json.loads(file.read_text())
    for change, message in [
        ({"model_type": "llama"}, "lacks hidden_size"),
        ({"model_type": "qwen2"}, "type 'qwen2'"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn"),
        ({"scale_attn_weights": False}, "scale_attn_weights"),
        ({"activation_function": "silu"}, "'silu'"),
        ({"n_inner": 100}, "shape"),
        ({"n_inner": "wide"}, "n_inner must be of type int"),
        ({"n_embd": 64}, "shape"),
        ({"n_layer": 3}, "lacks the tensor 'h.2"),
        ({"n_layer": 1}, "has the tensor 'h.1"),
    ]:
        file.write_text(json.dumps(good | change))
        with pytest.raises(ValueError, match=message):
            GPT.from_pretrained(tmp_path)


def test_from_pretrained_says_what_is_missing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint directory .* does not exist"):
        GPT.from_pretrained(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match=r"no config\.json"):
        GPT.from_pretrained(tmp_path)
    hugging_face_gpt2().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="complete safetensors"):
        GPT.from_pretrained(tmp_path)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match=r"neither model\.safetensors"):
        GPT.from_pretrained(tmp_path)


def test_from_pretrained_explains_a_hub_that_does_not_answer(monkeypatch: pytest.MonkeyPatch):
    hub = pytest.importorskip("huggingface_hub", reason="needs huggingface_hub to replace its download")

    def unreachable(name: str, **options: object) -> str:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(hub, "snapshot_download", unreachable)
    with pytest.raises(
        OSError,
        match="there is no directory gpt2-nowhere on disk, and the download from the Hub failed: no route",
    ):
        GPT.from_pretrained("gpt2-nowhere")
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="needs the package huggingface_hub"):
        GPT.from_pretrained("gpt2-nowhere")


# ---- architecture --------------------------------------------------------------------------------

VARIANTS = [
    {"position": position, "activation": activation, "tie_head": tie, "bias": bias}
    for position, activation, tie, bias in itertools.product(
        POSITIONS, ACTIVATIONS, (True, False), (True, False)
    )
]


@pytest.mark.parametrize("options", VARIANTS, ids=lambda o: "-".join(str(v) for v in o.values()))
def test_every_variant_starts_at_log_v_and_learns(options: dict):
    model = tiny(dropout=0.1, **options)
    idx, targets = tokens(4, 24), tokens(4, 24, seed=2)
    logits, loss = model(idx, targets)
    assert logits is None
    assert abs(loss.item() - math.log(61)) < 0.25
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), f"no gradient reaches {name}"
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    model.eval()
    before, after = loss.item(), model(idx, targets)[1].item()
    assert after < before


def test_gpt2_small_has_gpt2s_size_and_initialisation():
    with torch.device("meta"):
        assert GPT(GPTConfig(vocab_size=50257)).num_parameters() == 124_439_808
    model = tiny(n_embd=64, vocab_size=2000)
    assert model.lm_head.weight is model.wte.weight
    assert model.wte.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.h[0].attn.c_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert model.h[1].mlp.c_proj.weight.std().item() == pytest.approx(0.02 / 2, rel=0.05)
    assert not model.h[0].mlp.c_fc.bias.any()


def test_flops_per_token_counts_matrices_and_causal_attention():
    model = tiny()
    matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n != "wpe.weight")
    assert model.flops_per_token(0) == 6 * matrices
    assert model.flops_per_token() - model.flops_per_token(0) == 6 * 2 * 32 * 24


@pytest.mark.parametrize("position", POSITIONS)
def test_a_token_changes_no_logits_before_it(position: str):
    model = lively(position=position).eval()
    idx = tokens(2, 24)
    logits = model(idx)[0]
    for t in (0, 11, 23):
        changed = idx.clone()
        changed[:, t] = (changed[:, t] + 1) % 61
        other = model(changed)[0]
        torch.testing.assert_close(other[:, :t], logits[:, :t], rtol=1e-5, atol=1e-5)
        assert (other[:, t] - logits[:, t]).abs().max() > 1e-2


@pytest.mark.parametrize("position", POSITIONS)
def test_the_order_of_tokens_matters(position: str):
    model = lively(position=position).eval()
    idx = tokens(1, 8)
    swapped = idx[:, [1, 0, 2, 3, 4, 5, 6, 7]]
    assert (model(idx)[0][:, -1] - model(swapped)[0][:, -1]).abs().max() > 1e-2


@torch.no_grad()
@pytest.mark.parametrize(
    ("position", "unchanged"), [("rotary", True), ("sinusoidal", False), ("learned", False)]
)
def test_only_rotary_positions_depend_on_distance_alone(position: str, unchanged: bool):
    """Compare eight tokens at positions 0-7 and 5-12."""
    model, idx = lively(position=position).eval(), tokens(1, 8)
    plain = model.hidden_states(idx)
    tables = {"rotary": ("cos", "sin"), "sinusoidal": ("wave",), "learned": ("wpe.weight",)}[position]
    for name in tables:
        table = model.get_parameter(name) if "." in name else model.get_buffer(name)
        table.copy_(table.roll(-5, dims=0))
    assert torch.allclose(model.hidden_states(idx), plain, rtol=1e-4, atol=1e-4) is unchanged


def test_loss_is_the_cross_entropy_of_the_logits_and_skips_ignored_targets():
    model = lively().eval()
    idx, targets = tokens(3, 20), tokens(3, 20, seed=2)
    targets[0, :7] = -100
    logits = model(idx)[0]
    assert logits.shape == (3, 20, 61)
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view(3, 20)
    torch.testing.assert_close(model(idx, targets, reduction="none")[1], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model(idx, targets)[1], expected.sum() / 53, rtol=1e-4, atol=1e-4)


def test_dropout_acts_in_training_alone_and_follows_the_seed():
    model = lively(dropout=0.5)
    idx, targets = tokens(2, 24), tokens(2, 24, seed=2)

    def loss(seed: int) -> float:
        torch.manual_seed(seed)
        return model(idx, targets)[1].item()

    assert loss(1) == loss(1) != loss(2)
    model.eval()
    assert loss(1) == loss(2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_embd": 30, "n_head": 4}, "not divisible by n_head=4"),
        ({"n_embd": 30, "n_head": 10, "position": "rotary"}, "even n_embd / n_head"),
        ({"n_embd": 33, "n_head": 3, "position": "sinusoidal"}, "even n_embd"),
        ({"n_layer": 0}, "n_layer must be at least 1 and at most 16,384, not 0"),
        ({"dropout": 1.0}, "dropout must lie in"),
        ({"position": "alibi"}, "position must be one of learned, sinusoidal, rotary, not 'alibi'"),
        ({"activation": "swish"}, "activation must be one of"),
        ({"layer_norm_eps": 0.0}, "layer_norm_eps must be positive"),
    ],
)
def test_an_impossible_configuration_says_why(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


def test_bad_inputs_are_named():
    model = tiny()
    for idx, message in [
        (tokens(5), "integers"),
        (tokens(2, 3).float(), "integers"),
        (tokens(2, 25), "25 tokens do not fit"),
        (tokens(2, 0), "0 tokens do not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            model(idx)
    with pytest.raises(ValueError, match="do not match"):
        model(tokens(2, 5), tokens(2, 4))
    with pytest.raises(IndexError):
        model(torch.full((1, 3), 61))


# ---- generation ----------------------------------------------------------------------------------


@torch.no_grad()
def greedy_without_cache(model: GPT, idx: Tensor, count: int) -> Tensor:
    for _ in range(count):
        logits = model(idx[:, -model.config.block_size :])[0]
        idx = torch.cat((idx, logits[:, -1:].argmax(dim=-1)), dim=1)
    return idx


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("length", [1, 7, 24, 30])
def test_the_cache_changes_nothing_even_past_the_window(position: str, length: int):
    model = lively(position=position, tie_head=False).eval()
    idx = tokens(6, length)
    cached = model.generate(idx, 32, temperature=0)
    assert cached.shape == (6, length + 32)
    assert torch.equal(cached, greedy_without_cache(model, idx, 32))
    assert len(cached[:, length:].unique()) > 5  # a model that repeats one token would not test the cache


def test_top_k_1_and_tiny_top_p_are_greedy():
    model = lively()
    idx = tokens(2, 5)
    greedy = model.generate(idx, 12, temperature=0)
    assert torch.equal(model.generate(idx, 12, top_k=1, seed=3), greedy)
    assert torch.equal(model.generate(idx, 12, top_p=1e-9, seed=3), greedy)
    assert not torch.equal(model.generate(idx, 12, temperature=5.0, seed=3), greedy)


def test_sampling_never_leaves_the_top_k():
    logits = torch.randn(1, 61, generator=torch.Generator().manual_seed(0))
    best = set(logits[0].topk(5).indices.tolist())
    probabilities = sampling_distribution(logits, temperature=3.0, top_k=5)
    assert set(probabilities[0].nonzero().flatten().tolist()) == best
    expected = (logits[0] / 3.0)[sorted(best)].softmax(dim=0)
    torch.testing.assert_close(probabilities[0][sorted(best)], expected)

    model = lively().eval()
    idx = tokens(400, 1)[:1].expand(400, 1)
    allowed = set(model(idx[:1])[0][0, -1].topk(5).indices.tolist())
    drawn = set(model.generate(idx, 1, temperature=3.0, top_k=5, seed=0)[:, -1].tolist())
    assert len(drawn) > 1 and drawn <= allowed


def test_top_p_keeps_the_smallest_set_that_reaches_p():
    logits = torch.tensor([[0.5, 0.2, 0.15, 0.1, 0.05]]).log()
    for p, kept in [(0.4, 1), (0.6, 2), (0.84, 3), (0.94, 4), (1.0, 5)]:
        probabilities = sampling_distribution(logits, top_p=p)
        assert (probabilities > 0).sum() == kept, p
        assert probabilities.sum().item() == pytest.approx(1.0)
        ratio = probabilities[0, :kept] / probabilities[0, 0]
        torch.testing.assert_close(ratio, logits.exp()[0, :kept] / 0.5)


def test_sampling_follows_the_models_distribution():
    model = lively().eval()
    idx = tokens(1, 4)
    expected = model(idx)[0][0, -1].softmax(dim=0)
    drawn = model.generate(idx.expand(4000, 4), 1, seed=0)[:, -1]
    measured = torch.bincount(drawn, minlength=61) / 4000
    assert (measured - expected).abs().sum() < 0.2  # total variation of 4,000 draws over 61 tokens


def test_a_seed_repeats_the_sample_and_leaves_torchs_generator_alone():
    model = lively()
    idx = tokens(2, 5)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = model.generate(idx, 12, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(model.generate(idx, 12, seed=3), first)
    assert not torch.equal(model.generate(idx, 12, seed=4), first)
    unseeded = model.generate(idx, 12)
    torch.manual_seed(0)
    assert torch.equal(model.generate(idx, 12), unseeded)


@pytest.mark.parametrize("training", [True, False])
def test_generation_switches_dropout_off_and_restores_the_mode(training: bool):
    model = lively(dropout=0.5).train(training)
    idx = tokens(2, 5)
    assert torch.equal(model.generate(idx, 8, temperature=0), model.generate(idx, 8, temperature=0))
    assert all(module.training is training for module in model.modules())
    with pytest.raises(IndexError):
        model.generate(torch.full((1, 3), 61), 2)
    assert model.training is training


def test_generation_keeps_the_prompt_and_accepts_nothing_to_add():
    model, idx = tiny(), tokens(2, 5).int()
    assert torch.equal(model.generate(idx, 0), idx.long())
    assert torch.equal(model.generate(idx, 3, seed=0)[:, :5], idx.long())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be from"),
        ({"top_p": 1.5}, "top_p must be from"),
        ({"max_new_tokens": -1}, "max_new_tokens"),
    ],
)
def test_generation_refuses_impossible_options(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        tiny().generate(tokens(1, 3), **{"max_new_tokens": 2, **options})
    with pytest.raises(ValueError, match="at least one token"):
        tiny().generate(tokens(1, 0), 2)


# ---- torch.compile -------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_model_compiles_whole_and_once_for_all_batch_sizes():
    torch._dynamo.reset()
    model = tiny(n_layer=1)
    compiled = torch.compile(model, fullgraph=True, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for batch, length in [(2, 16), (3, 16), (5, 24), (4, 9)]:
            idx, targets = tokens(batch, length), tokens(batch, length, seed=2)
            model.zero_grad()
            loss = compiled(idx, targets)[1]
            loss.backward()
            gradient = model.wte.weight.grad.clone()
            model.zero_grad()
            expected = model(idx, targets)[1]
            expected.backward()
            torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(gradient, model.wte.weight.grad, rtol=1e-3, atol=1e-5)
