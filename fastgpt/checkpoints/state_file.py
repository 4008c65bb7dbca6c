"""Format of a checkpoint's state.json: its fields, their checks, and the files that it lists."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from fastgpt.json_io import shown
from fastgpt.tokenizer import FILE

FORMAT = 2  # format 1 had no "parts", and its sharded checkpoints contained pickles
STATE = "state.json"
STEP_PREFIX = "step-"
_STEMS = ("model", "optimizer")
_OWN_OF_FORMAT_1 = re.compile(r"(model|optimizer)/(\.metadata|__\d+_\d+\.distcp)")
_MOST_PARTS = 1 << 16
_MOST_STEPS = 1 << 53


def parts_of(state: dict[str, Any]) -> int | None:
    """Return the number of files per set of tensors, or None for a sharded checkpoint of format 1.

    Raises:
        ValueError: the format is unknown, or the number is invalid.
    """
    if type(state["format"]) is not int or not 1 <= state["format"] <= FORMAT:
        raise ValueError(
            f"{STATE} has format {shown(state['format'])}, and this version reads formats 1 and {FORMAT}"
        )
    if state["format"] == 1:
        return None if "model/.metadata" in state["files"] else 1
    parts = state["parts"]
    if type(parts) is not int or not 1 <= parts <= _MOST_PARTS:
        raise ValueError(f"{STATE} has an invalid number of parts, {shown(parts)}")
    return parts


def options_of(state: dict[str, Any]) -> dict[str, Any]:
    """Return the options of the run. Raises ValueError if they are not a JSON object."""
    options = state["train"]
    if not isinstance(options, dict):
        raise ValueError(f"{STATE} has {shown(options)} instead of the options of a run")
    return options


def step_of(state: dict[str, Any], path: Path) -> int:
    """Return the step. Raises ValueError if it is invalid, or differs from that in a name like "step-00000100"."""
    step = state["step"]
    if type(step) is not int or not 0 <= step < _MOST_STEPS:
        raise ValueError(f"{STATE} has an invalid step, {shown(step)}")
    if re.fullmatch(rf"{STEP_PREFIX}\d{{8,}}", path.name) and path.name != step_name(step):
        raise ValueError(f"{STATE} is that of step {step}; rename the directory to {step_name(step)}")
    return step


def step_name(step: int) -> str:
    """Return the name of a step's directory."""
    return f"{STEP_PREFIX}{step:08d}"


def expected_files(state: dict[str, Any], parts: int | None) -> set[str]:
    """Return the names that "files" must list: those of all files that are read."""
    if parts is None:
        return {FILE, *(name for name in state["files"] if _OWN_OF_FORMAT_1.fullmatch(name))}
    return {FILE, *(name for stem in _STEMS for name in tensor_files(stem, parts))}


def tensor_files(stem: str, parts: int) -> list[str]:
    """Return the names of the files of "model" or "optimizer", one per part."""
    if parts == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{part:05d}-of-{parts:05d}.safetensors" for part in range(1, parts + 1)]
