"""Run directories: one run at a time, and files of other programs are never overwritten."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastgpt.atomic_io import AtomicDirectory
from fastgpt.checkpoints import native as checkpoint
from fastgpt.cli import main
from fastgpt.data import PrepareConfig, prepare
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import ByteTokenizer
from fastgpt.training.config import TrainConfig
from fastgpt.training.directory_lock import NAME, DirectoryLock, is_locked
from fastgpt.training.initialize import config_from
from fastgpt.training.trainer import train


@pytest.fixture
def options(tmp_path: Path) -> dict:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(300)))
    return {
        **{"data": str(tmp_path / "text.txt"), "out": str(tmp_path / "out"), "n_layer": 1, "n_head": 2},
        **{"n_embd": 32, "block_size": 32, "batch_size": 4, "max_steps": 2, "eval_batches": 1},
        **{"warmup_steps": 1, "sample_tokens": 0},
    }


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


def holder(directory: Path, after: str = "") -> subprocess.Popen:
    """Start a process that locks a directory and waits."""
    script = "import sys, time; from pathlib import Path; from fastgpt.training.directory_lock import DirectoryLock\n"
    script += f"lock = DirectoryLock(Path(sys.argv[1]))\n{after}\nprint('locked', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        [sys.executable, "-c", script, str(directory)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "locked\n"
    return process


def test_a_second_run_is_refused_until_the_first_ends(options: dict, tmp_path: Path):
    train(TrainConfig().override(options))
    before = files(tmp_path / "out")
    with holder(tmp_path / "out") as first:
        assert is_locked(tmp_path / "out")
        for more in ({}, {"resume": True, "max_steps": 4}):
            with pytest.raises(
                FileExistsError, match=rf"another run \(process {first.pid} on .*another --out"
            ):
                train(config_from(options | more))
        (tmp_path / "out" / NAME).unlink(missing_ok=True)
        first.send_signal(signal.SIGKILL)
    assert not is_locked(tmp_path / "out")
    assert files(tmp_path / "out") == before
    assert train(config_from(options | {"resume": True, "max_steps": 4})).step == 4
    assert not (tmp_path / "out" / NAME).exists()


def test_a_lock_ends_with_its_process_even_if_a_child_lives_on(tmp_path: Path):
    out, alive = tmp_path / "out", tmp_path / "alive"
    child = (
        f"import os\nif not os.fork():\n    open({str(alive)!r}, 'w').close(); time.sleep(20); os._exit(0)"
    )
    with holder(out, child) as process:
        while not alive.exists():
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
        DirectoryLock(out).release()
        process.stdout.close()


def test_a_directory_made_for_a_run_that_did_not_start_is_removed(options: dict, tmp_path: Path):
    with pytest.raises(FileNotFoundError):
        train(TrainConfig().override(options | {"data": str(tmp_path / "absent")}))
    assert not (tmp_path / "out").exists()
    (tmp_path / "own").mkdir()
    DirectoryLock(tmp_path / "own").release()
    assert (tmp_path / "own").exists() and not list((tmp_path / "own").iterdir())


def test_a_file_system_without_locks_is_a_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fastgpt.training.directory_lock.fcntl.flock", flock)
    said: list[str] = []
    DirectoryLock(tmp_path / "out", said.append).release()
    assert len(said) == 1 and "cannot be locked (Operation not supported)" in said[0]


@pytest.mark.parametrize("place", ["", "sub", ".", "link"])
@pytest.mark.parametrize("resume", [False, True])
def test_a_checkpoint_is_not_the_directory_of_a_run(
    options: dict, tmp_path: Path, place: str, resume: bool, capsys: pytest.CaptureFixture
):
    train(TrainConfig().override(options))
    step = checkpoint.step_path(tmp_path / "out", 2)
    out = step / place
    if place == "link":
        out = tmp_path / "link"
        out.symlink_to(step)
    before = files(tmp_path / "out")
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in (options | {"out": out}).items()]
    assert main(["train", *arguments, *["--resume"] * resume]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and f"choose {tmp_path / 'out'}, the directory of its run" in message
    assert files(tmp_path / "out") == before


def test_a_copy_of_a_checkpoint_under_another_name_is_refused_too(options: dict, tmp_path: Path):
    train(TrainConfig().override(options))
    checkpoint.step_path(tmp_path / "out", 2).rename(tmp_path / "best")
    with pytest.raises(ValueError, match="a run starts from a checkpoint with --init-from"):
        train(config_from({"out": str(tmp_path / "best"), "resume": True}))


@pytest.mark.parametrize("command", ["data", "export"])
def test_nothing_else_is_written_into_a_checkpoint(
    options: dict, tmp_path: Path, command: str, capsys: pytest.CaptureFixture
):
    train(TrainConfig().override(options))
    step = checkpoint.step_path(tmp_path / "out", 2)
    inputs = (
        [options["data"], "--tokenizer=bytes"] if command == "data" else [f"--checkpoint={tmp_path / 'out'}"]
    )
    before = files(tmp_path / "out")
    assert main([command, *inputs, f"--out={step / 'sub' / 'deep'}"]) == 2
    assert f"is inside the checkpoint {step}" in capsys.readouterr().err
    assert files(tmp_path / "out") == before and not (step / "sub").exists()


def test_two_exports_do_not_write_one_directory(tmp_path: Path):
    model = GPT(GPTConfig(256, 32, n_layer=1, n_head=2, n_embd=32))
    other = AtomicDirectory(tmp_path / "m", re.compile("model.safetensors"))
    (tmp_path / ".writing-m" / "model.safetensors").touch()
    with pytest.raises(FileExistsError, match="another process is writing"):
        model.save_pretrained(tmp_path / "m", ByteTokenizer())
    assert files(tmp_path) == {".writing-m/model.safetensors": b""}
    other.unlock()  # as the operating system does of a process that died
    model.save_pretrained(tmp_path / "m", ByteTokenizer())
    assert sorted(files(tmp_path)) == [
        f"m/{name}"
        for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json")
    ]


def test_a_data_set_and_a_model_are_not_the_directory_of_a_run(options: dict, tmp_path: Path):
    prepare([options["data"]], PrepareConfig(str(tmp_path / "set"), tokenizer="bytes", repetition="keep"))
    GPT(GPTConfig(256, 32, n_layer=1, n_head=2, n_embd=32)).save_pretrained(
        tmp_path / "gpt2", ByteTokenizer()
    )
    for name, kind in (("set", "a prepared data set"), ("gpt2", "a Hugging Face model")):
        before = files(tmp_path / name)
        with pytest.raises(ValueError, match=f"holds {kind}; choose another directory"):
            train(TrainConfig().override(options | {"out": str(tmp_path / name)}))
        assert files(tmp_path / name) == before


@pytest.mark.parametrize("name", ["config.toml", "log.jsonl", "loss.png", "sample.txt"])
def test_a_file_that_no_run_wrote_is_not_overwritten(options: dict, tmp_path: Path, name: str):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"{name} is not the file of a run"):
        train(TrainConfig().override(options))
    assert files(tmp_path / "out") == {name: b"mine"}


def test_a_run_that_ended_without_a_checkpoint_may_be_started_again(options: dict, tmp_path: Path):
    unusable = options | {"lr": 1e30, "warmup_steps": 0, "max_steps": 40, "grad_clip": 0.0}
    with pytest.raises(FloatingPointError):
        train(TrainConfig().override(unusable))
    assert (tmp_path / "out" / "config.toml").exists()
    assert train(TrainConfig().override(options)).finished


def test_what_is_left_of_a_checkpoint_does_not_stop_a_later_one(options: dict, tmp_path: Path):
    train(TrainConfig().override(options | {"save_every": 1}))
    step = checkpoint.step_path(tmp_path / "out", 2)
    (step / "state.json").unlink()
    assert train(config_from({"out": options["out"], "resume": True})).step == 2
    assert (step / "state.json").exists()
    (aside,) = (tmp_path / "out").glob("step-00000002.damaged-*")
    assert (aside / "model.safetensors").exists()


@pytest.mark.slow
def test_processes_of_torchrun_are_refused_together(options: dict, tmp_path: Path):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    with holder(tmp_path / "out"):
        done = subprocess.run(
            [*command, "fastgpt", "train", *flags],
            check=False,
            capture_output=True,
            text=True,
            timeout=120,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    assert done.returncode != 0 and done.stderr.count("is writing to") == 2 and "gone" not in done.stderr
