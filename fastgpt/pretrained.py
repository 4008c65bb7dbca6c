"""Reading Hugging Face GPT-2 checkpoints: config.json and model.safetensors, whole or in shards.

The tensors keep their names. Two things differ from `fastgpt.model`: GPT-2's linear layers are "Conv1D"
there, stored (in, out) instead of (out, in), and old checkpoints carry the causal mask as `attn.bias`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:
    from torch import Tensor

    from fastgpt.model import GPTConfig

_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")

_REQUIRED = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")

# Options of GPT-2's configuration that change what is computed, with the value `fastgpt.model` computes.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def read_gpt2(name: str, dropout: float) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The configuration and the state dict of a GPT-2 checkpoint, a directory or a name on the Hub.

    Raises as `GPT.from_pretrained` says.
    """
    directory = _directory(name)
    try:
        options = json.loads((directory / "config.json").read_text("utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{directory} holds no config.json, so it is no Hugging Face checkpoint"
        ) from None
    except ValueError as error:
        raise ValueError(f"{directory / 'config.json'} is not JSON: {error}") from None
    config = _config(options, dropout, directory)
    weights = _weights(directory, config.tie_head)
    _check_shapes(weights, config, directory)
    return config, weights


def _directory(name: str) -> Path:
    """Where the checkpoint's files lie, after a download if `name` is no directory."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise FileNotFoundError(f"there is no checkpoint directory {name}")
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{name} is no directory here, and a download from the Hub needs the package huggingface_hub"
        ) from None
    try:
        return Path(
            snapshot_download(
                name, allow_patterns=["config.json", "*.safetensors", "*.safetensors.index.json"]
            )
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise OSError(f"{name} is no directory here, and the Hub did not deliver it: {reason}") from error


def _config(options: dict[str, Any], dropout: float, directory: Path) -> GPTConfig:
    from fastgpt.model import GPTConfig

    if options.get("model_type") != "gpt2":
        raise ValueError(
            f"{directory} holds a model of type {options.get('model_type')!r}; only 'gpt2' can be read"
        )
    for option, value in _FIXED.items():
        if options.get(option, value) != value:
            raise ValueError(f"{directory} sets {option}={options[option]}, which this GPT does not compute")
    absent = [option for option in _REQUIRED if option not in options]
    if absent:
        raise ValueError(f"{directory / 'config.json'} does not say {', '.join(absent)}")
    width = options["n_embd"]
    if options.get("n_inner") not in (None, 4 * width):
        raise ValueError(
            f"{directory} sets n_inner={options['n_inner']}; this GPT's is 4 * n_embd = {4 * width}"
        )
    activation = options.get("activation_function", "gelu_new")
    if activation not in _ACTIVATIONS:
        raise ValueError(
            f"{directory} uses the activation {activation!r}; known are {', '.join(_ACTIVATIONS)}"
        )
    return GPTConfig(
        vocab_size=options["vocab_size"],
        block_size=options["n_positions"],
        n_layer=options["n_layer"],
        n_head=options["n_head"],
        n_embd=width,
        dropout=dropout,
        activation=_ACTIVATIONS[activation],
        tie_head=options.get("tie_word_embeddings", True),
        layer_norm_eps=options.get("layer_norm_epsilon", 1e-5),
    )


def _weights(directory: Path, tie_head: bool) -> dict[str, Tensor]:
    """All tensors under the names and in the orientation of `fastgpt.model.GPT`."""
    weights = {}
    for file in _weight_files(directory):
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (no mapping)
                    tensor = tensors.get_tensor(key)
                    name = key.removeprefix("transformer.")
                    if not name.endswith(_MASKS):
                        weights[name] = tensor.T if name.endswith(_CONV1D) else tensor
        except SafetensorError as error:
            raise ValueError(f"{file} is not a whole safetensors file: {error}") from None
    if tie_head and "wte.weight" in weights:
        weights["lm_head.weight"] = weights["wte.weight"]
    return weights


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        shards = set(json.loads(index.read_text("utf-8"))["weight_map"].values())
        files = [directory / shard for shard in sorted(shards)]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{directory} holds no {file.name}")
    return files


def _check_shapes(weights: dict[str, Tensor], config: GPTConfig, directory: Path) -> None:
    """Raise ValueError unless the tensors are exactly those of GPT(config)."""
    import torch

    from fastgpt.model import GPT

    with torch.device("meta"):
        wanted = {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}
    odd = sorted(wanted.keys() ^ weights.keys())
    if odd:
        verb = "lacks" if odd[0] in wanted else "holds"
        raise ValueError(f"{directory} {verb} the tensor {odd[0]}, unlike the GPT-2 its config describes")
    for name, shape in wanted.items():
        if weights[name].shape != shape:
            raise ValueError(
                f"{directory}: {name} has shape {tuple(weights[name].shape)}, its config says {tuple(shape)}"
            )
