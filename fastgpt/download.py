"""Downloads from the Hugging Face Hub by model name: "gpt2", "owner/name", "owner/name@revision".

A revision is a commit, a tag or a branch. Only a commit is guaranteed not to change.
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
# Typical paths of runs: a mistyped one must not be looked up on the Hub.
_PATH = re.compile(r"(out|outputs?|runs?|results?|checkpoints?|models?|data|tmp)/.*|.*step-\d+")


def is_hub_name(name: str) -> bool:
    """Return True if a name may be that of a model on the Hub and is not a path.

    It is a path if such a file exists, if its owner is the name of an existing directory, or if it looks like the
    directory of a run (out/..., runs/..., .../step-00001000).
    """
    if _NAME.fullmatch(name) is None or name.endswith(_FILES) or _PATH.fullmatch(name):
        return False
    return not Path(name).exists() and not ("/" in name and Path(name).parent.is_dir())


def download(name: str, patterns: Sequence[str], kind: str) -> Path:
    """Download the files of a model into the cache, unless they are there, and return their directory.

    Args:
        name: NAME or NAME@REVISION.
        patterns: patterns of the file names.
        kind: the kind of file, for messages.

    Raises:
        ImportError: the package huggingface_hub is missing.
        OSError: the download failed.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ImportError(
            f"there is no {kind} {name} on disk, and a download from the Hub needs the package huggingface_hub: "
            "pip install huggingface_hub"
        ) from None
    try:
        repository, _, revision = name.partition("@")
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(
            f"there is no {kind} {name} on disk, and the download from the Hub failed: {reason}"
        ) from error
