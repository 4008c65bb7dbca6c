"""A GPT in one file that reads top to bottom: positions, attention, MLP, block, model.

By default it is GPT-2 of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): a pre-norm
Transformer decoder with learned positions and a head tied to the token embedding. Other positions, norms, activations,
heads and windows are options of `GPTConfig`, and Llama and nanochat presets of them. All expensive operations are
calls of `fastgpt.ops`, so that the same code runs on every backend.

Shapes: B sequences, T tokens, C = n_embd channels, H = n_head query heads and Hk heads of keys and values of D = C / H
channels, I channels inside the MLP, V = vocab_size.
"""

# ruff: noqa: N806  (sizes are written B, T, C as above)

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.gpt_config import GPTConfig
from fastgpt.ops._checks import check_tokens
from fastgpt.ops._modules import is_unmodified
from fastgpt.tokenizer import Tokenizer

__all__ = ["GPT", "GPTConfig"]

Rotation = tuple[Tensor, Tensor] | None  # cos and sin of the rotary embedding, (T, D/2) or (B, T, D/2)
MAX_TABLE_SIZE = 1 << 31  # elements of a table of positions


def sin_cos(length: int, channels: int, base: float = 10000.0) -> tuple[Tensor, Tensor]:
    """Compute sin and cos of position / base^(2i / channels), each (length, channels / 2).

    Raises:
        ValueError: the table would have more than MAX_TABLE_SIZE elements.
    """
    if length * channels > MAX_TABLE_SIZE:
        raise ValueError(f"{length} positions of {channels} channels are too many for a table")
    frequency = torch.exp(torch.arange(0, channels, 2) * (-math.log(base) / channels))
    angle = torch.arange(length)[:, None] * frequency
    return angle.sin(), angle.cos()


def packed_positions(cu_seqlens: Tensor, idx: Tensor) -> Tensor:
    """Compute the position of each token of idx (B, T) in its document, (B, T)."""
    if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens must be (documents + 1,) of int32 or int64, not {tuple(cu_seqlens.shape)} {cu_seqlens.dtype}"
        )
    index = torch.arange(idx.numel(), device=idx.device, dtype=cu_seqlens.dtype)
    start = cu_seqlens[torch.searchsorted(cu_seqlens, index, right=True) - 1]
    return (index - start).view_as(idx)


class Cache(Protocol):
    """A key-value cache as the model calls it: `fastgpt.generation.kv_cache.KVCache`."""

    length: int

    def begin(self, count: int) -> slice | Tensor: ...
    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...
    def advance(self, count: int) -> None: ...
    def mask_within(self, window: int | None) -> Tensor | None: ...


class Context(NamedTuple):
    """The positions and neighbours of the tokens, the same for every layer."""

    rotation: Rotation = None
    cache: Cache | None = None
    cu_seqlens: Tensor | None = None


