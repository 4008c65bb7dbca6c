"""GPT-2 in one file that reads top to bottom: configuration, layers, model.

The architecture is that of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): a
pre-norm Transformer decoder with learned positions and a head tied to the token embedding. Two positional
schemes and an untied head are options. All expensive operations are calls of `fastgpt.ops`, so that the same
code runs on every backend.

Shapes: B sequences, T tokens, C = n_embd channels, H = n_head heads of D = C / H, V = vocab_size.
"""

# ruff: noqa: N806  (sizes are written B, T, C as above)

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.json_io import shown
from fastgpt.ops._checks import check_tokens
from fastgpt.ops._modules import is_unmodified
from fastgpt.options import check_sizes, check_types
from fastgpt.tokenizer import Tokenizer

POSITIONS = ("learned", "sinusoidal", "rotary")
ACTIVATIONS = ("gelu_tanh", "gelu", "relu")
# Far above any trained model. A larger number, which may come from an untrusted file, is a mistake.
MOST = dict(n_layer=1 << 14, n_head=1 << 16, n_embd=1 << 18, block_size=1 << 24, vocab_size=1 << 24)
Rotation = tuple[Tensor, Tensor] | None  # cos and sin of the rotary embedding
MAX_TABLE_SIZE = 1 << 31  # elements of a table of positions


