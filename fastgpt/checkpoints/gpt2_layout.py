"""GPT-2 checkpoints of Hugging Face: their configuration and tensors, and those of `fastgpt.model.GPT`.

The tensors have the same names, with or without the prefix "transformer.". Two things differ: linear layers of GPT-2
are "Conv1D", stored (in, out) instead of (out, in), and old checkpoints contain the causal mask as `attn.bias`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.gpt_config import GPTConfig
from fastgpt.json_io import shown
from fastgpt.model import GPT

# The published models (Radford et al. 2019), by their names on the Hub.
GPT2_SIZES = {
    "gpt2": GPTConfig(50257, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(50257, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(50257, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(50257, n_layer=48, n_head=25, n_embd=1600),
}

REQUIRED = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")
# Options that change the computation, with the only values that `fastgpt.model` supports.
FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}
# Prefixes of PyTorch's wrappers, and of the body in a model with a head.
PREFIXES = re.compile(r"((module|_orig_mod|transformer)\.)*")
OWN = ("h.", "wte.", "wpe.", "ln_f.", "lm_head.")  # tensors of the model; others belong to another head
_ACTIVATIONS = {
    **{"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"},
    **{"relu": "relu", "relu2": "relu2"},
}
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")


def read_config(options: Mapping[str, Any], dropout: float, directory: Path) -> GPTConfig:
    """Return the configuration that config.json describes.

    Raises:
        ValueError: an option is one that `fastgpt.model.GPT` does not compute.
    """
    activation = options.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(
            f"{directory} uses the activation {shown(activation)}; supported are {', '.join(_ACTIVATIONS)}"
        )
    inner, width = options.get("n_inner"), options["n_embd"]
    return GPTConfig(
        vocab_size=options["vocab_size"],
        block_size=options["n_positions"],
        n_layer=options["n_layer"],
        n_head=options["n_head"],
        n_embd=width,
        n_inner=None if type(width) is int and inner == 4 * width else inner,
        dropout=dropout,
        activation=_ACTIVATIONS[activation],
        tie_head=options.get("tie_word_embeddings", True),
        layer_norm_eps=options.get("layer_norm_epsilon", 1e-5),
    )


def read_weights(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Return the tensors, named without prefixes, with the orientation of `fastgpt.model.GPT`."""
    weights = {
        name: tensor.T if name.endswith(_CONV1D) else tensor
        for name, tensor in tensors.items()
        if not name.endswith(_MASKS)
    }
    if config.tie_head and "wte.weight" in weights:
        weights["lm_head.weight"] = weights["wte.weight"]
    return weights


def write_config(config: GPTConfig) -> dict[str, Any]:
    """Return the contents of config.json.

    Raises:
        ValueError: GPT-2 does not support an option.
    """
    if config.position == "rotary":
        raise ValueError(
            "GPT-2 does not support rotary positions; export a model with learned or sinusoidal positions"
        )
    plain = {"norm": "layer", "norm_weight": True, "qk_norm": False, "softcap": None, "window": None}
    for name, value in plain.items():
        if getattr(config, name) != value:
            raise ValueError(f"GPT-2 does not support {name}={shown(getattr(config, name))}")
    if config.kv_heads != config.n_head:
        raise ValueError(f"GPT-2 does not support n_kv_head={config.n_kv_head} with n_head={config.n_head}")
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    if config.activation not in activations:
        raise ValueError(f"GPT-2 does not support activation={shown(config.activation)}")
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": config.n_inner,
        "activation_function": activations[config.activation],
        "layer_norm_epsilon": config.layer_norm_eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "tie_word_embeddings": config.tie_head and config.position == "learned",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def write_weights(model: GPT) -> dict[str, Tensor]:
    """Convert the state dict to that of GPT2LMHeadModel.

    Conv1D weights are transposed, missing biases are 0, and sinusoidal positions become learned ones. A sinusoidal
    model multiplies the embedding by sqrt(n_embd), but not the head: the embedding is written multiplied, and the head
    separately, untied. The logits are bit-identical.
    """
    config, weights = model.config, {k: v.detach() for k, v in model.state_dict().items()}
    if config.position == "sinusoidal":
        weights["wpe.weight"] = model.wave.to(model.wte.weight.dtype)
        weights["wte.weight"] = weights["wte.weight"] * math.sqrt(config.n_embd)
    elif config.tie_head:
        del weights["lm_head.weight"]
    if not config.bias:
        layers = [n.removesuffix(".weight") for n in weights if n.startswith("h.") or n == "ln_f.weight"]
        for layer in layers:
            weights[f"{layer}.bias"] = torch.zeros(
                len(weights[f"{layer}.weight"]), dtype=weights["wte.weight"].dtype
            )
    named = {}
    for name, tensor in weights.items():
        oriented = tensor.T if name.endswith(_CONV1D) else tensor
        named[name if name.startswith("lm_head") else f"transformer.{name}"] = oriented
    return named
