"""Terminals: model output and file names cannot send control characters; pipes and files get them unmodified."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastgpt import console
from fastgpt.cli import main
from fastgpt.console import Progress
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import ByteTokenizer

EVIL = "\x1b]52;c;aGk=\a\x9b2J\x7f\r\u202egpj.exe\u2066"
SHOWN = "\\x1b]52;c;aGk=\\x07\\x9b2J\\x7f\\r\\u202egpj.exe\\u2066"


class Stream(io.TextIOWrapper):
    """Terminal or pipe that records what is written."""

    def __init__(self, terminal: bool) -> None:
        self.terminal = terminal
        super().__init__(io.BytesIO(), "utf-8", newline="")

    def isatty(self) -> bool:
        return self.terminal

    @property
    def text(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode()


@pytest.fixture(params=[True, False], ids=["terminal", "pipe"])
def streams(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[Stream]]:
    """Replace stdout and stderr; to be called inside a test, because pytest replaces them before it."""

    def replaced() -> list[Stream]:
        made = [Stream(request.param), Stream(request.param)]
        for name, stream in zip(("stdout", "stderr"), made, strict=True):
            monkeypatch.setattr(sys, name, stream)
        return made

    return replaced


def shown(text: str, stream: Stream) -> str:
    """Return the expected text on a stream."""
    for evil, harmless in ((EVIL, SHOWN), ("\x1b", "\\x1b")) if stream.terminal else ():
        text = text.replace(evil, harmless)
    return text


@pytest.fixture(scope="module")
def escaping(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a model that writes only ESC."""
    model = GPT(GPTConfig(256, block_size=32, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.ln_f.bias.fill_(1)
        model.wte.weight[27] += 5
    directory = tmp_path_factory.mktemp("escaping") / "model"
    model.save_pretrained(directory, ByteTokenizer())
    return str(directory)


def test_generated_text(streams: Callable[[], list[Stream]], escaping: str):
    out, _ = streams()
    generate = [
        "generate",
        "--checkpoint",
        escaping,
        "--prompt",
        "x\t",
        "--max-new-tokens",
        "3",
        "--seed",
        "0",
    ]
    assert main([*generate, "--temperature", "0"]) == 0
    assert out.text == shown("x\t\x1b\x1b\x1b\n", out)
    assert main([*generate, "--num-samples", "2", "--temperature", "0"]) == 0
    assert out.text.count(shown("\x1b" * 3, out)) == 3
    assert main([*generate, "--task", "answer", "--temperature", "0"]) == 0
    assert out.text.endswith(shown("\n\x1b\x1b\x1b\n", out))


def test_json_stays_json(streams: Callable[[], list[Stream]]):
    out, _ = streams()
    console.print_json({"text": EVIL + "é\n\t"})
    assert json.loads(out.text) == {"text": EVIL + "é\n\t"} and "é" in out.text
    assert ("\x9b" in out.text) != out.terminal


def test_answers_in_a_table(streams: Callable[[], list[Stream]], escaping: str, tmp_path: Path):
    out, _ = streams()
    (tmp_path / "a.jsonl").write_text('{"input": "a", "output": "b"}\n')
    task = ["--task", "answer", "--data", str(tmp_path / "a.jsonl"), "--max-new-tokens", "2"]
    assert main(["eval", "--checkpoint", escaping, *task]) == 0
    assert out.text.endswith(shown("got       \x1b\x1b\n", out))


def test_the_sample_of_a_run(streams: Callable[[], list[Stream]], escaping: str, tmp_path: Path):
    out, _ = streams()
    (tmp_path / "a.txt").write_text("text " * 100)
    run = ["--lr=0", "--min-lr=0", "--max-steps=1", "--eval-batches=1", "--sample-tokens=3", "--device=cpu"]
    arguments = [f"--init-from={escaping}", f"--data={tmp_path / 'a.txt'}", f"--out={tmp_path / 'out'}", *run]
    assert main(["train", *arguments]) == 0
    assert shown("--- sample ---\n\x1b\x1b\x1b\n", out) in out.text
    assert (tmp_path / "out" / "sample.txt").read_text() == "\n\x1b\x1b\x1b"


def test_names_of_files_in_errors_notes_and_reports(streams: Callable[[], list[Stream]], tmp_path: Path):
    out, err = streams()
    assert main(["eval", "--checkpoint", f"./{EVIL}", "--data", "stdlib"]) == 2
    assert shown(f"./{EVIL}", err).replace("\r", " ").replace("\\r", " ") in err.text
    (tmp_path / "a.txt").write_text("text " * 100)
    (tmp_path / f"{EVIL.replace('/', '')}.png").write_bytes(b"\0")
    assert (
        main(["data", str(tmp_path), f"--out={tmp_path}-set", "--tokenizer=bytes", "--repetition=keep"]) == 0
    )
    assert shown(f"{EVIL}.png: not UTF-8 text", out) in out.text
    assert console.run_command(lambda: console.note(EVIL) or 0) == 0
    assert shown(f"fastgpt: note: {EVIL}\n", err) in err.text


def test_lines_and_warnings_beside_a_progress_bar(streams: Callable[[], list[Stream]]):
    out, err = streams()
    progress = Progress(total=2)
    progress.line(EVIL)
    progress.warn_once("subject", EVIL)
    progress.close()
    assert out.text == shown(f"{EVIL}\n", out)
    assert shown(f"fastgpt: warning: {EVIL}\n", err) in err.text


def test_ordinary_text_is_shown_as_it_is(streams: Callable[[], list[Stream]]):
    out, _ = streams()
    text = "a\tb\n\u200fשלום\u200e नमस्ते\u200d 👩‍👩‍👧 \u00a0\u00ad\ufeff\u2028 \\x1b"
    console.show(text)
    assert out.text == text + "\n"


def test_a_stream_that_does_not_say_what_it_is(monkeypatch: pytest.MonkeyPatch):
    written: list[str] = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=written.append, flush=lambda: None))
    console.show(EVIL)
    monkeypatch.setattr(sys, "stdout", None)
    console.show(EVIL)
    assert "".join(written) == EVIL + "\n"
