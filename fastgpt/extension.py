"""Loads the compiled C++ ops: `fastgpt._C` (build info) and the library for this CPU.

The kernels in csrc/cpu are compiled several times, each time for another instruction set, into a
library of its own; exactly one of them is loaded, so that code for one CPU can never leak into
another. PyTorch's own ATEN_CPU_CAPABILITY (default, avx2, avx512) caps the choice, as it does
for PyTorch's kernels.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import torch

MEND = (
    "pip install --no-build-isolation -e . (in the checkout), or reinstall fastgpt with --no-build-isolation"
)

# From the most to the least demanding; csrc/bindings.cpp knows what each one needs.
VARIANTS = ("avx512_bf16", "avx512", "avx2", "plain")

_CAPS = {"default": ("plain",), "avx2": ("avx2", "plain")}


@functools.cache
def _load() -> tuple[str | None, str]:
    """(variant, "") once a library is loaded, else (None, the reason and what mends it)."""
    try:
        import fastgpt._C as _C
    except ImportError as error:
        return None, f"the compiled extension is missing ({error}); build it with: {MEND}"
    built = str(_C.build_info()["torch"])
    if built != torch.__version__:
        return None, (
            f"the compiled extension was built for torch {built} and this is torch {torch.__version__}; "
            f"rebuild it with: {MEND}"
        )
    allowed = _CAPS.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), VARIANTS)
    usable = set(_C.cpu_variants())
    problem = "no library for this CPU was built"
    for variant in VARIANTS:
        library = Path(__file__).parent / f"_cpu_{variant}.so"
        if variant not in allowed or variant not in usable or not library.exists():
            continue
        try:
            torch.ops.load_library(str(library))
        except OSError as error:
            problem = f"{library.name} does not load ({error})"
            continue
        return variant, ""
    return None, f"{problem}; rebuild with: {MEND}"


def loaded() -> bool:
    """Whether the C++ ops are registered."""
    return _load()[0] is not None


def variant() -> str | None:
    """The instruction-set variant in use ("plain", "avx2", "avx512", "avx512_bf16"), or None."""
    return _load()[0]


def problem() -> str:
    """Why the C++ ops are not there, with the command that mends it; empty if they are."""
    return _load()[1]


def build_info() -> dict[str, Any]:
    """How the extension was built (torch, compiler, variants); empty if it is missing."""
    try:
        import fastgpt._C as _C
    except ImportError:
        return {}
    return dict(_C.build_info())
