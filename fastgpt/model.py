"""GPT-2 in one file that reads top to bottom: configuration, layers, model.

The architecture is that of Radford et al., "Language Models are Unsupervised Multitask Learners" (2019): a
pre-norm Transformer decoder with learned positions and a head tied to the token embedding. Two positional
schemes and an untied head are options. Everything that costs time goes through `fastgpt.ops`, so the same
text runs on every backend.

Shapes: B sequences, T tokens, C = n_embd channels, H = n_head heads of D = C / H, V = vocab_size.
"""

# ruff: noqa: N806  (sizes are written B, T, C as above)

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastgpt import ops
from fastgpt.json_io import shown
from fastgpt.kv_cache import KVCache
from fastgpt.options import check_sizes, check_types
from fastgpt.positions import document_positions, rotate, sin_cos
from fastgpt.sampling import Sampling, continue_rows, sampling_distribution

__all__ = ["ACTIVATIONS", "GPT", "POSITIONS", "GPTConfig", "KVCache", "sampling_distribution"]

if TYPE_CHECKING:
    from fastgpt.tokenizer import BPETokenizer, ByteTokenizer

POSITIONS = ("learned", "sinusoidal", "rotary")
ACTIVATIONS = ("gelu_tanh", "gelu", "relu")
# Far above what is trained: a larger number, which may be read from a file, is a mistake.
LARGEST = {
    "vocab_size": 1 << 24,
    "block_size": 1 << 24,
    "n_layer": 1 << 14,
    "n_head": 1 << 16,
    "n_embd": 1 << 18,
}

Rotation: TypeAlias = tuple[Tensor, Tensor] | None  # cos and sin of rotary positions, as `rotate` takes them


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
        check_types(self)
        check_sizes(self, LARGEST)
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
            raise ValueError(
                f"rotary positions need an even head size, not n_embd / n_head = {self.head_size}"
            )
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")

    @property
    def head_size(self) -> int:
        """D, the channels of one attention head."""
        return self.n_embd // self.n_head


