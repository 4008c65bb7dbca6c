"""Deprecated: import `fastgpt.generation.text` instead. This module will be removed in the next release."""

import warnings

from fastgpt.generation.text import generate, generate_texts

__all__ = ["generate", "generate_texts"]

warnings.warn("fastgpt.generate moved to fastgpt.generation.text", FutureWarning, stacklevel=2)
