"""Mistakes on the command line: one line that says what to do instead, and no traceback."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from fastgpt.cli import main
from fastgpt.device import resolve_device
from fastgpt.training.config import TrainConfig


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["train", "--n-layers", "2"],
            "there is no option --n-layers; did you mean --n-layer? (see fastgpt train",
        ),
        (["finetune", "--bach-size", "2"], "did you mean --batch-size?"),
        (["train", "--max-stepz=2"], "there is no option --max-stepz=2; did you mean --max-steps?"),
        (["train", "--qqqqq"], "there is no option --qqqqq (see fastgpt train --help)"),
        (["train", "--lr", "abc"], "argument --lr: invalid float value: 'abc'"),
        (["train", "--dtype", "fp17"], "argument --dtype: invalid choice: 'fp17'"),
        (["generate", "--checkpoint", "x", "The"], "options have names, such as --checkpoint DIR"),
        (["generate", "run1"], "the following arguments are required: --checkpoint"),
        (["chat"], "invalid choice: 'chat'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_wrong_option_is_answered_in_one_line(arguments, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(arguments)
    error = capsys.readouterr().err
    assert stopped.value.code == 2
    assert error.startswith("fastgpt: error: ") and error.count("\n") == 1
    assert message in error


def test_no_command_prints_the_help(capsys):
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(f"\n    {command} " in printed for command in ("data", "train", "generate", "eval", "info"))


def test_the_help_of_train_has_groups_examples_and_defaults(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert printed.startswith("usage: fastgpt train [options] Train a model on a text.")
    for part in (
        *("model: --preset", "machine: --threads", "examples: fastgpt train --data my.txt"),
        *("(default: a tenth of max_steps, at most 250)", "(default: as PyTorch chooses)"),
    ):
        assert part in printed


@pytest.mark.parametrize(("short", "full"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_dtypes_have_short_names(short, full, monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr("fastgpt.training.trainer.train", seen.append)
    (tmp_path / "a.toml").write_text(f'dtype = "{short}"')
    assert main(["train", "--dtype", short]) == main(["train", "--config", str(tmp_path / "a.toml")]) == 0
    assert [config.dtype for config in seen] == [full, full]
    assert TrainConfig().override({"dtype": short}).dtype == full


@pytest.mark.parametrize("name", ["mps", "gpu", "meta", "cpux", ""])
def test_devices_that_there_are_not_are_named(name):
    with pytest.raises(ValueError, match=r"cannot be used: the devices are auto, cpu, cuda and cuda:N"):
        resolve_device(name)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this PyTorch is a build with CUDA")
def test_a_pytorch_without_cuda_is_named():
    with pytest.raises(ValueError, match=r"torch .* is a build without CUDA"):
        resolve_device("cuda")


def test_a_backend_that_cannot_run_is_refused_first(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["train", "--device", "cpu", "--backend", "cuda", "--out", str(out)]) == 2
    found = capsys.readouterr()
    assert "the backend cuda cannot be used: the tensors are on cpu" in found.err
    assert not found.out and not out.exists()


@pytest.mark.parametrize("command", [["-m", "fastgpt"], ["fastgpt"]], ids=" ".join)
@pytest.mark.parametrize("seconds", [0.1, 0.4])
def test_an_early_interrupt_is_never_a_traceback(command, seconds, tmp_path):
    if command == ["fastgpt"]:  # the script that pip installs
        script = tmp_path / "fastgpt"
        script.write_text("import sys\nfrom fastgpt.cli import main\nsys.exit(main())\n")
        command = [str(script)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    program = subprocess.Popen(
        [sys.executable, *command, "info"], stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=environment
    )
    while not _imports_torch(program.pid):  # before, it is Python itself that starts
        assert program.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    program.send_signal(signal.SIGINT)
    _, error = program.communicate(timeout=60)
    assert b"Traceback" not in error and b"KeyboardInterrupt" not in error
    assert program.returncode in (-signal.SIGINT, 130, 0)


def _imports_torch(pid):
    try:
        with open(f"/proc/{pid}/maps") as maps:
            return "torch" in maps.read()
    except FileNotFoundError:
        return False


def test_finetune_has_its_own_defaults_unless_it_resumes(monkeypatch, tmp_path, capsys):
    seen = []
    monkeypatch.setattr("fastgpt.training.trainer.train", seen.append)
    (tmp_path / "a.toml").write_text('task = "code"\nlr = 0.5\n')
    given = ["--data=embedded", "--task=answer"]
    assert main(["finetune", *given]) == 0
    assert main(["finetune", "--data=embedded", "--config", str(tmp_path / "a.toml"), "--max-steps=7"]) == 0
    assert main(["train", *given]) == 0
    own, file, plain = seen
    assert (own.max_steps, own.lr, own.min_lr, own.task) == (500, 1e-4, 1e-5, "answer")
    assert (file.max_steps, file.lr, file.min_lr, file.task) == (7, 0.5, 1e-5, "code")
    assert (plain.max_steps, plain.lr, plain.min_lr) == (2000, 1e-3, 1e-4)
    with pytest.raises(SystemExit):
        main(["finetune", "--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "schedule (default: 500)" in printed and "(default: required)" in printed
    assert "highest learning rate (default: 0.0001)" in printed
