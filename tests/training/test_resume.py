"""Messages of a resumed run: intact checkpoints, changed options, and launcher misconfiguration."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from fastgpt import distributed
from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.native import CheckpointError, open_checkpoint
from fastgpt.cli import main
from fastgpt.training.config import TrainConfig
from fastgpt.training.initialize import config_from
from fastgpt.training.trainer import train


@pytest.fixture
def options(tmp_path: Path) -> dict:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(300)))
    return {
        **{"data": str(tmp_path / "text.txt"), "out": str(tmp_path / "out"), "n_layer": 1, "n_head": 2},
        **{"n_embd": 32, "block_size": 32, "batch_size": 4, "max_steps": 4, "eval_batches": 1},
        **{"warmup_steps": 1, "save_every": 2, "sample_tokens": 0, "log_every": 1},
    }


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "tokenizer.json"])
def test_a_damaged_checkpoint_names_the_newest_whole_one(
    options: dict, file: str, capsys: pytest.CaptureFixture
):
    train(TrainConfig().override(options))
    out = Path(options["out"])
    older, newest = checkpoint.steps(out)
    (newest / file).write_bytes(b"{")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    intact = f"{older} is intact; to use it, move {newest} away, or give {older}"
    with pytest.raises(CheckpointError, match=f"--resume cannot continue {out}: .*{intact}"):
        config_from({"out": str(out), "resume": True})
    assert main(["generate", "--checkpoint", str(out)]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and intact in error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert main(["generate", "--checkpoint", str(older), "--max-new-tokens", "1"]) == 0
    newest.rename(out.parent / "aside")
    assert train(config_from({"out": str(out), "resume": True})).step == 4


def test_no_whole_checkpoint_is_promised_where_there_is_none(options: dict):
    train(TrainConfig().override(options))
    for path in checkpoint.steps(Path(options["out"])):
        (path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"lacks model.safetensors; no older checkpoint is intact"):
        open_checkpoint(options["out"])


@pytest.mark.parametrize(
    ("change", "notes"),
    [
        ({}, []),
        (
            {"max_steps": 6, "eval_every": 2, "save_every": 3, "log_every": 9, "sample_tokens": 1},
            ["max_steps 4 -> 6"],
        ),
        ({"batch_size": 8, "grad_accum": 2}, ["batch_size 4 -> 8, grad_accum 1 -> 2: later batches"]),
        (
            {"lr": 2e-3, "max_steps": 9},
            ["max_steps 4 -> 9, lr 0.001 -> 0.002: the learning rate changes from"],
        ),
        (
            {"schedule": "wsd", "decay_steps": 1, "max_steps": 6},
            ["schedule cosine -> wsd, decay_steps 200 -> 1"],
        ),
        (
            {"weight_decay": 0.0, "dropout": 0.1, "optimizer": "adam"},
            ["optimizer adamw -> adam, weight_decay 0.1 -> 0.0"],
        ),
        (
            {"batch_size": 2, "seed": 1, "z_loss": 1e-3},
            ["seed 1337 -> 1", "z_loss 0.0 -> 0.001: later updates"],
        ),
    ],
)
def test_what_a_resumed_run_changes_is_noted(
    options: dict, change: dict, notes: list[str], capfd: pytest.CaptureFixture
):
    train(TrainConfig().override(options | {"max_minutes": 1e-9}))  # one step
    capfd.readouterr()
    train(config_from({"out": options["out"], "resume": True, "max_minutes": 10.0, **change}))
    printed = [line for line in capfd.readouterr().out.splitlines() if line.startswith("note: ")]
    assert len(printed) == len(notes)
    for line, note in zip(printed, notes, strict=True):
        assert note in line


def test_the_noted_learning_rate_is_the_one_that_is_used(options: dict, capfd: pytest.CaptureFixture):
    train(TrainConfig().override(options))
    train(config_from({"out": options["out"], "resume": True, "max_steps": 40}))
    printed = capfd.readouterr().out
    (note,) = (line for line in printed.splitlines() if line.startswith("note: "))
    (first,) = (line for line in printed.splitlines() if line.startswith("step 5/40"))
    assert f"to {first.partition('  lr ')[2].split()[0]} at step 4" in note


@pytest.mark.parametrize("max_steps", [3, 4])
def test_nothing_to_train_is_noted_and_the_options_of_the_run_stay(
    options: dict, max_steps: int, capfd: pytest.CaptureFixture
):
    train(TrainConfig().override(options))
    before = (Path(options["out"]) / "config.toml").read_text()
    assert train(config_from({"out": options["out"], "resume": True, "max_steps": max_steps})).step == 4
    assert (
        f"note: max_steps {max_steps} is reached at step 4: nothing is left to train"
        in capfd.readouterr().out
    )
    assert (Path(options["out"]) / "config.toml").read_text() == before


GOOD = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": ""}, "RANK is empty"),
        ({"RANK": " ", "WORLD_SIZE": ""}, "RANK is empty"),
        ({"WORLD_SIZE": None}, "RANK is set, but WORLD_SIZE is not"),
        ({"RANK": None}, "WORLD_SIZE is set, but RANK is not"),
        ({"RANK": "one"}, "RANK is 'one', which is not an integer"),
        ({"WORLD_SIZE": "2.0"}, r"WORLD_SIZE is '2\.0', which is not an integer"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE is 1: ranks count from 0"),
        ({"RANK": "-1"}, "RANK is -1 and WORLD_SIZE is 1"),
        ({"WORLD_SIZE": "0"}, "RANK is 0 and WORLD_SIZE is 0"),
        ({"MASTER_ADDR": None}, "RANK is set, but MASTER_ADDR is not"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is empty"),
        ({"MASTER_PORT": None}, "RANK is set, but MASTER_PORT is not"),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http', which is not an integer"),
        ({"MASTER_PORT": "65536"}, "MASTER_PORT is 65536: a port is below 65536"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "TORCHELASTIC_RESTART_COUNT is 'x'"),
    ],
)
def test_what_a_launcher_set_wrong_is_named(
    options: dict, change: dict, message: str, monkeypatch: pytest.MonkeyPatch
):
    for name, value in (GOOD | change).items():
        monkeypatch.setenv(name, value) if value is not None else monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=f"^{message}"):
        train(config_from(options))
    assert not Path(options["out"]).exists()


@pytest.mark.parametrize("world", ["1", "2"])
def test_a_port_in_use_is_named(
    options: dict, world: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for name, value in (GOOD | {"WORLD_SIZE": world, "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        assert (
            main(["train", *(f"--{name.replace('_', '-')}={value}" for name, value in options.items())]) == 2
        )
    error = capfd.readouterr().err
    assert f"fastgpt: error: port {port} (MASTER_PORT) is in use on this machine" in error
    assert "Traceback" not in error and "gone" not in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("The server socket has failed to listen: EADDRINUSE", "port 7 .* is in use"),
        ("bind failed: Permission denied", "port 7 .* above 1023"),
        ("gai error: -2 - Name or service not known", "MASTER_ADDR is 'there', which is not the name"),
        (
            "Timed out after 601 seconds waiting for clients. 1/2 clients joined.",
            "the 2 processes .* did not meet at there:7",
        ),
        ("something else", None),
    ],
)
def test_the_cause_of_processes_that_do_not_meet(
    text: str, message: str | None, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("MASTER_ADDR", "there")
    monkeypatch.setenv("MASTER_PORT", "7")
    with (
        pytest.raises(RuntimeError if message is None else OSError, match=message),
        distributed._naming_the_cause(2),
    ):
        raise RuntimeError(text)


def test_a_gpu_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_RANK", "1")
    with pytest.raises(
        ValueError, match="LOCAL_RANK is 1 and this machine has 1 GPUs: start at most 1 processes"
    ):
        distributed._local_gpu(1)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert distributed._local_gpu(1) == 0 and os.environ["LOCAL_RANK"] == "0"
