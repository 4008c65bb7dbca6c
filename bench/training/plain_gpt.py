"""A GPT in plain PyTorch with the parameters of `fastgpt.model.GPT`: its peer in training.

It computes the architectures of the presets gpt2 and llama, as one would write them with `torch.nn`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as T
from torch import Tensor, nn

from fastgpt.model import GPTConfig


def make_norm(config: GPTConfig) -> nn.Module:
    """LayerNorm or RMSNorm."""
    if config.norm == "rms":
        return nn.RMSNorm(config.n_embd, eps=config.layer_norm_eps)
    return nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + D/2) of x (B, H, T, D) by the angles of cos and sin (T, D)."""
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class PlainBlock(nn.Module):
    """Transformer block: attention and MLP with normalization before them and residual connections."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        width, inner, bias = config.n_embd, config.inner_size, config.bias
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.head_size = config.head_size
        total = sum(self.heads) * config.head_size
        self.ln_1 = make_norm(config)
        self.attn = nn.ModuleDict(
            {"c_attn": nn.Linear(width, total, bias=bias), "c_proj": nn.Linear(width, width, bias=bias)}
        )
        self.ln_2 = make_norm(config)
        names = ("c_gate", "c_fc") if config.gated else ("c_fc",)
        self.mlp = nn.ModuleDict({name: nn.Linear(width, inner, bias=bias) for name in names})
        self.mlp["c_proj"] = nn.Linear(inner, width, bias=bias)

    def forward(self, x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
        batch, length, _ = x.shape
        qkv = self.attn["c_attn"](self.ln_1(x)).view(batch, length, -1, self.head_size)
        q, k, v = (part.transpose(1, 2) for part in qkv.split(self.heads, dim=2))
        if rotation is not None:
            cos, sin = (angles.to(q.dtype) for angles in rotation)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = T.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads[1] < self.heads[0])
        x = x + self.attn["c_proj"](y.transpose(1, 2).flatten(2))
        normed = self.ln_2(x)
        hidden = self.mlp["c_fc"](normed)
        if "c_gate" in self.mlp:
            hidden = T.silu(self.mlp["c_gate"](normed)) * hidden
        else:
            hidden = T.gelu(hidden, approximate="tanh")
        return x + self.mlp["c_proj"](hidden)


class PlainGPT(nn.Module):
    """Module from tokens and targets (B, T) to the mean loss; loads the state of `fastgpt.model.GPT`."""

    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.rotary = config.position == "rotary"
        if self.rotary:
            channels = torch.arange(0, config.head_size, 2) / config.head_size
            angle = torch.outer(torch.arange(config.block_size), config.rope_theta**-channels).repeat(1, 2)
            self.register_buffer("cos", angle.cos(), persistent=False)
            self.register_buffer("sin", angle.sin(), persistent=False)
        else:
            self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.h = nn.ModuleList(PlainBlock(config) for _ in range(config.n_layer))
        self.ln_f = make_norm(config)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.wte.weight

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        x, length = self.wte(idx), idx.shape[1]
        if not self.rotary:
            x = x + self.wpe(torch.arange(length, device=idx.device))
        rotation = (self.cos[:length], self.sin[:length]) if self.rotary else None
        for block in self.h:
            x = block(x, rotation)
        logits = self.lm_head(self.ln_f(x))
        return T.cross_entropy(logits.view(-1, logits.shape[-1]), targets.view(-1))
