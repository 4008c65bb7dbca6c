"""Text from a checkpoint: `fastgpt generate`."""

from __future__ import annotations

from pathlib import Path

from fastgpt.backends import use_backend
from fastgpt.checkpoint import open_checkpoint
from fastgpt.config import resolve_device


def generate(
    checkpoint: str | Path,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    backend: str = "auto",
) -> str:
    """The prompt and its continuation by the model that `fastgpt train` saved in the directory `checkpoint`.

    Sampling is that of `GPT.generate`, in float32. Raises CheckpointError for the checkpoint, ValueError for
    an option.
    """
    opened = open_checkpoint(checkpoint)
    where = resolve_device(device)
    tokenizer = opened.load_tokenizer()
    tokens = tokenizer.encode(prompt)
    if not len(tokens):
        raise ValueError("the prompt is empty; give it at least one character")
    model = opened.load_model().to(where)
    with use_backend(backend):
        grown = model.generate(tokens[None].to(where), max_new_tokens, temperature, top_k, top_p, seed)
    return tokenizer.decode(grown[0].cpu())
