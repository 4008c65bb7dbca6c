"""Command line: options equal TOML keys, errors are one message, and the output is as documented."""

from __future__ import annotations

import dataclasses
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import fastgpt
from fastgpt.checkpoints.native import open_checkpoint
from fastgpt.cli import main
from fastgpt.data import DatasetWriter, Stream
from fastgpt.evaluation.perplexity import losses_by_position
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.text import generate_texts
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer
from fastgpt.training.config import TrainConfig

pytestmark = pytest.mark.xdist_group("cli")  # whose fixtures are made once

TEXT = "".join(f"for i in range({i}):\n    print(i * {i})\n" for i in range(300))
SMALL = {
    **{
        "n_layer": 1,
        "n_head": 2,
        "n_embd": 32,
        "block_size": 32,
        "batch_size": 4,
        "max_steps": 20,
        "lr": 1e-2,
    },
    **{"warmup_steps": 2, "eval_every": 10, "eval_batches": 2, "save_every": 10, "sample_tokens": 4},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a directory with text.txt, options.toml and a trained out/."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "text.txt").write_text(TEXT)
    lines = [f"{name} = {value}" for name, value in SMALL.items()]
    (directory / "options.toml").write_text("\n".join([f'data = "{directory / "text.txt"}"', *lines]))
    assert main(["train", "--config", str(directory / "options.toml"), "--out", str(directory / "out")]) == 0
    return directory


def fails(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run a failing command, and return the one line that it prints to stderr."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgpt: error: ") and error.endswith("\n") and error.count("\n") == 1
    assert "Traceback" not in error
    return error


def test_every_field_is_an_option_and_a_toml_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    other = {str: "data.txt", int: 2, float: 0.5, bool: False}
    special = {
        **{"preset": "nanochat", "norm": "rms", "n_kv_head": 1, "qk_norm": True},
        **{"position": "rotary", "activation": "relu", "dtype": "float32", "backend": "reference"},
        **{"packing": "documents", "optimizer": "muon", "schedule": "wsd", "parallel": "fsdp"},
        **{
            "checkpoint_activations": True,
            "patience": 3,
            "init_from": "",
            "task": "code",
            "skip_broken": True,
        },
        **{
            "n_head": 2,
            "n_embd": 8,
            "compile": True,
            "tensorboard": True,
            "resume": False,
            "max_minutes": 2.5,
            "lr": 0.7,
            "min_lr": 0.2,
        },
    }
    seen: list[TrainConfig] = []
    monkeypatch.setattr("fastgpt.training.trainer.train", lambda config, **_: seen.append(config))
    flags, toml = [], []
    for item in dataclasses.fields(TrainConfig):
        value = special[item.name] if item.name in special else other.get(type(item.default), 3)
        option = "--" + item.name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(option if value else "--no-" + option[2:])
        else:
            flags += [option, str(value)]
        toml.append(f"{item.name} = {json.dumps(value)}")
    (tmp_path / "all.toml").write_text("\n".join(toml))
    assert main(["train", *flags]) == 0
    assert main(["train", "--config", str(tmp_path / "all.toml")]) == 0
    assert main(["train", "--config", str(tmp_path / "all.toml"), "--n-layer", "9", "--bias"]) == 0
    assert main(["train"]) == 0
    by_flags, by_toml, overridden, default = seen
    assert by_flags == by_toml != default == TrainConfig()
    unchanged = [f.name for f in dataclasses.fields(TrainConfig) if getattr(by_flags, f.name) == f.default]
    assert unchanged == ["resume"]
    assert overridden == dataclasses.replace(by_toml, n_layer=9, bias=True)


def test_train_writes_what_the_other_commands_take(run: Path, capsys: pytest.CaptureFixture):
    assert open_checkpoint(run / "out").step == 20
    arguments = ["generate", "--checkpoint", str(run / "out"), "--prompt", "for i", "--max-new-tokens", "30"]
    assert main([*arguments, "--seed", "1"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("for i") and len(first.encode()) >= 35
    assert main([*arguments, "--seed", "1"]) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--seed", "2"]) == 0
    assert capsys.readouterr().out != first
    assert main([*arguments, "--temperature", "0", "--top-k", "3", "--top-p", "0.5"]) == 0
    assert capsys.readouterr().out.startswith("for i")


def test_generate_continues_a_prompt_longer_than_the_context(run: Path, capsys: pytest.CaptureFixture):
    prompt = "print(i) # größer\n" * 10
    assert (
        main(["generate", "--checkpoint", str(run / "out"), "--prompt", prompt, "--max-new-tokens", "5"]) == 0
    )
    assert capsys.readouterr().out.startswith(prompt)


def test_eval_prints_loss_perplexity_and_loss_by_position(
    run: Path, capsys: pytest.CaptureFixture, tmp_path: Path
):
    arguments = ["eval", "--checkpoint", str(run / "out"), "--data", str(run / "text.txt")]
    assert main([*arguments, "--json", "--plot", str(tmp_path / "plots" / "position.png")]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["perplexity"] == pytest.approx(math.exp(found["loss"]))
    assert found["tokens"] == len(TEXT) - 1
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2), rel=1e-3)
    assert [(b["first"], b["last"]) for b in found["positions"]] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
        (17, 32),
    ]
    mean = sum(b["loss"] * b["tokens"] for b in found["positions"]) / found["tokens"]
    assert mean == pytest.approx(found["loss"])
    assert found["positions"][0]["loss"] > found["positions"][-1]["loss"]
    assert (tmp_path / "plots" / "position.png").read_bytes().startswith(b"\x89PNG")

    assert main(arguments) == 0
    table = capsys.readouterr().out
    assert f"loss        {found['loss']:.4f}" in table and "perplexity" in table
    assert f"17-32        {found['positions'][-1]['loss']:.4f}" in table


DOCUMENTS = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 5) for i in range(60)]  # of 26 to 135 bytes