@dataclass(frozen=True)
class GPTConfig:
    """Hyper-parameters of a `GPT`. The defaults are GPT-2 small, its vocabulary padded to a multiple of 64.

    Attributes:
        position: "learned" (GPT-2), "sinusoidal" (Vaswani et al. 2017, section 3.5; the token embedding is multiplied
            by sqrt(n_embd), section 3.4) or "rotary" (Su et al. 2021, RoFormer).
        activation: "gelu_tanh" (GPT-2), "gelu" (exact, Hendrycks & Gimpel 2016) or "relu".
        dropout: one rate for attention, residual branches and embedding, in training mode only.
        bias: whether linear layers and LayerNorms have a bias.
        tie_head: whether the output projection is the token embedding (Press & Wolf 2017).

    Raises:
        ValueError: a value is out of range, or values contradict each other.
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
        check_types(self)
        check_sizes(self, MOST)
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        if not 0 < self.layer_norm_eps < math.inf:
            raise ValueError(f"layer_norm_eps must be positive, not {self.layer_norm_eps}")
        for name, choices in (("position", POSITIONS), ("activation", ACTIVATIONS)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even n_embd / n_head, not {self.head_size}")
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")

    @property
    def head_size(self) -> int:
        """Channels of one attention head, D."""
        return self.n_embd // self.n_head


def sin_cos(length: int, channels: int) -> tuple[Tensor, Tensor]:
    """Compute sin and cos of position / 10000^(2i / channels), each (length, channels / 2).

    Raises:
        ValueError: the table would have more than MAX_TABLE_SIZE elements.
    """
    if length * channels > MAX_TABLE_SIZE:
        raise ValueError(f"{length} positions of {channels} channels are too many for a table")
    frequency = torch.exp(torch.arange(0, channels, 2) * (-math.log(10000.0) / channels))
    angle = torch.arange(length)[:, None] * frequency
    return angle.sin(), angle.cos()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the channel pairs (i, i + D/2) of x (…, D) by the angles of cos and sin (…, D/2), which broadcast."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


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
    mask: Tensor | None

    def begin(self, count: int) -> slice | Tensor: ...
    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]: ...
    def advance(self, count: int) -> None: ...


class Context(NamedTuple):
    """The positions and neighbours of the tokens, the same for every layer."""

    rotation: Rotation = None
    cache: Cache | None = None
    cu_seqlens: Tensor | None = None


class Linear(nn.Linear):
    """nn.Linear on `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


class CausalSelfAttention(nn.Module):
    """Causal multi-head self-attention, (B, T, C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        B, T, C = x.shape
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        if context.cu_seqlens is None:
            y = self._attend(qkv, context, dropout)
        else:
            y = self._attend_packed(qkv, context.rotation, context.cu_seqlens, dropout)
        return self.c_proj(y.reshape(B, T, C))

    def _attend(self, qkv: Tensor, context: Context, dropout: float) -> Tensor:
        """Attend within each row of qkv (B, T, 3, H, D), and to the cached tokens before it: (B, T, H, D)."""
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind()
        if context.rotation is not None:
            q, k = rotate(q, *context.rotation), rotate(k, *context.rotation)
        mask = None
        if context.cache is not None:
            k, v = context.cache.append(self.layer, k, v)
            mask = context.cache.mask
        # With a cache, query i is token Lk - Lq + i: "lower_right". Without one, Lk = Lq and it is plain causality.
        y = ops.attention(q, k, v, causal="lower_right", attn_mask=mask, dropout_p=dropout)
        return y.transpose(1, 2)

    def _attend_packed(self, qkv: Tensor, rotation: Rotation, cu_seqlens: Tensor, dropout: float) -> Tensor:
        """Attend within each document of the B T tokens of qkv (B, T, 3, H, D): (B T, H, D)."""
        max_seqlen = qkv.shape[1]
        q, k, v = qkv.flatten(0, 1).unbind(1)
        if rotation is not None:
            cos, sin = (angles.view(len(q), 1, -1) for angles in rotation)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return ops.attention_varlen(q, k, v, *lengths, causal="lower_right", dropout_p=dropout)


class MLP(nn.Module):
    """Two linear layers with the activation between them, (B, T, C) -> (B, T, 4C) -> (B, T, C)."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.activation = config.activation
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        fc, proj = self.c_fc, self.c_proj
        if self.activation == "relu":
            return proj(F.relu(fc(x)))
        approximate = "tanh" if self.activation == "gelu_tanh" else "none"
        if all(type(layer) is Linear and is_unmodified(layer) for layer in (fc, proj)):
            return ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, approximate)
        return proj(ops.gelu(fc(x), approximate))


class Block(nn.Module):
    """One Transformer layer. It takes and returns (branch, residual), whose sum is the residual stream.

    The next LayerNorm computes the sum, so that the addition and the normalization are one pass over memory.
    """

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.n_embd, eps=config.layer_norm_eps, bias=config.bias)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(self, branch: Tensor, residual: Tensor | None, context: Context) -> tuple[Tensor, Tensor]:
        x, residual = _add_norm(branch, residual, self.ln_1)
        branch = self.drop(self.attn(x, context))
        x, residual = _add_norm(branch, residual, self.ln_2)
        return self.drop(self.mlp(x)), residual


def _add_norm(branch: Tensor, residual: Tensor | None, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
    """Return (norm(branch + residual), branch + residual)."""
    return ops.add_layer_norm(branch, residual, norm.weight, norm.bias, norm.eps)


class GPT(nn.Module):
    """A GPT-2 language model. Its parameters have the names of Hugging Face's checkpoints.

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
            sin, cos = sin_cos(T, config.head_size)
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
            return self.lm_head(hidden), None
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        weight = self.lm_head.weight
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
        return _add_norm(branch, residual, self.ln_f)[0]

    def _embed(self, idx: Tensor, positions: slice | Tensor) -> tuple[Tensor, Rotation]:
        """Embed tokens at positions, a range or (B, T): vectors (B, T, C), and the rotation of queries and keys."""
        x = self.wte(idx)
        if self.config.position == "learned":
            return x + self.wpe.weight[positions], None
        if self.config.position == "sinusoidal":
            return x * math.sqrt(self.config.n_embd) + self.wave[positions], None
        where = positions if isinstance(positions, slice) else positions[:, None]  # the same for all heads
        return x, (self.cos[where], self.sin[where])

    def num_parameters(self) -> int:
        """Count the parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, length: int | None = None) -> int:
        """Count the floating-point operations to train on one token of a sequence of `length` (default: block_size).

        2 in the forward and 4 in the backward for each of the 12 n_layer C^2 + V C weights of matrices; attention to
        T/2 tokens on average, two products of C channels: 2 C T a layer in the forward, 6 C T with the backward.
        """
        c = self.config
        length = c.block_size if length is None else length
        matrices = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
        return 6 * matrices + 6 * c.n_layer * c.n_embd * length

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
        """Load a Hugging Face GPT-2 checkpoint, a directory or a name on the Hub, in float32 and evaluation mode.

        `dropout` replaces the checkpoint's rates. Details and errors: `fastgpt.checkpoints.huggingface.read_gpt2`.
        """
        from fastgpt.checkpoints.huggingface import read_gpt2

        config, weights = read_gpt2(str(name), dropout)
        model = cls(config)
        model.load_state_dict(weights, strict=True, assign=False)
        return model.eval()

    def save_pretrained(self, directory: str | Path, tokenizer: Tokenizer | None = None) -> None:
        """Write a Hugging Face GPT-2 checkpoint, which transformers' GPT2LMHeadModel loads with equal logits.

        Details and errors: `fastgpt.checkpoints.huggingface.write_gpt2`.
        """
        from fastgpt.checkpoints.huggingface import write_gpt2

        write_gpt2(self, Path(directory), tokenizer)

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
