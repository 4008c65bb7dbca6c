"""Files of a model on the Hugging Face Hub, by its name."""

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
_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_name(name: str) -> bool:
    """Whether a name may be that of a model on the Hub: "gpt2" or "owner/name", where no file here, nor a directory
    "owner", has that name.
    """
    if _NAME.fullmatch(name) is None or name.endswith(_FILES):
        return False
    return not Path(name).exists() and not ("/" in name and Path(name).parent.is_dir())


def download(name: str, patterns: Sequence[str], what: str) -> Path:
    """The directory of the files of a model, downloaded if they are not in the cache.

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
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise OSError(f"{name} is no {what} here, and the Hub did not deliver it: {reason}") from error