def prepared(directory: Path, tokenizer: Tokenizer) -> str:
    """Prepare DOCUMENTS as a data set; every eighth is held out."""
    with DatasetWriter(directory, tokenizer, seed=0) as writer:
        for i, text in enumerate(DOCUMENTS):
            writer.add("val" if i % 8 == 0 else "train", tokenizer.encode(text))
        writer.finish({})
    return str(directory)


def evaluated(capsys: pytest.CaptureFixture, *arguments: str) -> dict:
    capsys.readouterr()
    assert main(["eval", "--json", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("position", ["learned", "rotary"])
def test_eval_has_the_validation_loss_of_a_run_that_packed_documents(
    tmp_path: Path, capsys: pytest.CaptureFixture, position: str
):
    out, data = str(tmp_path / "out"), prepared(tmp_path / "set", ByteTokenizer())
    options = SMALL | {
        "eval_batches": 100,
        "dtype": "float32",
        "position": position,
        "data": data,
        "out": out,
    }
    assert main(["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]) == 0
    trained = json.loads((tmp_path / "out" / "log.jsonl").read_text().splitlines()[-1])["val_loss"]
    found = evaluated(capsys, "--checkpoint", out, "--data", data)
    assert found["packing"] == "documents" and found["loss"] == pytest.approx(trained, abs=1e-6)
    held_out = DOCUMENTS[::8]
    assert found["tokens"] == sum(map(len, held_out))  # the end of text is a target
    assert found["bits_per_byte"] == pytest.approx(found["loss"] / math.log(2))
    # Longer documents than a block are cut; each piece begins at the first position.
    pieces = [min(32, len(text) - start) for text in held_out for start in range(0, len(text), 32)]
    counts = [sum(n > place for n in pieces) for place in range(32)]
    buckets = [(b["first"], b["last"], b["tokens"]) for b in found["positions"]]
    assert buckets == [(first, last, sum(counts[first - 1 : last])) for first, last, _ in buckets]
    assert main(["eval", "--checkpoint", out, "--data", data]) == 0
    assert "read as     packed documents\n" in capsys.readouterr().out

    stream = evaluated(capsys, "--checkpoint", out, "--data", data, "--packing", "stream")
    assert stream["packing"] == "stream" and stream["tokens"] == found["tokens"] + len(held_out) - 1
    assert stream["loss"] != pytest.approx(found["loss"], abs=1e-4)


def test_eval_reads_a_text_as_the_run_did(tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "text").mkdir()
    for i, text in enumerate(DOCUMENTS[:8]):
        (tmp_path / "text" / f"{i}.py").write_text(text)
    data = ["--data", str(tmp_path / "text")]
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    size = sum(map(len, DOCUMENTS[:8]))
    for packing, tokens in (("documents", size), ("stream", size - 1), ("auto", size - 1)):
        out = str(tmp_path / packing)
        assert main(["train", *data, "--out", out, "--packing", packing, *small, "--max-steps=1"]) == 0
        assert evaluated(capsys, "--checkpoint", out, *data)["tokens"] == tokens
    found = evaluated(capsys, "--checkpoint", out, *data, "--packing", "documents")
    assert found["tokens"] == size
    for place in ([], ["--task", "answer"]):
        assert "omit" in fails(
            ["eval", "--checkpoint", out, *data, "--packing=stream", *(place or ["--in-context"])], capsys
        )


def test_eval_reads_a_dataset_of_other_tokens_by_its_text(tmp_path: Path, capsys: pytest.CaptureFixture):
    out, bpe = str(tmp_path / "out"), BPETokenizer.train(DOCUMENTS, 300)
    own, other = (
        prepared(tmp_path / name, tokenizer) for name, tokenizer in (("own", ByteTokenizer()), ("bpe", bpe))
    )
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    assert main(["train", "--data", own, "--out", out, *small, "--max-steps=1"]) == 0
    for packing in ("documents", "stream"):
        options = ["--checkpoint", out, "--packing", packing]
        assert evaluated(capsys, *options, "--data", own) == evaluated(capsys, *options, "--data", other)


def test_losses_by_position_are_those_of_the_logits():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=11, block_size=8, n_layer=1, n_head=1, n_embd=16)).eval()
    tokens = torch.randint(11, (8 * 3 + 4,))
    sums, counts = losses_by_position(model, Stream(tokens, batch_size=2, block_size=8).sequential())
    assert counts.tolist() == [4.0] * 3 + [3.0] * 5
    expected = torch.zeros(8, dtype=torch.float64)
    for start in range(0, 27, 8):
        x, y = tokens[start : start + 8][: 27 - start], tokens[start + 1 : start + 9]
        loss = torch.nn.functional.cross_entropy(model(x[None])[0][0], y, reduction="none")
        expected[: len(x)] += loss.detach().double()
    torch.testing.assert_close(sums, expected, rtol=1e-4, atol=1e-4)


def test_errors_are_one_sentence_and_status_2(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    out, absent = str(run / "out"), str(tmp_path / "absent")
    toml = tmp_path / "bad.toml"
    assert "there is no file or directory" in fails(["train", "--data", absent, "--out", absent], capsys)
    assert "pass --resume" in fails(["train", "--config", str(run / "options.toml"), "--out", out], capsys)
    assert "found nothing to continue" in fails(["train", "--resume", "--out", absent], capsys)
    assert "n_embd=384 is not divisible by n_head=7" in fails(["train", "--n-head", "7"], capsys)
    assert "batch_size must be at least 1" in fails(["train", "--batch-size", "0"], capsys)
    assert "min_lr=1.0 must not be above lr" in fails(["train", "--min-lr", "1"], capsys)
    assert "No such file" in fails(["train", "--config", absent], capsys)
    toml.write_text("n_layers = 3")
    assert "no option 'n_layers'; did you mean 'n_layer'?" in fails(["train", "--config", str(toml)], capsys)
    toml.write_text('n_layer = "3"')
    assert "n_layer must be of type int, not '3'" in fails(["train", "--config", str(toml)], capsys)
    toml.write_text("n_layer = ")
    assert "is not a TOML file" in fails(["train", "--config", str(toml)], capsys)
    assert "checkpoint directory" in fails(["generate", "--checkpoint", absent], capsys)
    assert "prompt is empty" in fails(["generate", "--checkpoint", out, "--prompt", ""], capsys)
    assert "top_k" in fails(["generate", "--checkpoint", out, "--top-k", "-1"], capsys)
    assert "does not exist" in fails(["eval", "--checkpoint", out, "--data", absent], capsys)
    (tmp_path / "short").write_text("a")
    assert "at least two" in fails(["eval", "--checkpoint", out, "--data", str(tmp_path / "short")], capsys)
    assert "device 'tpu9'" in fails(["generate", "--checkpoint", out, "--device", "tpu9"], capsys)
    if not torch.cuda.is_available():
        assert "cuda" in fails(["generate", "--checkpoint", out, "--backend", "cuda"], capsys)


def test_a_file_where_the_output_should_go_is_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "file").touch()
    arguments = ["train", "--config", str(run / "options.toml"), "--out", str(tmp_path / "file")]
    assert f"{tmp_path / 'file'}: " in fails(arguments, capsys)


def test_python_m_fastgpt_is_the_command(tmp_path: Path):
    def command(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [sys.executable, "-m", "fastgpt", *arguments], capture_output=True, text=True, check=False
        )

    assert command("--version").stdout == f"fastgpt {fastgpt.__version__}\n"
    failed = command("generate", "--checkpoint", str(tmp_path))
    assert failed.returncode == 2 and failed.stdout == ""
    assert failed.stderr == f"fastgpt: error: {tmp_path} contains no checkpoint\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--data=stdlib", "--batch-size=1000000000000"], "batch_size must be at most 1,048,576"),
        (
            ["train", "--data=stdlib", "--vocab-size=1000000000000"],
            "vocab_size must be at least 1 and at most 16,777,216",
        ),
        (["train", "--data=stdlib", "--eval-batches=1000000000"], "eval_batches must be at most"),
        (["train", "--data=stdlib", "--sample-tokens=1000000000"], "sample_tokens must be at most"),
        (["train", "--data=stdlib", f"--max-steps={10**30}"], "max_steps must be at most"),
        (["data", "stdlib", "--vocab-size=1000000000000"], "vocab_size must be at most 16,777,216"),
        (["generate", "--max-new-tokens=1000000000000"], "max_new_tokens must be at most 16,777,216"),
        (["generate", "--batch-size=1000000000"], "batch_size must be at most 65,536"),
        (["generate", "--temperature=1e-300"], "temperature must be 0 or from"),
    ],
)
def test_numbers_without_a_bound_are_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture
):
    if arguments[0] == "generate":
        GPT(GPTConfig(256, 8, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "m", ByteTokenizer())
        arguments = [*arguments, "--checkpoint", str(tmp_path / "m")]
    else:
        arguments = [*arguments, "--out", str(tmp_path / "out")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"fastgpt: error: {message}") and error.count("\n") == 1


def test_samples_without_number_are_made_as_they_are_read(tmp_path: Path):
    GPT(GPTConfig(256, 8, n_layer=1, n_head=1, n_embd=8)).save_pretrained(tmp_path / "m", ByteTokenizer())
    texts = generate_texts(tmp_path / "m", ["a", "b"], 2, Sampling(), num_samples=10**12, batch_size=3)
    assert [next(texts).sample for _ in range(7)] == [*range(1, 8)]


@pytest.mark.parametrize(
    "fail",
    [
        lambda: bytearray(1 << 62),
        lambda: np.empty(1 << 58),
        lambda: torch.empty(1 << 55),
        lambda: torch.empty(1 << 40, 1 << 40),
    ],
)
def test_memory_that_there_is_not_is_one_message(
    fail: Callable[[], object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    monkeypatch.setattr("fastgpt.env_report.main", lambda **_: fail())
    assert main(["info"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgpt: error: out of memory; ") and error.count("\n") == 1


def test_another_runtime_error_is_no_message(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("fastgpt.env_report.main", lambda **_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):
        main(["info"])
