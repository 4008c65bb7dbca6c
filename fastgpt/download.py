"""Files of a model on the Hugging Face Hub, by its name: "gpt2", "owner/name", "owner/name@revision".

A revision is a commit, a tag or a branch. A model whose revision is a commit is always the same.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

_FILES = (
    ".json",
    ".txt",
    ".model",
    ".spm",
    ".tiktoken",
    ".pt",
    ".pth",
    ".bin",
    ".safetensors",
    ".toml",
    ".jsonl",
)
_PART = r"[A-Za-z0-9][\w.-]*"
_NAME = re.compile(rf"({_PART}/)?{_PART}(@{_PART})?")
# Paths as runs have them, so that a mistake in one, or in the working directory, asks nobody else for a model.
_PATH = re.compile(r"(out|outputs?|runs?|results?|checkpoints?|models?|data|tmp)/.*|.*step-\d+")


def is_hub_name(name: str) -> bool:
    """Whether a name may be that of a model on the Hub, and is not a path: no file here has that name, nor has a
    directory the owner's, nor does it look like the directory of a run (out/…, runs/…, …/step-00001000).
    """
    if _NAME.fullmatch(name) is None or name.endswith(_FILES) or _PATH.fullmatch(name):
        return False
    return not Path(name).exists() and not ("/" in name and Path(name).parent.is_dir())


def download(name: str, patterns: Sequence[str], what: str) -> Path:
    """The directory of the files of a model, NAME or NAME@REVISION, downloaded if they are not in the cache.

    Raises ImportError where the package is missing and OSError for a model that the Hub does not deliver; `what` says
    what there is not on the disk either.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"{name} is no {what} here, and a download from the Hub needs the package huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        repository, _, revision = name.partition("@")
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{name} is no {what} here, and the Hub did not deliver it: {reason}") from error