class Linear(nn.Linear):
    """nn.Linear on `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


def make_norm(config: GPTConfig, size: int) -> nn.LayerNorm | nn.RMSNorm:
    """Make the normalization of the last dimension, of `size` channels, that a configuration asks for."""
    if config.norm == "rms":
        return nn.RMSNorm(size, config.layer_norm_eps, config.norm_weight)
    return nn.LayerNorm(size, config.layer_norm_eps, config.norm_weight, bias=config.bias)


def add_norm(
    branch: Tensor, residual: Tensor | None, norm: nn.LayerNorm | nn.RMSNorm
) -> tuple[Tensor, Tensor]:
    """Return (norm(branch + residual), branch + residual)."""
    if isinstance(norm, nn.RMSNorm):
        return ops.add_rms_norm(branch, residual, norm.weight, norm.eps or 0.0)
    return ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps)


class CausalSelfAttention(nn.Module):
    """Causal self-attention of H query heads and Hk heads of keys and values, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.heads = (config.n_head, config.kv_heads, config.kv_heads)
        self.head_size = config.head_size
        self.dropout = config.dropout
        self.window = config.window_of(layer)
        self.c_attn = Linear(config.n_embd, sum(self.heads) * config.head_size, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)
        if config.qk_norm:
            settings = (config.head_size, config.layer_norm_eps, config.norm_weight)
            self.q_norm, self.k_norm = nn.RMSNorm(*settings), nn.RMSNorm(*settings)
        self.qk_norm, self.norm_eps = config.qk_norm, config.layer_norm_eps

    def forward(self, x: Tensor, context: Context) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, sum(self.heads), self.head_size).split(self.heads, dim=2)
        if self.qk_norm:
            q = ops.rms_norm(q, self.q_norm.weight, self.norm_eps)
            k = ops.rms_norm(k, self.k_norm.weight, self.norm_eps)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        if context.rotation is not None:
            q, k = ops.rope(q, k, *context.rotation)
        y = (
            self._attend(q, k, v, context)
            if context.cu_seqlens is None
            else self._attend_packed(q, k, v, context.cu_seqlens)
        )
        return self.c_proj(y.reshape(B, T, C))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, context: Context) -> Tensor:
        """Attend within each row of q (B, H, T, D), k and v (B, Hk, T, D), and to the cached tokens before it."""
        mask, window = None, self.window
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
            if (mask := context.cache.mask_within(window)) is not None:
                window = None
        # With a cache, query i is token Lk - Lq + i: "lower_right". Without one, Lk = Lq and it is plain causality.
        options: dict[str, Any] = {"attn_mask": mask, **self._options(window)}
        return ops.attention(q, k, v, **options).transpose(1, 2)

    def _attend_packed(self, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor) -> Tensor:
        """Attend within each document of the B T tokens of q (B, H, T, D), k and v (B, Hk, T, D): (B T, H, D)."""
        lengths = (cu_seqlens, cu_seqlens, q.shape[2], q.shape[2])
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        return ops.attention_varlen(q, k, v, *lengths, **self._options(self.window))

    def _options(self, window: int | None) -> dict[str, Any]:
        dropout = self.dropout if self.training else 0.0
        return {
            "causal": "lower_right",
            "window": None if window is None else (window - 1, 0),
            "dropout_p": dropout,
        }


class MLP(nn.Module):
    """Two matrices with the activation between them, (B, T, C) -> (B, T, I) -> (B, T, C); with a gate, three."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        if config.gated:
            self.c_gate = Linear(config.n_embd, config.inner_size, bias=config.bias)
        self.c_fc = Linear(config.n_embd, config.inner_size, bias=config.bias)
        self.c_proj = Linear(config.inner_size, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        fc, proj = self.c_fc, self.c_proj
        if self.activation == "swiglu":
            return proj(ops.swiglu(self.c_gate(x), fc(x)))
        if self.activation == "geglu":
            return proj(ops.geglu(self.c_gate(x), fc(x), "tanh"))
        if self.activation == "relu2":
            return proj(ops.relu_squared(fc(x)))
        if self.activation == "relu":
            return proj(F.relu(fc(x)))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        if all(type(layer) is Linear and is_unmodified(layer) for layer in (fc, proj)):
            return ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, approximate)
        return proj(ops.gelu(fc(x), approximate))


class Block(nn.Module):
    """One Transformer layer. It takes and returns (branch, residual), whose sum is the residual stream.

    The next norm computes the sum, so that the addition and the normalization are one pass over memory.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, branch: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        x, residual = add_norm(branch, residual, self.ln_1)
        branch = self.drop(self.attn(x, context))
        x, residual = add_norm(branch, residual, self.ln_2)
        return self.drop(self.mlp(x)), residual


