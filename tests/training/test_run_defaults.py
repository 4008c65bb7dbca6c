"""Options of a run that have no fixed default, and what it does at its end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fastgpt.cli import main
from fastgpt.training.config import TrainConfig
from fastgpt.training.initialize import config_from
from fastgpt.training.logger import _minutes
from fastgpt.training.optimizers import learning_rate
from fastgpt.training.trainer import train

SMALL = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "batch_size": 2, "lr": 1e-2},
    **{"max_steps": 4, "eval_batches": 1, "log_every": 1, "sample_tokens": 8},
}


@pytest.fixture
def options(tmp_path: Path) -> dict:
    (tmp_path / "text.txt").write_text("".join(f"Line {i} of a short text.\n" for i in range(200)))
    return SMALL | {"data": str(tmp_path / "text.txt"), "out": str(tmp_path / "out")}


def test_nothing_is_generated_where_nothing_is_left_to_train(options: dict, capfd: pytest.CaptureFixture):
    train(TrainConfig().override(options))
    assert "--- sample ---" in capfd.readouterr().out
    train(config_from({"out": options["out"], "resume": True, "max_steps": 3}))
    printed = capfd.readouterr().out
    assert "nothing is left to train" in printed and "--- sample ---" not in printed


@pytest.mark.parametrize(
    ("max_steps", "warmup", "interval"), [(5, 0, 1), (40, 2, 4), (2000, 100, 200), (9000, 100, 250)]
)
def test_warm_up_and_validations_scale_with_short_runs(max_steps: int, warmup: int, interval: int):
    config = TrainConfig(max_steps=max_steps)
    assert (config.warmup, config.eval_interval) == (warmup, interval)
    assert learning_rate(warmup, config) == config.lr
    given = TrainConfig(max_steps=max_steps, warmup_steps=7, eval_every=9)
    assert (given.warmup, given.eval_interval) == (7, 9)


def test_threads_are_set_and_named(options: dict, capfd: pytest.CaptureFixture):
    before = torch.get_num_threads()
    try:
        train(TrainConfig().override(options | {"threads": 1, "max_steps": 1}))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert "machine: cpu, 1 thread, " in capfd.readouterr().out
    with pytest.raises(ValueError, match="threads must be at least 1"):
        TrainConfig(threads=0)


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0:00"), (0.2, "0:01"), (61, "1:01"), (3599.5, "1:00:00"), (7384, "2:03:04")]
)
def test_times_are_minutes_and_seconds(seconds: float, text: str):
    assert _minutes(seconds) == text


def test_finetuning_ends_with_answers_to_held_out_inputs(tmp_path: Path, capfd: pytest.CaptureFixture):
    pairs = [{"input": f"what is {i}", "output": f"it is {i}"} for i in range(40)]
    file = tmp_path / "examples.jsonl"
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | {"block_size": 64}).items()]
    assert main(["finetune", "--task=answer", f"--data={file}", f"--out={tmp_path / 'out'}", *flags]) == 0
    printed = capfd.readouterr().out
    sample = printed.split("--- sample ---\n")[1].split("--- end of sample ---")[0]
    assert sample.count("input     what is ") == sample.count("expected  it is ") == 3
    assert sample.count("\ngot       ") == 3
    for line in sample.splitlines():
        if line.startswith("input"):
            number = line.removeprefix("input     what is ")
            assert f"input     what is {number}\nexpected  it is {number}\n" in sample


def test_export_says_what_it_wrote(options: dict, tmp_path: Path, capfd: pytest.CaptureFixture):
    train(TrainConfig().override(options))
    capfd.readouterr()
    target = tmp_path / "gpt2"
    assert main(["export", "--checkpoint", options["out"], "--out", str(target)]) == 0
    assert f'AutoModelForCausalLM.from_pretrained("{target}")' in capfd.readouterr().out