class Linear(nn.Linear):
    """nn.Linear on `ops.linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return ops.linear(x, self.weight, self.bias)


def _is_plain(layer: nn.Module) -> bool:
    """Whether a call of the layer is `ops.linear` of its parameters: no adapter, no hooks, no other forward."""
    hooks = (layer._forward_pre_hooks, layer._forward_hooks, layer._backward_pre_hooks, layer._backward_hooks)
    return type(layer) is Linear and "forward" not in layer.__dict__ and not any(hooks)


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
                cos, sin = (angles.view(B * T, 1, -1) for angles in rotation)
                q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            y = ops.attention_varlen(
                q, k, v, documents, documents, T, T, causal="lower_right", dropout_p=dropout
            )
            return self.c_proj(y.view(B, T, C))
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).permute(2, 0, 3, 1, 4).unbind()
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        mask = None
        if cache is not None:
            k, v = cache.append(self.layer, k, v)
            mask = cache.mask
        # The query of row i is the (Lk - Lq + i)-th token: "lower_right" is plain causality without a cache.
        y = ops.attention(q, k, v, causal="lower_right", attn_mask=mask, dropout_p=dropout)
        return self.c_proj(y.transpose(1, 2).reshape(B, T, C))


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
        if _is_plain(fc) and _is_plain(proj):
            return ops.mlp(x, fc.weight, fc.bias, proj.weight, proj.bias, approximate)
        return proj(ops.gelu(fc(x), approximate))


class Block(nn.Module):
    """One Transformer layer. It takes and returns (branch, residual), whose sum is the stream x.

    The sum is left to the LayerNorm that reads it next: adding and normalizing are one pass over memory.
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

        Raises ValueError for the wrong shape or dtype, IndexError (on the CPU) for a token outside the vocabulary.
        """
        if targets is not None and targets.shape != idx.shape:
            raise ValueError(f"targets {tuple(targets.shape)} do not match idx {tuple(idx.shape)}")
        hidden = self.hidden(idx, documents=documents)
        if targets is None:
            return self.lm_head(hidden), None
        options: dict[str, Any] = {"label_smoothing": label_smoothing, "z_loss": z_loss}
        weight = self.lm_head.weight
        return None, ops.linear_cross_entropy(hidden, weight, targets, reduction=reduction, **options)

    def hidden(self, idx: Tensor, cache: KVCache | None = None, *, documents: Tensor | None = None) -> Tensor:
        """What the head reads: the last LayerNorm's output (B, T, C) for idx (B, T).

        With a cache, idx continues the tokens in it and is added to it. `documents` are those of `forward`.
        """
        _check_tokens(idx)
        start = cache.length if cache is not None else 0
        end = start + idx.shape[1]
        if not start < end <= self.config.block_size:
            raise ValueError(f"{end} tokens do not fit: the model takes 1 to {self.config.block_size}")
        positions: slice | Tensor = slice(start, end) if cache is None else cache.begin(idx.shape[1])
        if documents is not None:
            positions = document_positions(documents, idx)
        x, rotation = self._embed(idx, positions)
        branch, residual = self.drop(x), None
        again = self.checkpoint_activations and self.training and torch.is_grad_enabled()
        for block in self.h:
            arguments = (branch, residual, rotation, cache, documents)
            branch, residual = (
                checkpoint(block, *arguments, use_reentrant=False) if again else block(*arguments)
            )
        if cache is not None:
            cache.advance(idx.shape[1])
        return _add_norm(branch, residual, self.ln_f)[0]

    def _embed(self, idx: Tensor, positions: slice | Tensor) -> tuple[Tensor, Rotation]:
        """Tokens at positions, a range or (B, T), as vectors (B, T, C), and what turns queries and keys."""
        x = self.wte(idx)
        if self.config.position == "learned":
            return x + self.wpe.weight[positions], None
        if self.config.position == "sinusoidal":
            return x * math.sqrt(self.config.n_embd) + self.wave[positions], None
        where = positions if isinstance(positions, slice) else positions[:, None]  # the same for all heads
        return x, (self.cos[where], self.sin[where])

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
        *,
        lengths: Tensor | None = None,
        repetition_penalty: float = 1.0,
        end_token: int | None = None,
        on_token: Callable[[int, int], bool | None] | None = None,
        num_tokens: int | None = None,
    ) -> Tensor:
        """idx (B, T) with max_new_tokens sampled tokens behind it: (B, T + max_new_tokens), int64.

        temperature divides the logits; 0 takes the most likely token. top_k keeps the k most likely tokens,
        top_p the smallest set whose probability reaches p (Holtzman et al. 2020). repetition_penalty divides
        the positive logits of tokens that are in the row already, and multiplies the negative ones (Keskar et
        al. 2019, CTRL, section 4.1); 1 does nothing.

        seed makes the sample repeatable and leaves torch's own generator alone; without it torch's generator
        is drawn from. Row b draws what it would draw alone with seed + b, whatever else is in the batch.

        lengths (B,), integers from 1 to T, says how long each row's prompt is where idx is padded on the
        right; a row's tokens go right behind its own prompt. A row ends by end_token, or when
        on_token(row, token), called with every token as it is chosen, returns True; rows that have ended are
        computed no more. What lies behind a row is -1. Only ids below num_tokens are chosen (of a padded vocabulary).

        A key-value cache makes a token cost one row. When the text outgrows block_size the window slides:
        each further token is then predicted from the last block_size tokens, at the cost of a full pass,
        because positions count from the window's start. Dropout is off; the former mode is restored.

        Raises ValueError for prompts or options that are none, IndexError (on the CPU) for a token outside the
        vocabulary, FloatingPointError for logits that are NaN or infinite.
        """
        _check_tokens(idx)
        sampling = Sampling(temperature, top_k, top_p, repetition_penalty)
        was_training = self.training
        self.eval()
        try:
            return continue_rows(
                self, idx, lengths, max_new_tokens, sampling, seed, end_token, on_token, num_tokens
            )
        finally:
            self.train(was_training)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, dropout: float = 0.0) -> GPT:
        """A Hugging Face GPT-2 checkpoint of any size as a float32 GPT in eval mode.

        It is a config.json and weights in safetensors, else in pytorch_model.bin, in shards or not; head tied
        or not. name is a directory, or else the name of a model on the Hugging Face Hub, downloaded by
        `huggingface_hub`. The checkpoint's dropout rates are not taken over: dropout sets the one rate.

        Raises FileNotFoundError or OSError where there is no such checkpoint, ImportError where the download
        needs a package, ValueError for another architecture or for options this model does not compute.
        """
        from fastgpt.pretrained import read_gpt2

        config, weights = read_gpt2(str(name), dropout)
        model = cls(config)
        model.load_state_dict(weights, strict=True, assign=False)
        return model.eval()

    def save_pretrained(
        self, directory: str | Path, tokenizer: ByteTokenizer | BPETokenizer | None = None
    ) -> None:
        """Write a Hugging Face GPT-2 checkpoint, which transformers' GPT2LMHeadModel loads with equal logits.

        Absent biases are written as 0. Sinusoidal positions are written as learned ones, and the head beside the
        embedding. AutoTokenizer reads the tokenizer, if one is given. The directory is whole or absent.

        Raises ValueError for rotary positions, which GPT-2 does not have, and for a tokenizer with more tokens
        than the model; FileExistsError for a directory that is not empty, OSError where it cannot be written.
        """
        from fastgpt.pretrained import write_gpt2

        write_gpt2(self, Path(directory), tokenizer)

    @torch.no_grad()
    def resize_vocabulary(self, vocab_size: int, *, shrink: bool = False) -> None:
        """Give the embedding and the head rows for `vocab_size` tokens, in place; make optimizers afterwards.

        Rows that stay are unchanged. Each new one is the mean of the old, in the embedding as in the head: the
        logit of a new token is then the mean of the others', so that the loss on old text hardly moves, where a
        random row could outdo them all (Hewitt 2021, "Initializing new word embeddings for pretrained language
        models"). A tied head stays tied.

        Raises ValueError for less than one token, and for fewer than there are unless `shrink` is true.
        """
        if vocab_size < 1:
            raise ValueError(f"vocab_size must be at least 1, not {vocab_size}")
        if vocab_size < self.config.vocab_size and not shrink:
            raise ValueError(
                f"{vocab_size} tokens are fewer than the model's {self.config.vocab_size}; "
                "to drop the last ones pass shrink=True"
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


def _check_tokens(idx: Tensor) -> None:
    if idx.dim() != 2 or idx.is_floating_point() or idx.is_complex() or idx.dtype == torch.bool:
        raise ValueError(f"idx must be a (B, T) tensor of integers, not {tuple(idx.shape)} of {idx.dtype}")
