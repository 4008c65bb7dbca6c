"""Bootstrap confidence intervals (Efron 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

RESAMPLES = 1000
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A value and the ends of its 95% confidence interval."""

    value: float
    low: float
    high: float


def resampled_sums(statistics: Floats) -> Floats:
    """Sum the rows of statistics (n, k), and of RESAMPLES reproducible resamples: (1 + RESAMPLES, k)."""
    n, rng = len(statistics), np.random.default_rng(0)
    counts = [np.ones(n, np.int64)]
    counts += [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(RESAMPLES)]
    return np.array([count @ statistics for count in counts])


def estimates(values: Floats) -> list[Estimate]:
    """Return the estimate of each column of values (1 + RESAMPLES, k): the value in row 0, then its resamples."""
    low, high = np.quantile(values[1:], (0.025, 0.975), axis=0)
    return [Estimate(*map(float, found)) for found in zip(values[0], low, high, strict=True)]


def mean(sample: ArrayLike) -> Estimate:
    """Return the mean of a sample (n,) and its interval."""
    column = np.asarray(sample, np.float64)[:, None]
    return estimates(resampled_sums(column) / len(column))[0]
