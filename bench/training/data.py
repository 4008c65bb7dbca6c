"""Speed and memory of `fastgpt data`: `python -m bench data`.

The text is the source of the standard library. The timed contenders are the preparation, from files to token shards,
and the package tokenizers alone, which encodes the same documents from memory; they alternate. The peak memory is that
of a process that prepares the text once, and of a process that prepares ten different copies of it.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastgpt.data import PrepareConfig, Report, prepare
from fastgpt.data.sources import END_OF_TEXT, Sources
from fastgpt.tokenizer import BPETokenizer, load_tokenizer

COPIES = 10


def run(rounds: int, as_json: bool) -> int:
    """Measure, print a table or one JSON object, and return 0."""
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder), rounds)
    print(json.dumps(result) if as_json else table(result))
    return 0


def measure(folder: Path, rounds: int, source: str = "stdlib") -> dict[str, Any]:
    """Measure speed and memory of the preparation of `source`.

    Args:
        folder: directory for temporary files.

    Returns:
        {"bytes": size of the text, "seconds" and "cpu_seconds" (all threads): {contender: [value of each round]},
        "peak_bytes": {number of copies: peak memory of the process}}.
    """
    learned = str(folder / "learned")
    prepare([source], PrepareConfig(learned))
    tokenizer = load_tokenizer(Path(learned))
    assert isinstance(tokenizer, BPETokenizer)
    texts = [text for text, _ in Sources([source], "text", END_OF_TEXT, False, Report("")).documents()]
    timed = str(folder / "timed")
    contenders: dict[str, Callable[[], Any]] = {
        "tokenizers alone": lambda: tokenizer.engine.encode_batch_fast(texts, add_special_tokens=False),
        "fastgpt data": lambda: prepare([source], PrepareConfig(timed, tokenizer=learned, overwrite=True)),
        "fastgpt data, near duplicates": lambda: prepare(
            [source], PrepareConfig(timed, tokenizer=learned, overwrite=True, near_duplicates=0.8)
        ),
        "fastgpt data, bytes": lambda: prepare(
            [source], PrepareConfig(timed, tokenizer="bytes", overwrite=True)
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    cpu_seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            started, cpu_started = time.perf_counter(), time.process_time()
            call()
            seconds[name].append(time.perf_counter() - started)
            cpu_seconds[name].append(time.process_time() - cpu_started)
    peaks = {copies: _peak(folder, texts, copies, learned) for copies in (1, COPIES)}
    size = sum(len(text.encode()) for text in texts)
    return {"bytes": size, "seconds": seconds, "cpu_seconds": cpu_seconds, "peak_bytes": peaks}


def _peak(folder: Path, texts: list[str], copies: int, tokenizer: str) -> int:
    """Return the peak resident memory, in bytes, of a process that prepares `copies` different copies of the text."""
    source = folder / f"{copies}.jsonl"
    with source.open("w") as file:
        for copy in range(copies):
            file.writelines(json.dumps({"text": f"{copy}\n{text}"}) + "\n" for text in texts)
    command = [sys.executable, "-m", "fastgpt", "data", str(source), "--tokenizer", tokenizer]
    process = subprocess.Popen([*command, "--out", str(folder / f"{copies}")], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise ValueError(f"fastgpt data failed on {copies} copies of the text. See its output above.")
    return usage.ru_maxrss * 1024


def table(result: dict[str, Any]) -> str:
    """Format the medians as text; a ratio is the median of the ratios of the rounds."""
    rounds = len(result["seconds"]["tokenizers alone"])
    lines = [f"{result['bytes'] / 1e6:.1f} MB of text, {rounds} rounds; ratios to tokenizers alone"]
    for name, seconds in result["seconds"].items():
        time_ratio, cpu_ratio = (
            statistics.median(a / b for a, b in zip(of[name], of["tokenizers alone"], strict=True))
            for of in (result["seconds"], result["cpu_seconds"])
        )
        speed = result["bytes"] / 1e6 / statistics.median(seconds)
        lines.append(f"  {name:<32}{speed:>7.2f} MB/s, time {time_ratio:5.2f}×, CPU time {cpu_ratio:5.2f}×")
    for copies, peak in result["peak_bytes"].items():
        size = copies * result["bytes"] / 1e6
        lines.append(f"  peak memory for {size:>6.1f} MB       {peak / 2**20:>7.0f} MiB")
    return "\n".join(lines)
