"""Llama checkpoints of Hugging Face, and Mistral's: their configuration and tensors, and those of `fastgpt.model.GPT`.

Mistral is Llama with a window. Queries, keys and values are one matrix of ours and three of theirs; all other tensors
differ in their names only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastgpt.gpt_config import GPTConfig
from fastgpt.json_io import shown
from fastgpt.model import GPT

REQUIRED = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    "max_position_embeddings",
)
# Options that change the computation, with the only values that `fastgpt.model` supports.
FIXED = {"hidden_act": "silu", "rope_scaling": None, "pretraining_tp": 1, "partial_rotary_factor": 1.0}
PREFIXES = re.compile(r"((module|_orig_mod|model)\.)*")
OWN = ("layers.", "embed_tokens.", "norm.", "lm_head.")  # tensors of the model; others belong to another head

_LAYER = {
    "ln_1": "input_layernorm",
    "ln_2": "post_attention_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "mlp.c_gate": "mlp.gate_proj",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
_OUTER = {
    "wte.weight": "embed_tokens.weight",
    "ln_f.weight": "norm.weight",
    "lm_head.weight": "lm_head.weight",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_PARAMETER = re.compile(r"h\.(\d+)\.(.+)\.(weight|bias)")


def read_config(options: Mapping[str, Any], dropout: float, directory: Path) -> GPTConfig:
    """Return the configuration that config.json describes.

    Raises:
        ValueError: an option is one that `fastgpt.model.GPT` does not compute.
    """
    width, heads = options["hidden_size"], options["num_attention_heads"]
    head_size = options.get("head_dim")
    if head_size is not None and not (type(heads) is type(head_size) is int and head_size * heads == width):
        raise ValueError(
            f"{directory} sets head_dim={shown(head_size)}; this GPT supports only hidden_size / num_attention_heads"
        )
    bias = options.get("attention_bias", False)
    if bias != options.get("mlp_bias", False):
        raise ValueError(
            f"{directory} has biases in a part of its linear layers, which this GPT does not support"
        )
    rope = options.get("rope_parameters") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default":
        raise ValueError(f"{directory} sets rope_parameters={shown(rope)}, which this GPT does not support")
    return GPTConfig(
        vocab_size=options["vocab_size"],
        block_size=options["max_position_embeddings"],
        n_layer=options["num_hidden_layers"],
        n_head=heads,
        n_kv_head=options.get("num_key_value_heads", heads),
        n_embd=width,
        n_inner=options["intermediate_size"],
        dropout=dropout,
        bias=bias,
        position="rotary",
        rope_theta=rope.get("rope_theta", options.get("rope_theta", 10000.0)),
        activation="swiglu",
        norm="rms",
        layer_norm_eps=options.get("rms_norm_eps", 1e-6),
        tie_head=options.get("tie_word_embeddings", False),
        window=options.get("sliding_window") if options["model_type"] == "mistral" else None,
    )


def read_weights(tensors: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Return the tensors, named without prefixes, with the names of `fastgpt.model.GPT`.

    Raises:
        ValueError: a tensor is missing, or queries, keys or values have shapes other than the configuration's.
    """
    used = {}
    for layer in range(config.n_layer):
        for kind in ("weight", "bias") if config.bias else ("weight",):
            for ours, theirs in _LAYER.items():
                if not (kind == "bias" and ours.startswith("ln_")):
                    used[f"h.{layer}.{ours}.{kind}"] = [f"layers.{layer}.{theirs}.{kind}"]
            used[f"h.{layer}.attn.c_attn.{kind}"] = [f"layers.{layer}.self_attn.{one}.{kind}" for one in _QKV]
    for ours, theirs in _OUTER.items():
        used[ours] = ["embed_tokens.weight" if config.tie_head and ours == "lm_head.weight" else theirs]
    if missing := [name for names in used.values() for name in names if name not in tensors]:
        raise ValueError(f"lacks the tensor {missing[0]!r}, unlike the model in its config.json")
    rows = [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    for names in used.values():
        if len(names) > 1:
            for one, count in zip(names, rows, strict=True):
                wanted = (count,) if one.endswith("bias") else (count, config.n_embd)
                if tuple(tensors[one].shape) != wanted:
                    found = tuple(tensors[one].shape)
                    raise ValueError(f"{one} has shape {found}, expected {wanted} from its config.json")
    weights = {
        n: tensors[names[0]] if len(names) == 1 else torch.cat([tensors[one] for one in names])
        for n, names in used.items()
    }
    known = {name for names in used.values() for name in names} | {"lm_head.weight"}
    # Old checkpoints hold the rotary frequencies, which follow from the configuration.
    rest = {name: t for name, t in tensors.items() if name not in known and not name.endswith("inv_freq")}
    return weights | rest


def write_config(config: GPTConfig) -> dict[str, Any]:
    """Return the contents of config.json.

    Raises:
        ValueError: neither Llama nor Mistral supports an option.
    """
    same = {
        "position": "rotary",
        "activation": "swiglu",
        "norm_weight": True,
        "qk_norm": False,
        "softcap": None,
    }
    for name, value in same.items():
        if getattr(config, name) != value:
            raise ValueError(f"Llama does not support {name}={shown(getattr(config, name))}")
    windows = {config.window_of(layer) for layer in range(config.n_layer)}
    if len(windows) > 1 or (windows != {None} and config.bias):
        raise ValueError(f"Mistral does not support window={shown(config.window)} with bias={config.bias}")
    window = windows.pop()
    return {
        "model_type": "mistral" if window else "llama",
        "architectures": ["MistralForCausalLM" if window else "LlamaForCausalLM"],
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.block_size,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_size,
        "hidden_size": config.n_embd,
        "intermediate_size": config.inner_size,
        "hidden_act": "silu",
        "rms_norm_eps": config.layer_norm_eps,
        "rope_theta": config.rope_theta,
        "attention_dropout": config.dropout,
        "attention_bias": config.bias,
        "mlp_bias": config.bias,
        "tie_word_embeddings": config.tie_head,
        "bos_token_id": None,
        "eos_token_id": None,
        **({"sliding_window": window} if window else {}),
    }


def write_weights(model: GPT) -> dict[str, Tensor]:
    """Convert the state dict to that of LlamaForCausalLM."""
    config = model.config
    rows = [heads * config.head_size for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    named: dict[str, Tensor] = {}
    for ours, tensor in model.state_dict().items():
        if ours in _OUTER:
            if not (ours == "lm_head.weight" and config.tie_head):
                named[_OUTER[ours] if ours == "lm_head.weight" else f"model.{_OUTER[ours]}"] = tensor
            continue
        found = _PARAMETER.fullmatch(ours)
        assert found, ours
        layer, part, kind = found.groups()
        if part == "attn.c_attn":
            for one, values in zip(_QKV, tensor.split(rows), strict=True):
                named[f"model.layers.{layer}.self_attn.{one}.{kind}"] = values
        else:
            named[f"model.layers.{layer}.{_LAYER[part]}.{kind}"] = tensor
    return named
