"""Options beyond GPT-2: norms, gated MLPs, grouped queries, windows, capped logits, presets; a plain model agrees."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastgpt.generation.kv_cache import KVCache
from fastgpt.gpt_config import PRESETS
from fastgpt.model import GPT, GPTConfig
from fastgpt.training.config import TrainConfig
from fastgpt.training.optimizers import make_optimizers
from tests.model.test_model import TINY, lively, tiny, tokens

OPTIONS = [
    {"norm": "rms"},
    {"norm": "rms", "norm_weight": False, "bias": False},
    {"norm_weight": False},
    {"n_head": 4, "n_kv_head": 2},
    {"n_head": 4, "n_kv_head": 1, "position": "rotary", "rope_theta": 100.0},
    {"qk_norm": True, "position": "rotary"},
    {"qk_norm": True, "norm_weight": False},
    {"softcap": 2.0},
    {"window": 5},
    {"window": (3, 0), "position": "rotary"},
    {"activation": "relu2", "n_inner": 40},
    {"activation": "swiglu"},
    {"activation": "geglu", "n_inner": 24},
]
FULL = {
    **{"norm": "rms", "n_head": 4, "n_kv_head": 2, "qk_norm": True, "position": "rotary"},
    **{"softcap": 3.0, "window": (4, 0), "activation": "swiglu", "tie_head": False},
}


def normalized(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """The definition, in float64."""
    if isinstance(norm, torch.nn.LayerNorm):
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    x = x if norm.weight is None else x * norm.weight
    return x + norm.bias if getattr(norm, "bias", None) is not None else x


def plain_logits(model: GPT, idx: Tensor) -> Tensor:
    """What a GPT of any configuration computes, in plain PyTorch and one sequence at a time: (B, T, V)."""
    c, T = model.config, idx.shape[1]  # noqa: N806
    D = c.head_size  # noqa: N806
    place = torch.arange(T)
    angle = place[:, None] * c.rope_theta ** (-torch.arange(0, D, 2, dtype=torch.float64) / D)

    def turned(x: Tensor) -> Tensor:  # (T, heads, D), pairs (i, i + D/2) as complex numbers
        pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :]) * torch.exp(1j * angle)[:, None]
        return torch.cat((pairs.real, pairs.imag), -1)

    rows = []
    for row in idx:
        x = model.wte.weight[row]
        x = x + model.wpe.weight[:T] if c.position == "learned" else x
        for number, block in enumerate(model.h):
            qkv = F.linear(normalized(block.ln_1, x), block.attn.c_attn.weight, block.attn.c_attn.bias)
            parts = qkv.split([heads * D for heads in (c.n_head, c.kv_heads, c.kv_heads)], -1)
            q, k, v = (part.view(T, -1, D) for part in parts)
            if c.qk_norm:
                q, k = normalized(block.attn.q_norm, q), normalized(block.attn.k_norm, k)
            if c.position == "rotary":
                q, k = turned(q), turned(k)
            window = 0 if c.window is None else c.window[number % len(c.window)]
            seen = (place[:, None] >= place) & (place[:, None] - place < (window or T))
            heads = []
            for head in range(c.n_head):
                shared = head // (c.n_head // c.kv_heads)
                scores = (q[:, head] @ k[:, shared].T / math.sqrt(D)).masked_fill(~seen, -math.inf)
                heads.append(scores.softmax(-1) @ v[:, shared])
            x = x + F.linear(torch.cat(heads, -1), block.attn.c_proj.weight, block.attn.c_proj.bias)
            y, mlp = normalized(block.ln_2, x), block.mlp
            inner = F.linear(y, mlp.c_fc.weight, mlp.c_fc.bias)
            if c.gated:
                gate = F.linear(y, mlp.c_gate.weight, mlp.c_gate.bias)
                inner = inner * (
                    F.silu(gate) if c.activation == "swiglu" else F.gelu(gate, approximate="tanh")
                )
            else:
                inner = (
                    inner.relu().square() if c.activation == "relu2" else F.gelu(inner, approximate="tanh")
                )
            x = x + F.linear(inner, mlp.c_proj.weight, mlp.c_proj.bias)
        logits = F.linear(normalized(model.ln_f, x), model.lm_head.weight)
        rows.append(logits if c.softcap is None else c.softcap * torch.tanh(logits / c.softcap))
    return torch.stack(rows)


@pytest.mark.parametrize("options", [*OPTIONS, FULL], ids=str)
def test_logits_loss_and_gradients_are_those_of_a_plain_model(options: dict):
    model = lively(**options).double()
    idx, targets = tokens(2, 24), tokens(2, 24, seed=2)
    expected = plain_logits(model, idx)
    torch.testing.assert_close(model(idx)[0], expected, rtol=1e-5, atol=1e-5)
    loss, wanted = model(idx, targets)[1], F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    torch.testing.assert_close(loss, wanted, rtol=1e-6, atol=1e-6)
    parameters = list(model.parameters())
    gradients = zip(
        torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters), strict=True
    )
    for (name, _), (ours, plain) in zip(model.named_parameters(), gradients, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_option_starts_at_log_v_and_learns(options: dict):
    model = tiny(dropout=0.1, **options)
    idx, targets = tokens(4, 24), tokens(4, 24, seed=2)
    loss = model(idx, targets)[1]
    assert abs(loss.item() - math.log(61)) < 0.25
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    torch.optim.SGD(model.parameters(), lr=0.5).step()
    assert model.eval()(idx, targets)[1].item() < loss.item()


@pytest.mark.parametrize("options", [*OPTIONS, FULL], ids=str)
def test_a_cache_changes_no_logits(options: dict):
    model = lively(**options).eval()
    idx = tokens(2, 20)
    expected = model(idx)[0]
    cache = KVCache(model.config.n_layer, 24)
    parts = [model.logits(model.hidden_states(idx[:, a:b], cache)) for a, b in ((0, 11), (11, 12), (12, 20))]
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=1e-4, atol=1e-4)


def test_rows_of_different_lengths_keep_their_own_window():
    model = lively(**FULL).eval()
    idx, lengths, new = tokens(3, 15), torch.tensor([15, 4, 9]), tokens(3, 4, seed=3)
    cache = KVCache(model.config.n_layer, 24)
    model.hidden_states(idx, cache)
    cache.set_lengths(lengths)
    found = [model.hidden_states(new[:, i, None], cache)[:, 0] for i in range(4)]
    for row, length in enumerate(lengths.tolist()):
        alone = model.hidden_states(torch.cat((idx[row, :length], new[row]))[None])[0, -4:]
        torch.testing.assert_close(torch.stack(found, 1)[row], alone, rtol=1e-4, atol=1e-4)


def test_packed_documents_are_what_they_are_alone():
    model = lively(**FULL).eval()
    idx, ends = tokens(2, 24), [0, 7, 20, 24, 41, 48]
    packed = model.hidden_states(idx, cu_seqlens=torch.tensor(ends, dtype=torch.int32)).flatten(0, 1)
    for start, end in itertools.pairwise(ends):
        alone = model.hidden_states(idx.flatten()[None, start:end])[0]
        torch.testing.assert_close(packed[start:end], alone, rtol=1e-4, atol=1e-4)


def test_capped_logits_reach_the_sampler():
    model = lively(softcap=0.01).eval()
    prompts = tokens(1, 4).expand(64, -1)
    assert len(model.generate(prompts, 1, seed=0)[:, -1].unique()) > 35  # nearly uniform
    model.config = GPTConfig(**TINY)
    assert len(model.generate(prompts, 1, seed=0)[:, -1].unique()) < 28


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_a_model_that_trains(name: str):
    model = GPT(GPTConfig.preset(name, **{**TINY, "n_head": 4}))
    names = {
        key.partition(".")[2].partition(".")[2] for key in dict(model.named_parameters()) if key[:2] == "h."
    }
    assert ("mlp.c_gate.weight" in names, "ln_1.weight" in names, "ln_1.bias" in names) == {
        "gpt2": (False, True, True), "llama": (True, True, False), "nanochat": (False, False, False),
    }[name]  # fmt: skip
    idx = tokens(2, 24)
    model(idx, idx)[1].backward()
    assert all(p.grad is not None for p in model.parameters())


def test_presets_are_the_published_architectures():
    assert GPTConfig.preset("gpt2") == GPTConfig()
    assert GPTConfig.preset("gpt2", n_layer=2, dropout=0.5) == GPTConfig(n_layer=2, dropout=0.5)
    with torch.device("meta"):
        small = dict(n_layer=2, n_head=32, n_embd=4096, vocab_size=32000)
        llama = GPT(GPTConfig.preset("llama", **small, n_inner=14336))
        assert [p.shape[0] for p in llama.h[0].attn.parameters()] == [4096 + 2 * 1024, 4096]  # Llama 3 8B
        layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096
        assert llama.num_parameters() == 2 * layer + 2 * 32000 * 4096 + 4096
    assert [GPTConfig.preset("llama", n_head=n, n_embd=n * 8).kv_heads for n in (1, 2, 5, 6, 12, 9)] == [
        *(1, 1, 5, 2, 3, 3)
    ]
    assert GPTConfig.preset("llama", n_kv_head=None).kv_heads == 12
    assert (
        GPTConfig.preset("nanochat").softcap == 15.0
        and GPTConfig.preset("nanochat", softcap=None).softcap is None
    )


def test_the_width_of_a_gated_mlp_keeps_the_number_of_parameters():
    for width in (64, 384, 768, 1000):
        plain, gated = (GPTConfig(n_embd=width, n_head=1, activation=name) for name in ("gelu", "swiglu"))
        assert gated.inner_size % 64 == 0
        assert 0 <= 3 * gated.inner_size - 2 * plain.inner_size < 3 * 64
    assert GPTConfig(activation="swiglu", n_inner=100).inner_size == 100


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n_kv_head": 5}, "n_head=12 is not divisible by n_kv_head=5"),
        ({"n_kv_head": 0}, "not divisible by n_kv_head=0"),
        ({"n_kv_head": 24}, "not divisible by n_kv_head=24"),
        ({"n_kv_head": 2.0}, "n_kv_head must be of type int"),
        ({"n_inner": 0}, "n_inner must be at least 1"),
        ({"n_inner": 10**9}, "n_inner must be at least 1 and at most"),
        ({"norm": "batch"}, "norm must be one of layer, rms, not 'batch'"),
        ({"activation": "silu"}, "activation must be one of"),
        ({"softcap": 0.0}, r"softcap must be positive, not 0\.0"),
        ({"softcap": math.inf}, "softcap must be positive"),
        ({"rope_theta": -1.0, "position": "rotary"}, "rope_theta must be positive"),
        ({"rope_theta": 5e5}, "needs position='rotary', not 'learned'"),
        ({"position": "rotary", "n_embd": 12 * 5}, "need an even n_embd / n_head, not 5"),
        ({"window": -1}, "window must be a number of tokens, 0 for all, not -1"),
        ({"window": ()}, "window must be a number of tokens, or one for each"),
        ({"window": (1,) * 13}, "at most 12 layers"),
        ({"window": (8, None)}, "not None"),
        ({"window": True}, "window must be"),
        ({"window": "8"}, "window must be"),
        ({"qk_norm": 1}, "qk_norm must be of type bool"),
    ],
)
def test_options_that_make_no_model_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**options)


def test_presets_name_what_contradicts_them():
    with pytest.raises(ValueError, match="preset must be one of gpt2, llama, nanochat, not 'bert'"):
        GPTConfig.preset("bert")
    with pytest.raises(ValueError, match="GPTConfig has no field 'n_heads'"):
        GPTConfig.preset("llama", n_heads=8)
    with pytest.raises(ValueError, match="n_head=6 is not divisible by n_kv_head=4"):
        GPTConfig.preset("llama", n_head=6, n_kv_head=4)
    with pytest.raises(ValueError, match="n_embd=768 is not divisible by n_head=5"):
        GPTConfig.preset("llama", n_head=5)


def test_flops_count_the_heads_the_gate_and_the_windows():
    for options in (*OPTIONS, FULL):
        model = tiny(**options)
        matrices = sum(p.numel() for n, p in model.named_parameters() if p.dim() == 2 and n != "wpe.weight")
        if not model.config.tie_head:
            matrices -= model.wte.weight.numel()
        assert model.flops_per_token(0) == 6 * matrices, options
    full, windowed = tiny(window=(0, 0)), tiny(window=(4, 0))
    place = torch.arange(16)
    seen = torch.stack([(place[:, None] >= place) & (place[:, None] - place < w) for w in (4, 16)]).sum() / 16
    attention = windowed.flops_per_token(16) - windowed.flops_per_token(0)
    assert attention == pytest.approx(12 * 32 * seen.item(), rel=0.15)  # the diagonal counts half
    assert full.flops_per_token(16) - full.flops_per_token(0) == 2 * 6 * 32 * 16


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_of_norms_do_not_decay_and_matrices_of_blocks_go_to_muon(optimizer: str):
    model = tiny(**FULL)
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, others, muon = set(), set(), set()
    for one in make_optimizers(model, TrainConfig(optimizer=optimizer)):
        for group in one.param_groups:
            kind = decayed if group["weight_decay"] else others
            kind |= {names[id(p)] for p in group["params"]}
            if isinstance(one, torch.optim.Muon):
                muon |= {names[id(p)] for p in group["params"]}
    assert {n for n in names.values() if "ln_" in n or "_norm" in n} <= others
    assert {
        n for n in names.values() if n.endswith(("c_attn.weight", "c_gate.weight", "c_proj.weight"))
    } <= decayed
    if optimizer == "muon":
        assert muon == {
            n for n in names.values() if n.startswith("h.") and dict(model.named_parameters())[n].dim() == 2
        }
