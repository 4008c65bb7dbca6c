"""GPT-2 in one file that reads top to bottom: configuration, layers, model, sampling.

The architecture is that of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): a
pre-norm Transformer decoder with learned positions and a head tied to the token embedding. Two positional
schemes and an untied head are options. Everything that costs time goes through `fastgpt.ops`, so the same
text runs on every backend.

Shapes: B sequences, T tokens, C = n_embd channels, H = n_head heads of D = C / H, V = vocab_size.
"""

# ruff: noqa: N806  (sizes are written B, T, C as above)

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import ops

POSITIONS = ("learned", "sinusoidal", "rotary")
ACTIVATIONS = ("gelu_tanh", "gelu", "relu")

Rotation: TypeAlias = tuple[Tensor, Tensor] | None  # cos and sin of rotary positions, as `_rotate` takes them


@dataclass(frozen=True)
class GPTConfig:
    """The hyper-parameters of a `GPT`; the defaults are GPT-2 small (vocabulary padded to a multiple of 64).

    position:   "learned" (GPT-2), "sinusoidal" (Vaswani et al. 2017, section 3.5; the token embedding is then
                multiplied by sqrt(n_embd), section 3.4) or "rotary" (Su et al. 2021, RoFormer).
    activation: "gelu_tanh" (GPT-2), "gelu" (exact, Hendrycks & Gimpel 2016) or "relu".
    dropout:    one rate for attention, residual branches and embedding; acts in training mode alone.
    bias:       whether linear layers and LayerNorms have a bias.
    tie_head:   whether the output projection is the token embedding (Press & Wolf 2017).

    Raises ValueError for values that make no model.
    """

    vocab_size: int = 50304
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True
    position: str = "learned"
    activation: str = "gelu_tanh"
    tie_head: bool = True
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        for name in ("vocab_size", "block_size", "n_layer", "n_head", "n_embd"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if not self.layer_norm_eps > 0:
            raise ValueError(f"layer_norm_eps must be positive, not {self.layer_norm_eps}")
        if self.position not in POSITIONS:
            raise ValueError(f"position must be one of {', '.join(POSITIONS)}, not {self.position!r}")
        if self.activation not in ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(ACTIVATIONS)}, not {self.activation!r}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(
                f"rotary positions need an even head size, not n_embd / n_head = {self.head_size}"
            )
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")

    @property
    def head_size(self) -> int:
        """D, the channels of one attention head."""
        return self.n_embd // self.n_head


