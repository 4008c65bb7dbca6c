"""Deprecated: import `fastgpt.training.config` instead. This module will be removed in the next release."""

import warnings

from fastgpt.training.config import TrainConfig, read_toml

__all__ = ["TrainConfig", "read_toml"]

warnings.warn("fastgpt.config moved to fastgpt.training.config", FutureWarning, stacklevel=2)