class GPT(nn.Module):
    """A GPT language model. Its parameters have the names of Hugging Face's GPT-2.

    Weights are initialized as in GPT-2: normal(0, 0.02), the projections into the residual stream divided by
    sqrt(2 n_layer), biases 0.

    With `checkpoint_activations = True`, training keeps only the input of each block and recomputes the block in the
    backward (Chen et al. 2016): less memory for a third more time.
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
            wave = torch.stack(sin_cos(T, C), dim=-1).flatten(1)  # sin in even channels, cos in odd ones
            self.register_buffer("wave", wave, persistent=False)
        else:
            sin, cos = sin_cos(T, config.head_size, config.rope_theta)
            self.register_buffer("sin", sin, persistent=False)
            self.register_buffer("cos", cos, persistent=False)
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.ln_f = make_norm(config, C)
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
        cu_seqlens: Tensor | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        z_loss: float = 0.0,
    ) -> tuple[Tensor | None, Tensor | None]:
        """Compute the logits, or the loss without ever having all logits in memory.

        Args:
            idx: (B, T) integers in [0, V), 1 <= T <= block_size.
            targets: (B, T) integers in [0, V), or -100 for a position that does not count.
            cu_seqlens: (documents + 1,) int32 or int64, the start of each document in the B T tokens of idx, read row
                by row, and the end of the last one. No document is longer than T. Tokens attend within their document
                only, and positions count from its start. None: each row is one document.
            reduction: "mean" or "sum" for a scalar loss in nats, "none" for (B, T).
            label_smoothing: as in `ops.linear_cross_entropy`.
            z_loss: as in `ops.linear_cross_entropy`.

        Returns:
            (logits (B, T, V), None) without targets, (None, loss) with them.

        Raises:
            ValueError: a shape or dtype is wrong.
            IndexError: a token is outside the vocabulary (on the CPU).
        """
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets {tuple(targets.shape)} do not match idx {tuple(idx.shape)}")
        hidden = self.hidden_states(idx, cu_seqlens=cu_seqlens)
        if targets is None:
            return self.logits(hidden), None
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        weight, options["softcap"] = self.lm_head.weight, self.config.softcap
        return None, ops.linear_cross_entropy(hidden, weight, targets, reduction=reduction, **options)

    def hidden_states(
        self, idx: Tensor, cache: Cache | None = None, *, cu_seqlens: Tensor | None = None
    ) -> Tensor:
        """Compute the input of the output projection, (B, T, C), for idx (B, T).

        With a cache, idx continues the tokens in it and is appended to it. `cu_seqlens` is that of `forward`.
        """
        check_tokens(idx)
        start = cache.length if cache is not None else 0
        end = start + idx.shape[1]
        if not start < end <= self.config.block_size:
            raise ValueError(f"{end} tokens do not fit: the model takes 1 to {self.config.block_size}")
        positions: slice | Tensor = slice(start, end) if cache is None else cache.begin(idx.shape[1])
        if cu_seqlens is not None:
            positions = packed_positions(cu_seqlens, idx)
        x, rotation = self._embed(idx, positions)
        context = Context(rotation, cache, cu_seqlens)
        branch, residual = self.drop(x), None
        use_checkpoint = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for block in self.h:
            run = partial(checkpoint, block, use_reentrant=False) if use_checkpoint else block
            branch, residual = run(branch, residual, context)
        if cache is not None:
            cache.advance(idx.shape[1])
        return add_norm(branch, residual, self.ln_f)[0]

    def _embed(self, idx: Tensor, positions: slice | Tensor) -> tuple[Tensor, Rotation]:
        """Embed tokens at positions, a range or (B, T): vectors (B, T, C), and the rotation of queries and keys."""
        x = self.wte(idx)
        if self.config.position == "learned":
            return x + self.wpe.weight[positions], None
        if self.config.position == "sinusoidal":
            return x * math.sqrt(self.config.n_embd) + self.wave[positions], None
        return x, (self.cos[positions], self.sin[positions])

    def logits(self, hidden: Tensor, num_tokens: int | None = None) -> Tensor:
        """Compute the logits, (..., V), of hidden states (..., C); of the first `num_tokens` tokens alone if given."""
        softcap, weight = self.config.softcap, self.lm_head.weight
        logits = self.lm_head(hidden) if num_tokens is None else ops.linear(hidden, weight[:num_tokens])
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)

    def num_parameters(self) -> int:
        """Count the parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, length: int | None = None) -> int:
        """Count the floating-point operations to train on one token of a sequence of `length` (default: block_size).

        2 in the forward and 4 in the backward for each weight of a matrix, but for the embedding's; in attention, two
        products of C channels with each of the T/2 tokens seen on average, fewer in a window: 2 C T a layer in the
        forward, 6 C T with the backward.
        """
        c = self.config
        length = c.block_size if length is None else length
        projections = c.n_embd * (2 * c.n_head + 2 * c.kv_heads) * c.head_size
        mlp = (3 if c.gated else 2) * c.n_embd * c.inner_size
        matrices = c.n_layer * (projections + mlp) + c.vocab_size * c.n_embd
        windows = (min(c.window_of(layer) or length, length) for layer in range(c.n_layer))
        seen = sum(
            window * (2 * length - window) // max(length, 1) for window in windows
        )  # twice the average
        return 6 * matrices + 6 * c.n_embd * seen

    def generate(
        self,
        idx: Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        **options: Any,
    ) -> Tensor:
        """Sample max_new_tokens tokens after idx (B, T): (B, T + max_new_tokens), int64.

        Further options, details and errors: `fastgpt.generation.decode.generate`.
        """
        from fastgpt.generation.decode import generate

        return generate(self, idx, max_new_tokens, temperature, top_k, top_p, seed, **options)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dropout: float = 0.0) -> GPT:
        """Load a Hugging Face checkpoint of GPT-2's or Llama's architecture, in float32 and evaluation mode.

        `name` is a directory or a name on the Hub, and `dropout` replaces the checkpoint's rates. Details and errors:
        `fastgpt.checkpoints.huggingface.read_pretrained`.
        """
        from fastgpt.checkpoints.huggingface import read_pretrained

        config, weights = read_pretrained(str(name), dropout)
        model = cls(config)
        model.load_state_dict(weights, strict=True, assign=False)
        return model.eval()

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write a Hugging Face checkpoint, which transformers' GPT2LMHeadModel or LlamaForCausalLM loads.

        Details and errors: `fastgpt.checkpoints.huggingface.write_pretrained`.
        """
        from fastgpt.checkpoints.huggingface import write_pretrained

        write_pretrained(self, Path(directory), tokenizer)

    @torch.no_grad()
    def resize_token_embeddings(self, vocab_size: int, *, shrink: bool = False) -> None:
        """Resize the embedding and the head to `vocab_size` tokens, in place. Make optimizers afterwards.

        A new row is the mean of the old rows. The logit of a new token is then the mean of the others', and the loss
        on old text hardly changes (Hewitt 2021, "Initializing new word embeddings for pretrained language models").
        Other rows are unchanged, and a tied head stays tied.

        Raises:
            ValueError: `vocab_size` is below 1, or smaller than it was and `shrink` is false.
        """
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, not {vocab_size}")
        if vocab_size < self.config.vocab_size and not shrink:
            had = self.config.vocab_size
            raise ValueError(
                f"{vocab_size} tokens are fewer than {had}: to drop the last ones pass shrink=True"
            )
        for layer in (self.wte, self.lm_head):
            old = layer.weight
            new = old.new_empty(vocab_size, old.shape[1])
            kept = min(len(old), vocab_size)
            new[:kept], new[kept:] = old[:kept], old.mean(dim=0)
            layer.weight = nn.Parameter(new, requires_grad=old.requires_grad)
        if self.config.tie_head:
            self.lm_head.weight = self.wte.weight
        self.wte.num_embeddings = self.lm_head.out_features = vocab_size
        self.config = replace(self.config, vocab_size=vocab_size)


def __getattr__(name: str) -> Any:
    """Re-export `KVCache` and `sampling_distribution`, which stand on this module."""
    if name in ("KVCache", "sampling_distribution"):
        from fastgpt.generation import kv_cache, sampling

        return {**vars(kv_cache), **vars(sampling)}[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
