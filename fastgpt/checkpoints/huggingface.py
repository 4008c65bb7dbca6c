"""Reading and writing of Hugging Face checkpoints: config.json and model.safetensors.

`gpt2_layout` and `llama_layout` know the options and tensors of each architecture. Weights are read from safetensors,
else from pytorch_model.bin, in one file or in shards.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastgpt.atomic_io import AtomicDirectory, check_outside_checkpoints, inside
from fastgpt.checkpoints import gpt2_layout, llama_layout
from fastgpt.checkpoints.native import parameter_shapes
from fastgpt.checkpoints.tensor_files import write_tensors
from fastgpt.console import note
from fastgpt.download import download, is_hub_name
from fastgpt.gpt_config import GPTConfig
from fastgpt.json_io import read_json, shown
from fastgpt.model import GPT
from fastgpt.tokenizer import (
    FILE,
    TOKENIZER_FILES,
    Tokenizer,
    byte_vocabulary,
)

CONFIG = "config.json"
_SAFETENSORS, _PICKLE = "model.safetensors", "pytorch_model.bin"
_OWN_FILES = re.compile(r"config\.json|model\.safetensors|tokenizer(_config)?\.json")
_SHOWN = 8  # names of tensors in a message
_LAYOUTS = {"gpt2": gpt2_layout, "llama": llama_layout, "mistral": llama_layout}


def read_pretrained(name: str, dropout: float) -> tuple[GPTConfig, dict[str, Tensor]]:
    """Read the configuration and the state dict of a checkpoint, in the names of `fastgpt.model.GPT`.

    The model is a GPT-2, a Llama or a Mistral of any size, with or without a tied head.

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
    options = _checked_options(options, directory)
    layout = _LAYOUTS[options["model_type"]]
    config = layout.read_config(options, dropout, directory)
    tensors = {
        layout.PREFIXES.sub("", key): tensor
        for file in _weight_files(directory)
        for key, tensor in _tensors(file)
    }
    wanted = parameter_shapes(config, len(tensors), directory)
    try:
        weights = layout.read_weights(tensors, config)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from None
    return config, _checked(weights, wanted, layout.OWN, options["model_type"], directory)


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


def _checked_options(options: dict[str, Any], directory: Path) -> dict[str, Any]:
    """Return the contents of config.json with the type of the model.

    Raises:
        ValueError: the architecture is another, or an option has a value that this GPT does not support.
    """
    options = {"n_positions": options["n_ctx"]} | options if "n_ctx" in options else options
    if "model_type" not in options and all(name in options for name in gpt2_layout.REQUIRED):
        note(f"{directory / CONFIG} lacks model_type; assuming gpt2 from its other options")
        options = options | {"model_type": "gpt2"}
    kind = options.get("model_type")
    if not isinstance(kind, str) or kind not in _LAYOUTS:
        known = ", ".join(map(repr, _LAYOUTS))
        raise ValueError(f"{directory} contains a model of type {shown(kind)}; supported are {known}")
    layout = _LAYOUTS[kind]
    for option, value in layout.FIXED.items():
        if options.get(option, value) != value:
            raise ValueError(
                f"{directory} sets {option}={shown(options[option])}, which this GPT does not support"
            )
    if absent := [option for option in layout.REQUIRED if option not in options]:
        raise ValueError(f"{directory / CONFIG} lacks {', '.join(absent)}")
    return options


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


def _checked(
    weights: dict[str, Tensor],
    wanted: dict[str, tuple[int, ...]],
    own: tuple[str, ...],
    kind: str,
    directory: Path,
) -> dict[str, Tensor]:
    """Return the tensors with the wanted shapes, without those of other heads, whose names are not our `own`.

    Raises:
        ValueError: a tensor is missing, unexpected, or has another shape.
    """
    odd = sorted(name for name in wanted.keys() ^ weights.keys() if name in wanted or name.startswith(own))
    if odd:
        verb = "lacks" if odd[0] in wanted else "has"
        raise ValueError(
            f"{directory} {verb} the tensor {shown(odd[0])}, unlike the {kind} in its config.json"
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


def write_pretrained(model: GPT, directory: Path, tokenizer: Tokenizer | None) -> None:
    """Write a checkpoint that transformers loads with equal logits.

    A model with RMSNorm is written as a Llama, or a Mistral if it has a window; others as a GPT-2, missing biases as 0
    and sinusoidal positions as learned ones, with an untied head. AutoTokenizer reads the tokenizer if one is given.
    The directory is complete or absent.

    Raises:
        ValueError: that architecture does not support an option, or the tokenizer has more tokens than the model.
        FileExistsError: the directory is not empty.
        OSError: the directory cannot be written.
    """
    layout = llama_layout if model.config.norm == "rms" else gpt2_layout
    options = layout.write_config(model.config)
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
        weights = {name: tensor.cpu().contiguous() for name, tensor in layout.write_weights(model).items()}
        write_tensors(temporary / _SAFETENSORS, weights, metadata={"format": "pt"})
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
