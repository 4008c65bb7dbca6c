"""Lookup of the replacement for a module, by the fingerprint of its forward."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from fastgpt.integrations import decoder_patterns, encoder_patterns
from fastgpt.integrations.fingerprint import fingerprint
from fastgpt.integrations.recognized import Recognized, made
from fastgpt.integrations.replacement import Replacement

PATTERNS: tuple[type[Recognized], ...] = (*decoder_patterns.PATTERNS, *encoder_patterns.PATTERNS)


def replacement_of(module: nn.Module) -> type[Replacement] | None:
    """Return the class that takes the place of a module's, or None; it may still refuse the module."""
    kind: Any = type(module)
    fitting: Any = _fitting(kind)
    if not fitting:
        return None
    found: Any = next((p for p in fitting if p.refusal(module) is None), fitting[0])
    return made(kind, found)


@functools.cache
def _fitting(kind: Any) -> tuple[type[Recognized], ...]:
    """The patterns that a class's own forward and further methods fit."""
    if "forward" not in vars(kind) or issubclass(kind, Replacement):
        return ()
    found = fingerprint(kind.forward)
    return tuple(pattern for pattern in PATTERNS if pattern.fits(kind, found))