class KVCache:
    """Keys and values of the tokens already seen, so that a new token costs one row of attention.

    One (B, H, capacity, D) buffer a layer for the keys and one for the values, allocated at the first append,
    when shape and dtype are known. `length` positions are filled; the model moves it on after each pass.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self.layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v (B, H, T, D) behind the filled positions; return all, (B, H, length + T, D)."""
        B, H, T, D = k.shape
        buffers = self.layers[layer]
        if buffers is None:
            buffers = k.new_empty(B, H, self.capacity, D), v.new_empty(B, H, self.capacity, D)
            self.layers[layer] = buffers
        end = self.length + T
        for buffer, new in zip(buffers, (k, v), strict=True):
            buffer[:, :, self.length : end] = new
        return buffers[0][:, :, :end], buffers[1][:, :, :end]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the channel pairs (i, i + D/2) of x by the angles of cos and sin.

    x (B, H, T, D) takes them as (T, D/2); packed documents, x (B T, H, D), as (B T, 1, D/2).
    """
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def _sin_cos(length: int, channels: int) -> tuple[Tensor, Tensor]:
    """sin and cos of position / 10000^(2i / channels), each (length, channels / 2)."""
    frequency = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    angle = torch.arange(length)[:, None] * frequency
    return angle.sin(), angle.cos()


class Linear(nn.Linear):
    """nn.Linear on `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(
        self, x: Tensor, rotation: Rotation, cache: KVCache | None, documents: Tensor | None
    ) -> Tensor:
        B, T, C = x.shape
        dropout = self.dropout if self.training else 0.0
        if documents is not None:
            q, k, v = self.c_attn(x).view(B * T, 3, self.n_head, C // self.n_head).unbind(1)
            if rotation is not None:
                q, k = _rotate(q, *rotation), _rotate(k, *rotation)
            y = ops.attention_varlen(
                q, k, v, documents, documents, T, T, causal="lower_right", dropout_p=dropout
            )
            return self.c_proj(y.view(B, T, C))
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4).unbind()
        if rotation is not None:
            q, k = _rotate(q, *rotation), _rotate(k, *rotation)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
        # The query of row i is the (Lk - Lq + i)-th token: "lower_right" is plain causality without a cache.
        y = ops.attention(q, k, v, causal="lower_right", dropout_p=dropout)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


class MLP(nn.Module):
    """Two linear layers with the activation between them, (B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "relu":
            x = F.relu(self.c_fc(x))
        else:
            approximate = "tanh" if self.activation == "gelu_tanh" else "none"
            x = ops.linear_gelu(x, self.c_fc.weight, self.c_fc.bias, approximate)
        return self.c_proj(x)


class Block(nn.Module):
    """One Transformer layer. It takes and returns (branch, residual), whose sum is the stream x.

    The sum is left to the LayerNorm that reads it next, so that adding and normalising are one pass over
    memory.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.attn = Attention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self,
        branch: Tensor,
        residual: Tensor | None,
        rotation: Rotation,
        cache: KVCache | None,
        documents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        x, residual = _add_norm(branch, residual, self.ln_1)
        branch = self.drop(self.attn(x, rotation, cache, documents))
        x, residual = _add_norm(branch, residual, self.ln_2)
        return self.drop(self.mlp(x)), residual


def _add_norm(branch: Tensor, residual: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """(norm(branch + residual), branch + residual)."""
    return ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps)


class GPT(nn.Module):
    """A GPT-2 language model; parameters carry the names they have in Hugging Face's checkpoints.

    Weights start as in GPT-2: normal(0, 0.02), the projections into the residual stream divided by
    sqrt(2 n_layer), biases 0.

    With `checkpoint_activations` set, training keeps the input of each block alone and computes the block again in
    the backward (Chen et al. 2016): less memory for a third more time.
    """

    wave: Tensor
    cos: Tensor
    sin: Tensor

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.checkpoint_activations = False
        C, T = config.n_embd, config.block_size
        self.wte = nn.Embedding(config.vocab_size, C)
        if config.position == "learned":
            self.wpe = nn.Embedding(T, C)
        elif config.position == "sinusoidal":
            wave = torch.stack(_sin_cos(T, C), dim=-1).flatten(1)  # sin in even channels, cos in odd ones
            self.register_buffer("wave", wave, persistent=False)
        else:
            sin, cos = _sin_cos(T, config.head_size)
            self.register_buffer("sin", sin, persistent=False)
            self.register_buffer("cos", cos, persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = nn.LayerNorm(C, eps=config.layer_norm_eps, bias=config.bias)
        self.lm_head = nn.Linear(C, config.vocab_size, bias=False)
        if config.tie_head:
            self.lm_head.weight = self.wte.weight
        self._init_weights()

    @torch.no_grad()
    def _init_weights(self) -> None:
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 2:
                branch_end = name.endswith("c_proj.weight")
                parameter.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer) if branch_end else 0.02)

    def forward(
        self,
        idx: Tensor,
        targets: Tensor | None = None,
        *,
        documents: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(logits, None) without targets; (None, loss) with them, the logits never in memory as a whole.

        idx:       (B, T) integers in [0, V), 1 <= T <= block_size.
        targets:   (B, T) integers in [0, V), or -100 where a position does not count.
        documents: (documents + 1,) int32 or int64, where each document begins in the B T tokens of idx, read row by
                   row, and where the last one ends; none longer than T. No token then sees another document, and
                   positions count from a document's beginning. None: each row is one document.
        reduction: "mean" or "sum" for a scalar loss in nats, "none" for one of shape (B, T).
        label_smoothing, z_loss: as `ops.linear_cross_entropy`.
        logits:    (B, T, V), all positions.

        Raises ValueError for the wrong shape or dtype, IndexError (from the embedding, on the CPU) for a
        token that is not in the vocabulary.
        """
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets {tuple(targets.shape)} do not match idx {tuple(idx.shape)}")
        hidden = self.hidden(idx, documents=documents)
        if targets is None:
            return self.lm_head(hidden), None
        loss = ops.linear_cross_entropy(
            hidden,
            self.lm_head.weight,
            targets,
            reduction=reduction,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
        return None, loss

    def hidden(self, idx: Tensor, cache: KVCache | None = None, *, documents: Tensor | None = None) -> Tensor:
        """What the head reads: the last LayerNorm's output (B, T, C) for idx (B, T).

        With a cache, idx continues the tokens in it and is added to it. `documents` are those of `forward`.
        """
        _check_tokens(idx)
        start = cache.length if cache is not None else 0
        end = start + idx.shape[1]
        if not start < end <= self.config.block_size:
            raise ValueError(f"{end} tokens do not fit: the model takes 1 to {self.config.block_size}")
        if documents is None:
            x, rotation = self._embed(idx, slice(start, end))
        else:
            x, rotation = self._embed(idx, _positions(documents, idx))
            rotation = None if rotation is None else (rotation[0][:, None], rotation[1][:, None])
        branch, residual = self.drop(x), None
        again = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for block in self.h:
            arguments = (branch, residual, rotation, cache, documents)
            branch, residual = (
                checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
            )
        if cache is not None:
            cache.length = end
        return _add_norm(branch, residual, self.ln_f)[0]

    def _embed(self, idx: Tensor, positions: slice | Tensor) -> tuple[Tensor, Rotation]:
        """Tokens as vectors (B, T, C), and what turns queries and keys; positions are [start, end), or (B T,)."""
        x = self.wte(idx)
        if self.config.position == "learned":
            return x + self.wpe.weight[positions].view(-1, *x.shape[1:]), None
        if self.config.position == "sinusoidal":
            wave = self.wave[positions].view(-1, *x.shape[1:])
            return x * math.sqrt(self.config.n_embd) + wave, None
        return x, (self.cos[positions], self.sin[positions])

    def num_parameters(self) -> int:
        """How many numbers are learned; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, length: int | None = None) -> int:
        """Floating-point operations to train on one token of a sequence of `length` (default block_size).

        Forward and backward cost 2 + 4 operations for each weight of a matrix and token: 6 N with
        N = 12 n_layer C^2 + V C. Causal attention looks at T/2 tokens on average; two products of C channels
        with each make 2 * 2 C T/2 operations forward, three times that with the backward: 6 n_layer C T.
        """
        c = self.config
        length = c.block_size if length is None else length
        matrices = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * matrices + 6 * c.n_layer * c.n_embd * length

    @torch.no_grad()
    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """idx (B, T) with max_new_tokens sampled tokens behind it: (B, T + max_new_tokens), int64.

        temperature divides the logits; 0 takes the most likely token. top_k keeps the k most likely tokens,
        top_p the smallest set whose probability reaches p (Holtzman et al. 2020). seed makes the sample
        repeatable and leaves torch's own generator alone; without it torch's generator is drawn from.

        A key-value cache makes a token cost one row. When the text outgrows block_size the window slides:
        each further token is then predicted from the last block_size tokens, at the cost of a full pass,
        because positions count from the window's start. Dropout is off; the former mode is restored.
        """
        _check_tokens(idx)
        if not idx.shape[1]:
            raise ValueError("generation needs a prompt of at least one token")
        if max_new_tokens < 0:
            raise ValueError(f"max_new_tokens must not be negative, not {max_new_tokens}")
        _check_sampling(temperature, top_k, top_p)
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        block = self.config.block_size
        tokens = torch.cat((idx.long(), idx.new_empty(idx.shape[0], max_new_tokens, dtype=torch.long)), dim=1)
        was_training = self.training
        self.eval()
        try:
            cache = KVCache(self.config.n_layer, min(block, tokens.shape[1]))
            for end in range(idx.shape[1], tokens.shape[1]):
                if cache.length == block:
                    cache.length = 0
                start = end - 1 if cache.length else max(0, end - block)
                hidden = self.hidden(tokens[:, start:end], cache)
                logits = self.lm_head(hidden[:, -1]).float()
                tokens[:, end] = _sample(logits, temperature, top_k, top_p, generator)
        finally:
            self.train(was_training)
        return tokens

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dropout: float = 0.0) -> GPT:
        """A Hugging Face GPT-2 checkpoint (config.json and safetensors) as a float32 GPT in eval mode.

        name is a directory, or else the name of a model on the Hugging Face Hub, downloaded by
        `huggingface_hub`. The checkpoint's dropout rates are not taken over: dropout sets the one rate.

        Raises FileNotFoundError or OSError where there is no such checkpoint, ImportError where the download
        needs a package, ValueError for another architecture or for options this model does not compute.
        """
        from fastgpt.pretrained import read_gpt2

        config, weights = read_gpt2(str(name), dropout)
        model = cls(config)
        model.load_state_dict(weights, strict=True, assign=False)
        return model.eval()


def _positions(documents: Tensor, idx: Tensor) -> Tensor:
    """For each of the tokens of idx (B, T), read row by row, its place in its document: (B T,)."""
    if documents.dim() != 1 or documents.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"documents must be (documents + 1,) of int32 or int64, not {tuple(documents.shape)} {documents.dtype}"
        )
    places = torch.arange(idx.numel(), device=idx.device, dtype=documents.dtype)
    return places - documents[torch.searchsorted(documents, places, right=True) - 1]


def _check_tokens(idx: Tensor) -> None:
    if idx.dim() != 2 or idx.is_floating_point() or idx.is_complex() or idx.dtype == torch.bool:
        raise ValueError(f"idx must be a (B, T) tensor of integers, not {tuple(idx.shape)} of {idx.dtype}")


def _check_sampling(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0.0 <= temperature < math.inf:
        raise ValueError(f"temperature must be a finite number of at least 0, not {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], not {top_p}")


def sampling_distribution(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """The probabilities (..., V) that `GPT.generate` draws from, given logits (..., V); temperature > 0."""
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k, dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    probabilities = logits.softmax(dim=-1)
    if top_p is not None:
        ranked, order = probabilities.sort(dim=-1, descending=True, stable=True)
        before = ranked.cumsum(dim=-1) - ranked  # the mass of the tokens ranked above: 0 for the first
        kept = ranked.masked_fill(before >= top_p, 0.0)
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, kept)
    return probabilities / probabilities.sum(dim=-1, keepdim=True)


def _sample(
    logits: Tensor,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Tensor:
    """One token (B,) for logits (B, V)."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    probabilities = sampling_distribution(logits, temperature, top_k, top_p)
    return torch.multinomial(probabilities, 1, generator=generator)[:, 0]
