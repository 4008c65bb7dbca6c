"""Reading and writing of Hugging Face GPT-2 checkpoints: config.json and model.safetensors.

The tensors have the names of `fastgpt.model`, with or without the prefix "transformer.". Two things differ: linear
layers of GPT-2 are "Conv1D", stored (in, out) instead of (out, in), and old checkpoints contain the causal mask as
`attn.bias`. Weights are read from safetensors, else from pytorch_model.bin, in one file or in shards.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgpt.atomic_io import AtomicDirectory, check_outside_checkpoints, inside
from fastgpt.checkpoints.native import parameter_shapes
from fastgpt.checkpoints.tensor_files import write_tensors
from fastgpt.console import note
from fastgpt.download import download, is_hub_name
from fastgpt.json_io import read_json, shown
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import (
    FILE,
    TOKENIZER_FILES,
    Tokenizer,
    byte_vocabulary,
)

# The published models (Radford et al. 2019), by their names on the Hub.
GPT2_SIZES = {
    "gpt2": GPTConfig(50257, n_layer=12, n_head=12, n_embd=768),
    "gpt2-medium": GPTConfig(50257, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": GPTConfig(50257, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": GPTConfig(50257, n_layer=48, n_head=25, n_embd=1600),
}

CONFIG = "config.json"
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_OWN_FILES = re.compile(r"config\.json|model\.safetensors|tokenizer(_config)?\.json")
_SHOWN = 8  # names of tensors in a message
_ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu"}
_CONV1D = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
_MASKS = (".attn.bias", ".attn.masked_bias")
# Prefixes of PyTorch's wrappers, and of the body in a model with a head.
_PREFIXES = re.compile(r"((module|_orig_mod|transformer)\.)*")
_OWN = ("h.", "wte.", "wpe.", "ln_f.", "lm_head.")  # tensors of the model; others belong to another head

_REQUIRED = ("vocab_size", "n_positions", "n_layer", "n_head", "n_embd")

# Options of GPT-2 that change the computation, with the only values that `fastgpt.model` supports.
_FIXED = {
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "reorder_and_upcast_attn": False,
    "add_cross_attention": False,
}


def read_gpt2(name: str, dropout: float) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Read the configuration and the state dict of a GPT-2 checkpoint of any size, in the names of `fastgpt.model.GPT`.

    Weights are in safetensors, else in pytorch_model.bin, in one file or in shards, with or without a tied head.

    Args:
        name: a directory, or the name of a model on the Hugging Face Hub, which `huggingface_hub` downloads.
        dropout: replaces the checkpoint's dropout rates.

    Raises:
        OSError: there is no such checkpoint (FileNotFoundError for a directory).
        ImportError: the download needs a package.
        ValueError: the architecture is another, or an option is one that `fastgpt.model.GPT` does not compute.
    """
    directory = checkpoint_directory(name)
    try:
        options = read_json(directory / CONFIG)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"no config.json in {directory}; give the directory of a Hugging Face checkpoint"
        ) from None
    config = _config(options, dropout, directory)
    weights = _weights(directory, config.tie_head)
    return config, _checked(weights, config, directory)


