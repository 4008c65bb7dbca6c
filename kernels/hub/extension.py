"""In the place of the module that loads the compiled ops: there are none here."""

from __future__ import annotations

_NONE = "this copy of the kernels has nothing compiled; install the package fastgpt for that"


def loaded() -> bool:
    return False


def problem() -> str:
    return _NONE


def cuda_loaded(device: int | None = None) -> bool:
    return False


def cuda_problem(device: int | None = None) -> str:
    return _NONE
