"""The hyper-parameters of a `fastgpt.model.GPT`, and presets of well-known architectures.

Sources of the options: GPT-2 (Radford et al. 2019); sinusoidal positions (Vaswani et al. 2017, sections 3.4 and 3.5);
rotary positions (Su et al. 2021, RoFormer); exact GELU (Hendrycks & Gimpel 2016); ReLU squared (So et al. 2021,
Primer); SwiGLU and GEGLU (Shazeer 2020); RMSNorm (Zhang & Sennrich 2019); grouped queries (Ainslie et al. 2023);
normalized queries and keys (Henry et al. 2020; Dehghani et al. 2023); capped logits (Gemma Team 2024, Gemma 2);
windows (Beltagy et al. 2020, Longformer); tied output projection (Press & Wolf 2017).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any

from fastgpt.json_io import shown
from fastgpt.options import check_sizes, check_types

POSITIONS = ("learned", "sinusoidal", "rotary")
NORMS = ("layer", "rms")
GATED = ("swiglu", "geglu")
ACTIVATIONS = ("gelu_tanh", "gelu", "relu", "relu2", *GATED)
# Far above any trained model. A larger number, which may come from an untrusted file, is a mistake.
MOST = dict(n_layer=1 << 14, n_head=1 << 16, n_embd=1 << 18, block_size=1 << 24, vocab_size=1 << 24)
MOST_INNER = 1 << 21  # columns of the MLP's first matrix


@dataclass(frozen=True)
class GPTConfig:
    """Hyper-parameters of a `GPT`. The defaults are GPT-2 small, its vocabulary padded to a multiple of 64.

    Attributes:
        vocab_size: tokens, V.
        block_size: the longest sequence, in tokens.
        n_layer: blocks.
        n_head: query heads, H.
        n_embd: channels of the residual stream, C.
        dropout: one rate for attention, residual branches and embedding, in training mode only.
        bias: whether linear layers and LayerNorms have a bias.
        position: "learned" (GPT-2), "sinusoidal" (the token embedding is multiplied by sqrt(n_embd)) or "rotary".
        activation: "gelu_tanh" (GPT-2), "gelu" (exact), "relu", "relu2" (squared), or a product with a gate, "swiglu"
            or "geglu" (tanh).
        tie_head: whether the output projection is the token embedding.
        layer_norm_eps: added to the variance in LayerNorm, to the mean square in RMSNorm.
        n_kv_head: heads of keys and values; None: n_head.
        n_inner: channels between the matrices of the MLP. None: 4 n_embd; with a gate 8/3 n_embd, rounded up to a
            multiple of 64, for about as many parameters.
        norm: "layer" (LayerNorm) or "rms" (RMSNorm).
        norm_weight: whether norms have learned parameters.
        qk_norm: whether queries and keys are normalized in each head, by RMSNorm before the rotation.
        softcap: c, for logits c tanh(logits / c); None: none.
        window: tokens that a token attends to, itself included; 0 or None: all. Several numbers, such as
            (256, 256, 256, 0), are for the layers in turn.
        rope_theta: base of the rotary frequencies.

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
    n_kv_head: int | None = None
    n_inner: int | None = None
    norm: str = "layer"
    norm_weight: bool = True
    qk_norm: bool = False
    softcap: float | None = None
    window: int | tuple[int, ...] | None = None
    rope_theta: float = 10000.0

    def __post_init__(self) -> None:
        if isinstance(self.window, (int, list)) and not isinstance(self.window, bool):
            many = self.window if isinstance(self.window, list) else [self.window]
            object.__setattr__(self, "window", tuple(many))
        check_types(self)
        check_sizes(self, MOST)
        for name, choices in (("position", POSITIONS), ("activation", ACTIVATIONS), ("norm", NORMS)):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {shown(value)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.n_kv_head is not None and (self.n_kv_head < 1 or self.n_head % self.n_kv_head):
            raise ValueError(
                f"n_head={self.n_head} is not divisible by n_kv_head={shown(self.n_kv_head)}: "
                "each head of keys and values serves as many query heads"
            )
        if self.n_inner is not None and not 1 <= self.n_inner <= MOST_INNER:
            raise ValueError(
                f"n_inner must be at least 1 and at most {MOST_INNER:,}, not {shown(self.n_inner)}"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout must lie in [0, 1), not {self.dropout}")
        for name in ("layer_norm_eps", "rope_theta", "softcap"):
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} must be positive, not {value}")
        if self.position == "rotary" and self.head_size % 2:
            raise ValueError(f"rotary positions need an even n_embd / n_head, not {self.head_size}")
        if self.position != "rotary" and self.rope_theta != GPTConfig.rope_theta:
            raise ValueError(f"rope_theta={self.rope_theta} needs position='rotary', not {self.position!r}")
        if self.position == "sinusoidal" and self.n_embd % 2:
            raise ValueError(f"sinusoidal positions need an even n_embd, not {self.n_embd}")
        self._check_window()

    def _check_window(self) -> None:
        if self.window is None:
            return
        if not isinstance(self.window, tuple) or not 1 <= len(self.window) <= self.n_layer:
            raise ValueError(
                f"window must be a number of tokens, or one for each of at most {self.n_layer} layers, "
                f"not {shown(self.window)}"
            )
        for tokens in self.window:
            if type(tokens) is not int or not 0 <= tokens <= MOST["block_size"]:
                raise ValueError(f"window must be a number of tokens, 0 for all, not {shown(tokens)}")

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> GPTConfig:
        """Return the configuration of a well-known architecture, of GPT-2 small's size, with some fields replaced.

        gpt2: GPT-2.
        llama: Llama (Touvron et al. 2023): RMSNorm, rotary positions, SwiGLU, no biases, a head of its own, and as in
            Llama 3 fewer heads of keys and values: one for 4 query heads, else 3, else 2, as divides n_head.
        nanochat: Karpathy's nanochat (2025): rotary positions, RMSNorm without parameters, queries and keys normalized,
            squared ReLU, logits capped at 15, no biases, a head of its own.

        Raises:
            ValueError: there is no such preset or field, or the result is no valid configuration.
        """
        known = [item.name for item in fields(cls)]
        for field in overrides:
            if field not in known:
                raise ValueError(f"GPTConfig has no field {shown(field)}; it has {', '.join(known)}")
        return cls(**preset_fields(name, overrides.get("n_head", cls.n_head)) | overrides)

    @property
    def head_size(self) -> int:
        """Channels of one attention head, D."""
        return self.n_embd // self.n_head

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values, Hk."""
        return self.n_kv_head or self.n_head

    @property
    def gated(self) -> bool:
        """Whether the activation of the MLP is a product with a gate."""
        return self.activation in GATED

    @property
    def inner_size(self) -> int:
        """Channels between the matrices of the MLP, I."""
        default = -(-8 * self.n_embd // (3 * 64)) * 64 if self.gated else 4 * self.n_embd
        return self.n_inner or default

    def window_of(self, layer: int) -> int | None:
        """Tokens that a token attends to in a layer, itself included; None for all."""
        return (self.window[layer % len(self.window)] or None) if isinstance(self.window, tuple) else None


_PLAIN = {item.name: item.default for item in fields(GPTConfig)}
# What the presets choose. The rest is size.
PRESET_FIELDS = (
    *("bias", "position", "activation", "tie_head", "n_kv_head", "norm", "norm_weight", "qk_norm"),
    *("softcap", "window", "rope_theta"),
)
_MODERN = dict(bias=False, position="rotary", tie_head=False, norm="rms")
_PRESETS = {
    "gpt2": {},
    "llama": {**_MODERN, "activation": "swiglu"},
    "nanochat": {**_MODERN, "activation": "relu2", "norm_weight": False, "qk_norm": True, "softcap": 15.0},
}
PRESETS = tuple(_PRESETS)


def preset_fields(name: str, n_head: int) -> dict[str, Any]:
    """Return the fields of `GPTConfig` that a preset chooses, for a number of query heads.

    Raises:
        ValueError: there is no such preset.
    """
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}, not {shown(name)}")
    chosen: dict[str, Any] = {field: _PLAIN[field] for field in PRESET_FIELDS} | _PRESETS[name]
    if name == "llama" and type(n_head) is int:
        chosen["n_kv_head"] = n_head // next(group for group in (4, 3, 2, 1) if n_head % group == 0)
    return chosen
