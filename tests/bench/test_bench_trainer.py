"""`python -m bench trainer`: every contender is timed, and both batches have the same documents."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.training.trainer import COMPARISONS, SIZES, _documents, measure, table


@pytest.mark.slow
def test_every_contender_is_timed(tmp_path: Path):
    result = measure(str(tmp_path), SIZES["tiny"], 2)
    logged = (tmp_path / "log.jsonl").read_text().splitlines()
    assert [(r["step"], r["train_loss"] > 0) for r in map(json.loads, logged)] == [
        (1, True),
        (2, True),
        (3, True),
    ]
    names = {name for pair in COMPARISONS.values() for name in pair}
    assert result["tokens_per_second"].keys() == names
    assert all(len(speeds) == 2 and min(speeds) > 0 for speeds in result["tokens_per_second"].values())
    assert table(result).count(" of ") == len(COMPARISONS)


@pytest.mark.slow
def test_packed_and_padded_batches_are_of_the_same_documents():
    packed, padded = _documents(SIZES["cpu"], 4)
    assert sum(batch.num_targets for batch in packed) > 0.95 * sum(batch.targets.numel() for batch in packed)
    assert all(batch.num_targets < batch.targets.numel() for batch in padded)
    assert all(batch.cu_seqlens is None and batch.idx.shape[0] == 8 for batch in padded)
