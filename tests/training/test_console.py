"""Output of the commands on streams of any encoding; a closed stream ends them without a traceback."""

from __future__ import annotations

import io
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fastgpt import console
from fastgpt.cli import main
from fastgpt.json_io import dumps
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import ByteTokenizer

TINY = {"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "eval_batches": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model with random weights, whose texts contain non-ASCII characters, and a text file."""
    directory = tmp_path_factory.mktemp("console")
    small = GPTConfig(256, block_size=32, n_layer=1, n_head=2, n_embd=32)
    GPT(small).save_pretrained(directory / "model", ByteTokenizer())
    (directory / "text.txt").write_text("café 😀 “naïve” שלום\n" * 100, "utf-8")
    return directory


def commands(model: Path, out: Path) -> dict[str, list[str]]:
    """Return the arguments of every command that prints."""
    text, checkpoint = str(model / "text.txt"), str(model / "model")
    generate = ["generate", "--checkpoint", checkpoint, "--prompt", "café 😀", "--max-new-tokens", "9"]
    data = ["data", text, "--tokenizer", "bytes", "--repetition", "keep"]
    return {
        "help": ["--help"],
        "version": ["--version"],
        "info": ["info"],
        "generate": generate,
        "generate --json": [*generate, "--json"],
        "generate of several": [*generate, "--num-samples", "3", "--batch-size", "1"],
        "eval": ["eval", "--checkpoint", checkpoint, "--data", text],
        "eval --json": ["eval", "--checkpoint", checkpoint, "--data", text, "--json"],
        "data": [*data, "--out", str(out / "a")],
        "data --json": [*data, "--out", str(out / "b"), "--json"],
    }


NAMES = list(commands(Path(), Path()))


class Stream(io.TextIOWrapper):
    """Replacement of stdout, over a buffer or a descriptor."""


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch, stdout: io.TextIOBase) -> int:
    monkeypatch.setattr(sys, "stdout", stdout)
    try:
        return main(arguments)
    except SystemExit as end:  # of argparse
        return int(end.code or 0)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
@pytest.mark.parametrize("name", NAMES)
def test_any_encoding_of_the_output_will_do(
    name: str, encoding: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    written = io.BytesIO()
    assert run(commands(model, tmp_path)[name], monkeypatch, Stream(written, encoding)) == 0
    text = written.getvalue().decode(encoding)
    if "--json" in name:
        found = json.loads(text)
        assert found.get("prompt", "café 😀") == "café 😀"
    elif name == "generate":
        assert text.startswith("caf\\xe9 \\U0001f600" if encoding == "ascii" else "café \\U0001f600")


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("name", NAMES)
def test_a_reader_that_goes_away_ends_a_command_quietly(
    name: str,
    buffered: bool,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture,
):
    reader, writer = os.pipe()
    os.close(reader)
    raw = os.fdopen(writer, "wb", buffering=-1 if buffered else 0)
    with Stream(raw, "utf-8", write_through=not buffered) as stdout:
        status = run(commands(model, tmp_path)[name], monkeypatch, stdout)
    # argparse of Python 3.11 takes no notice of a write that fails, and an unbuffered stream keeps nothing of it.
    assert status == console.READER_GONE or (not buffered and name in ("help", "version") and status == 0)
    assert capfd.readouterr().err == ""
    if name == "data":
        assert (tmp_path / "a" / "dataset.json").exists()


def test_a_full_disk_is_an_error(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture):
    with open("/dev/full", "w", encoding="utf-8") as stdout:
        assert run(["info"], monkeypatch, stdout) == 2
        assert capfd.readouterr().err == "fastgpt: error: standard output: No space left on device\n"


def test_a_broken_pipe_of_something_else_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    def broken(**_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe", "socket")

    monkeypatch.setattr("fastgpt.env_report.main", broken)
    assert main(["info"]) == 2
    assert capsys.readouterr().err == "fastgpt: error: socket: Broken pipe\n"


def test_json_has_null_for_what_is_no_number():
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": math.nan, "d": "NaN"}, "e": 10**400}
    text = dumps(value)
    assert json.loads(text, parse_constant=pytest.fail) == {
        **{"a": [1.5, None, [None, None]], "b": {"c": None, "d": "NaN"}, "e": 10**400}
    }


def flags(model: Path, out: Path, **options: object) -> list[str]:
    given = TINY | {"data": model / "text.txt", "out": out, "log_every": 1, "sample_tokens": 0} | options
    words = [word for k, v in given.items() for word in (f"--{k.replace('_', '-')}", str(v))]
    return [sys.executable, "-m", "fastgpt", "train", *words]


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("step-*"))


def test_a_run_whose_reader_goes_away_saves_and_ends(model: Path, tmp_path: Path):
    command = flags(model, tmp_path / "out", max_steps=100_000)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.readline()
        process.stdout.close()
        assert process.wait(60) == 0 and process.stderr.read() == ""
    assert saved(tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("closed", ["2>&-", ">&-", "<&- >&- 2>&-"])
def test_a_run_with_closed_streams_goes_to_its_end(model: Path, tmp_path: Path, closed: str):
    command = " ".join(flags(model, tmp_path / "out", max_steps=3, sample_tokens=4))
    done = subprocess.run(["bash", "-c", f"{command} {closed}"], check=False, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert saved(tmp_path / "out") == ["step-00000003"]
    records = [json.loads(line) for line in (tmp_path / "out" / "log.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if "train_loss" in r] == [1, 2, 3]


@pytest.mark.slow
def test_a_run_whose_terminal_is_closed_saves_and_ends(model: Path, tmp_path: Path):
    """On a closed terminal SIGHUP arrives, and writing fails with EIO."""
    ours, theirs = os.openpty()
    command = flags(model, tmp_path / "out", max_steps=100_000)
    # setsid and an open of the terminal make it the controlling one, so that closing it sends SIGHUP.
    start = f"import os, sys; os.setsid(); t = os.open({os.ttyname(theirs)!r}, os.O_RDWR)\n"
    start += f"[os.dup2(t, n) for n in (0, 1, 2)]; os.execv(sys.executable, {command!r})"
    process = subprocess.Popen([sys.executable, "-c", start])
    try:
        read = b""
        while b"step 3/" not in read:
            read += os.read(ours, 4096)
        os.close(theirs)
        os.close(ours)
        assert process.wait(60) == 0
    finally:
        process.kill()
    assert saved(tmp_path / "out")


@pytest.mark.slow
def test_a_full_disk_under_stdout_does_not_end_a_run(model: Path, tmp_path: Path):
    with open("/dev/full", "w") as full:
        command = flags(model, tmp_path / "out", max_steps=3)
        done = subprocess.run(command, check=False, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 0 and saved(tmp_path / "out") == ["step-00000003"]
    assert done.stderr.count("\n") == 1 and "fastgpt: warning: the output could not be written" in done.stderr