def checkpoint_directory(name: str) -> Path:
    """Return the directory of a checkpoint, and download it first if the name is one on the Hub."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.exists():
        raise FileNotFoundError(
            f"{name} is a file, not a checkpoint directory; give a directory with config.json and {_SAFETENSORS}, "
            "or the directory of a run"
        )
    if not is_hub_name(name):
        raise FileNotFoundError(f"checkpoint directory {name} does not exist")
    for kind in ("*.safetensors*", "*.bin*"):  # a repository may hold the weights in both
        path = download(name, (CONFIG, *TOKENIZER_FILES, kind), "directory")
        if any(path.glob(kind)):
            break
    return path


def _config(options: dict[str, Any], dropout: float, directory: Path) -> GPTConfig:
    options = {"n_positions": options["n_ctx"]} | options if "n_ctx" in options else options
    if "model_type" not in options and all(name in options for name in _REQUIRED):
        note(f"{directory / CONFIG} lacks model_type; assuming gpt2 from its other options")
        options = options | {"model_type": "gpt2"}
    if options.get("model_type") != "gpt2":
        raise ValueError(
            f"{directory} contains a model of type {shown(options.get('model_type'))}; only 'gpt2' is supported"
        )
    for option, value in _FIXED.items():
        if options.get(option, value) != value:
            raise ValueError(
                f"{directory} sets {option}={shown(options[option])}, which this GPT does not support"
            )
    absent = [option for option in _REQUIRED if option not in options]
    if absent:
        raise ValueError(f"{directory / CONFIG} lacks {', '.join(absent)}")
    width = options["n_embd"]
    if type(width) is not int:
        raise ValueError(f"n_embd in {directory / CONFIG} is not an integer")
    if options.get("n_inner") not in (None, 4 * width):
        raise ValueError(
            f"{directory} sets n_inner={shown(options['n_inner'])}; this GPT supports only 4 * n_embd = {4 * width}"
        )
    activation = options.get("activation_function", "gelu_new")
    if not isinstance(activation, str) or activation not in _ACTIVATIONS:
        raise ValueError(
            f"{directory} uses the activation {shown(activation)}; supported are {', '.join(_ACTIVATIONS)}"
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
    """Read all tensors, with the names and the orientation of `fastgpt.model.GPT`."""
    weights = {}
    for file in _weight_files(directory):
        for key, tensor in _tensors(file):
            name = _PREFIXES.sub("", key)
            if not name.endswith(_MASKS):
                weights[name] = tensor.T if name.endswith(_CONV1D) else tensor
    if tie_head and "wte.weight" in weights:
        weights["lm_head.weight"] = weights["wte.weight"]
    return weights


def _tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    if file.suffix == ".safetensors":
        try:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():  # noqa: SIM118 (no mapping)
                    yield key, tensors.get_tensor(key)
        except SafetensorError as error:
            raise ValueError(f"{file} is not a complete safetensors file: {error}") from None
        return
    try:
        pickled = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged bytes may raise any exception in the unpickler
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"{file} is not a complete file of PyTorch tensors: {reason[0]}") from None
    if not isinstance(pickled, dict):
        raise ValueError(f"{file} contains something other than named tensors")
    for name, tensor in pickled.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor) or tensor.layout != torch.strided:
            raise ValueError(f"{file} contains something other than named tensors")
        if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # has strides of 0
            raise ValueError(f"{file} stores {name} in less memory than its shape needs")
        yield name, tensor


def _weight_files(directory: Path) -> list[Path]:
    for whole in (_SAFETENSORS, _PICKLE):
        index = directory / f"{whole}.index.json"
        if index.is_file():
            named = read_json(index).get("weight_map")
            if not isinstance(named, dict) or not all(
                isinstance(shard, str) and shard.endswith(Path(whole).suffix) for shard in named.values()
            ):
                raise ValueError(f"{index} is not the index of a sharded checkpoint")
            # Files downloaded from the Hub are symbolic links into a cache.
            files = [inside(directory, shard, links=True) for shard in sorted(set(named.values()))]
        elif (directory / whole).is_file():
            files = [directory / whole]
        else:
            continue
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{directory} lacks {file.name}")
        return files
    raise FileNotFoundError(f"{directory} contains neither {_SAFETENSORS} nor {_PICKLE}")


def _checked(weights: dict[str, Tensor], config: GPTConfig, directory: Path) -> dict[str, Tensor]:
    """Return the tensors of GPT(config), without those of other heads.

    Raises:
        ValueError: a tensor is missing, unexpected, or has another shape.
    """
    wanted = parameter_shapes(config, len(weights), directory)
    odd = sorted(name for name in wanted.keys() ^ weights.keys() if name in wanted or name.startswith(_OWN))
    if odd:
        verb = "lacks" if odd[0] in wanted else "has"
        raise ValueError(
            f"{directory} {verb} the tensor {shown(odd[0])}, unlike the GPT-2 in its config.json"
        )
    others = sorted(weights.keys() - wanted.keys())
    if others:
        more = f" and {len(others) - _SHOWN} more" if len(others) > _SHOWN else ""
        note(
            f"{directory}: skipped {', '.join(others[:_SHOWN])}{more}, tensors of a head that this GPT lacks"
        )
    for name, shape in wanted.items():
        if tuple(weights[name].shape) != shape:
            raise ValueError(
                f"{directory}: {name} has shape {tuple(weights[name].shape)}, expected {shape} from its config.json"
            )
    return {name: weights[name] for name in wanted}


def write_gpt2(model: GPT, directory: Path, tokenizer: Tokenizer | None) -> None:
    """Write a GPT-2 checkpoint that transformers' GPT2LMHeadModel loads, with equal logits.

    Missing biases are written as 0, and sinusoidal positions as learned ones, with an untied head. AutoTokenizer reads
    the tokenizer if one is given. The directory is complete or absent.

    Raises:
        ValueError: positions are rotary, which GPT-2 does not support, or the tokenizer has more tokens than the model.
        FileExistsError: the directory is not empty.
        OSError: the directory cannot be written.
    """
    options = _options(model.config)
    if tokenizer is not None:
        if tokenizer.vocab_size > model.config.vocab_size:
            raise ValueError(
                f"the tokenizer has {tokenizer.vocab_size} tokens, and the model {model.config.vocab_size}; "
                "call resize_token_embeddings first"
            )
        options["bos_token_id"] = options["eos_token_id"] = tokenizer.end_of_text
    check_outside_checkpoints(directory)
    _check_empty(directory)
    writing = AtomicDirectory(directory, _OWN_FILES)
    temporary = writing.path
    try:
        _check_empty(directory)  # another process may have written to it before the lock
        (temporary / CONFIG).write_text(json.dumps(options, indent=2), "utf-8")
        write_tensors(temporary / _SAFETENSORS, _for_gpt2(model), metadata={"format": "pt"})
        if tokenizer is not None:
            _write_tokenizer(tokenizer, temporary, model.config.block_size)
        writing.publish()
    except FileExistsError:
        raise
    except OSError as error:
        writing.discard()
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"{directory} could not be written ({reason}); no partial files remain") from error
    finally:
        writing.unlock()


def _check_empty(directory: Path) -> None:
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise FileExistsError(f"{directory} already exists; remove it, or choose another directory")


def _options(config: GPTConfig) -> dict[str, Any]:
    """Return the contents of config.json. Raises ValueError for options that GPT-2 does not support."""
    if config.position == "rotary":
        raise ValueError(
            "GPT-2 does not support rotary positions; export a model with learned or sinusoidal positions"
        )
    activations = {ours: theirs for theirs, ours in reversed(_ACTIVATIONS.items())}
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "n_inner": None,
        "activation_function": activations[config.activation],
        "layer_norm_epsilon": config.layer_norm_eps,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "tie_word_embeddings": config.tie_head and config.position == "learned",
        "bos_token_id": None,
        "eos_token_id": None,
    }


def _for_gpt2(model: GPT) -> dict[str, Tensor]:
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
        named[name if name.startswith("lm_head") else f"transformer.{name}"] = oriented.cpu().contiguous()
    return named


def _write_tokenizer(tokenizer: Tokenizer, directory: Path, longest: int) -> None:
    """Write tokenizer.json and tokenizer_config.json for transformers' AutoTokenizer."""
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "split_special_tokens": True,  # <|endoftext|> in a text is not a special token
    }
    if tokenizer.name == "bytes":
        (directory / FILE).write_text(_bytes_as_bpe(), "utf-8")
    else:
        tokenizer.save(directory)
        added = read_json(directory / FILE)["added_tokens"]
        ends = [token["content"] for token in added if token["id"] == tokenizer.end_of_text]
        settings |= dict.fromkeys(("bos_token", "eos_token"), ends[0]) if ends else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), "utf-8")


def _bytes_as_bpe() -> str:
    """Return a tokenizer.json for bytes: byte-level BPE without merges.

    `load_tokenizer` recognizes it. config.json tells transformers that a NUL ends a text.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    engine = Tokenizer(models.BPE(vocab=byte_vocabulary(), merges=[]))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.decoder = decoders.ByteLevel()
    return engine.to_str()
