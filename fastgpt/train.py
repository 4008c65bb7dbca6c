"""Deprecated: import `fastgpt.training.trainer` instead. This module will be removed in the next release."""

import warnings

from fastgpt.training.trainer import TrainResult, train

__all__ = ["TrainResult", "train"]

warnings.warn("fastgpt.train moved to fastgpt.training.trainer", FutureWarning, stacklevel=2)
