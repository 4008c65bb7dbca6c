"""Loading of models in any supported format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastgpt.checkpoints.huggingface import CONFIG, checkpoint_directory
from fastgpt.checkpoints.native import check_weights, open_checkpoint
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer, load_tokenizer


def open_model(path: str | Path) -> tuple[GPT, Tokenizer]:
    """Load a model, on the CPU, and its tokenizer.

    Args:
        path: the directory of a run (`fastgpt train --out`) or of one of its checkpoints, a directory with a Hugging
            Face GPT-2, Llama or Mistral, or the name of one on the Hub.

    Raises:
        ValueError: the files are damaged, of another architecture, or contradict each other (CheckpointError for a
            native checkpoint).
        OSError: a file cannot be read.
    """
    return open_trained(path)[:2]


def open_trained(path: str | Path) -> tuple[GPT, Tokenizer, dict[str, Any] | None]:
    """Load like `open_model`, with the options of the run that trained the model; None for a Hugging Face model."""
    path = checkpoint_directory(str(path))
    if not (path / CONFIG).is_file():
        opened = open_checkpoint(path)
        model = opened.load_model()
        check_weights(model, opened.path)
        return model, opened.load_tokenizer(), opened.options
    model, tokenizer = GPT.from_pretrained(path), load_tokenizer(path)
    check_weights(model, path)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {path} has {tokenizer.vocab_size} tokens, and the model {model.config.vocab_size}; "
            "use the tokenizer of this model"
        )
    return model, tokenizer, None
