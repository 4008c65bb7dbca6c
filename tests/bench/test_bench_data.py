"""`python -m bench data`: every contender has times, and both sizes have a peak memory."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench.training.data import measure, table


@pytest.mark.slow
def test_every_contender_is_timed_and_both_sizes_have_a_peak(tmp_path: Path):
    source = tmp_path / "source"
    source.mkdir()
    for i in range(20):
        (source / f"{i}.txt").write_text(f"document {i}\n" + " ".join(f"word{i * j}" for j in range(200)))
    result = measure(tmp_path, 2, str(source))
    assert result["bytes"] == sum(file.stat().st_size for file in source.iterdir())
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in result["seconds"].values())
    assert result["seconds"].keys() == result["cpu_seconds"].keys() >= {"tokenizers alone", "fastgpt data"}
    assert set(result["peak_bytes"]) == {1, 10} and min(result["peak_bytes"].values()) > 1 << 26
    assert table(result).count("MB/s") == 4 and table(result).count("peak memory") == 2
