"""Validation losses of a run, for early stopping."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class ValidationHistory:
    """The last and the best validation loss, and the number of validations since the best."""

    step: int = -1
    loss: float = math.inf
    best_step: int = -1
    best_loss: float = math.inf
    since_best: int = 0

    def add(self, step: int, loss: float) -> None:
        self.step, self.loss, self.since_best = step, loss, self.since_best + 1
        if loss < self.best_loss:
            self.best_step, self.best_loss, self.since_best = step, loss, 0
