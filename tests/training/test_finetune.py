"""Fine-tuning on a task, answers from it, and their evaluation."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoints import native as checkpoint
from fastgpt.cli import main
from fastgpt.data.batches import IGNORED
from fastgpt.evaluation.tasks.evaluate import evaluate_task
from fastgpt.evaluation.tasks.examples import load_examples
from fastgpt.evaluation.tasks.template import TASKS, load_template
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt.training.config import TrainConfig, trained_with
from fastgpt.training.datasets import open_training_data
from fastgpt.training.initialize import config_from
from fastgpt.training.trainer import train

pytestmark = pytest.mark.xdist_group("finetune")  # whose fixtures are made once

SMALL = {
    **{"n_layer": 1, "n_head": 2, "n_embd": 32, "position": "rotary", "block_size": 64, "batch_size": 8},
    **{"max_steps": 10, "lr": 1e-2, "warmup_steps": 2, "eval_every": 5, "eval_batches": 2, "save_every": 5},
    **{"log_every": 1, "sample_tokens": 0, "dtype": "float32"},
}


@pytest.fixture
def examples(tmp_path: Path) -> str:
    """Write sixty questions with one of three answers."""
    lines = [{"input": f"What is {i}?", "output": ("fizz", "two words", "größer")[i % 3]} for i in range(60)]
    path = tmp_path / "examples.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


@pytest.fixture
def options(tmp_path: Path, examples: str) -> dict:
    return SMALL | {"task": "answer", "data": examples, "out": str(tmp_path / "out")}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train a model in out/ that answers every question with "ja"; return it with its training examples."""
    folder = tmp_path_factory.mktemp("trained")
    lines = [json.dumps({"input": f"{i}?", "output": "ja"}) for i in range(30)]
    (folder / "examples.jsonl").write_text("\n".join(lines))
    torch.set_num_threads(1)
    train(
        TrainConfig().override(
            SMALL
            | {"task": "answer", "data": str(folder / "examples.jsonl"), "out": str(folder / "out")}
            | {"max_steps": 40}
        )
    )
    return folder


def fails(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    """Run a failing command, and return the one line that it prints to stderr."""
    capsys.readouterr()
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("fastgpt: error: ") and error.count("\n") == 1
    return error


# ---- what is learned from ----


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_the_loss_is_on_answers_and_ends_of_text_alone(options: dict, examples: str, tokenizer: str):
    config = TrainConfig().override(options | {"tokenizer": tokenizer, "vocab_size": 300})
    material = open_training_data(config)
    assert isinstance(material.tokenizer, ByteTokenizer if tokenizer == "bytes" else BPETokenizer)
    template, end = load_template("answer"), material.tokenizer.end_of_text
    split = load_examples("answer", examples)
    for source, some in ((material.train, split.train), (material.val, split.held_out)):
        counted, seen = [], []
        for batch in source.validation_batches(100, slice(None)):
            assert batch.cu_seqlens is not None
            idx, targets = batch.idx.flatten(), batch.targets.flatten()
            for start, stop in zip(
                batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True
            ):
                wanted = targets[start:stop]
                wanted = wanted[wanted != IGNORED]
                if len(wanted):
                    assert int(wanted[-1]) == end
                    counted.append(material.tokenizer.decode(wanted[:-1]))
                    seen.append(material.tokenizer.decode(idx[start:stop]))
        assert sorted(counted) == sorted(template.answer(example.output) for example in some)
        assert sorted(seen) == sorted(template.prompt(e.input) + template.answer(e.output) for e in some)


def test_long_examples_and_broken_lines_are_left_out_and_counted(
    options: dict, examples: str, capfd: pytest.CaptureFixture
):
    room = options["block_size"] - len(load_template("answer").prompt("x") + " y")
    fits = load_examples("answer", examples)
    with Path(examples).open("a") as file:
        file.writelines(
            json.dumps({"input": f"{i}" + "x" * (room + i), "output": "y"}) + "\n" for i in range(10)
        )
        file.write("{broken\n")
    grown = load_examples("answer", examples, skip_broken=True)
    longer = [len(getattr(grown, side)) - len(getattr(fits, side)) for side in ("train", "held_out")]
    train(config_from(options | {"max_steps": 1, "skip_broken": True}))
    said = capfd.readouterr().out.splitlines()[0]
    assert f"{examples}, 1 broken lines left out, {len(fits.train)} for training" in said
    assert sum(longer) == 10 and f"({longer[0]} longer than a block left out)" in said
    assert f"{len(fits.held_out)} held out" in said


def test_an_example_as_long_as_a_block_is_kept(options: dict, tmp_path: Path):
    template = load_template("answer")
    room = options["block_size"] - len(template.prompt("x") + template.answer("y"))
    path = tmp_path / "exact.jsonl"
    for extra, kept in ((0, True), (1, False)):
        lines = [{"input": f"{i}" + "x" * (room + extra), "output": "y"} for i in range(9)]
        path.write_text("\n".join(map(json.dumps, lines)))
        config = TrainConfig().override(options | {"data": str(path)})
        if kept:
            counted = sum(
                batch.num_targets
                for batch in open_training_data(config).train.validation_batches(9, slice(None))
            )
            assert counted == len(" y\0") * len(load_examples("answer", str(path)).train)
        else:
            with pytest.raises(ValueError, match=r"none of the \d examples of .* fits a block of 64"):
                open_training_data(config)


def test_what_cannot_be_trained_on_is_refused(options: dict, tmp_path: Path, capsys: pytest.CaptureFixture):
    common = [f"--{name.replace('_', '-')}={value}" for name, value in options.items() if name != "data"]
    assert "finetune needs --data, a file of examples" in fails(["finetune", *common], capsys)
    assert "finetune needs a --task: answer" in fails(["finetune", "--data=embedded"], capsys)
    path = tmp_path / "bad.jsonl"
    path.write_text('{"input": "a"}\n')
    assert "bad.jsonl, line 1: it lacks 'output'" in fails(["finetune", *common, f"--data={path}"], capsys)
    assert "packing='stream'" in fails(["finetune", *common, "--data=embedded", "--packing=stream"], capsys)
    assert "finetune needs a --task: answer, code" in fails(["finetune", f"--data={path}"], capsys)
    assert not Path(options["out"]).exists()
    with pytest.raises(
        ValueError, match="task must be one of answer, code, summarize, translate, not 'sing'"
    ):
        TrainConfig(task="sing")


# ---- learning ----


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_seconds_of_training_beat_the_untrained_model_on_held_out_items(task: str, tmp_path: Path):
    options = SMALL | {
        **{"task": task, "data": "embedded", "out": str(tmp_path), "block_size": 192, "n_embd": 64},
        **{"n_layer": 2, "batch_size": 4, "max_steps": 400 if task == "answer" else 250, "warmup_steps": 20},
        **{"lr": 5e-3, "eval_batches": 1, "eval_every": 400, "save_every": 400, "log_every": 400},
    }
    train(TrainConfig().override(options))
    found = evaluate_task(tmp_path, task, "embedded", limit=40, baseline=True, max_new_tokens=24)
    assert found.margin is not None and found.examples == 40
    assert max(margin.low for margin in found.margin.values()) > 0, found.table()


def test_a_resumed_run_has_the_losses_of_an_unbroken_one(options: dict, tmp_path: Path):
    def losses(out: str) -> list[tuple]:
        records = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
        return [(r["step"], k, r[k]) for r in records for k in ("train_loss", "val_loss") if k in r]

    options |= {"dropout": 0.1}
    train(config_from(options))
    part = str(tmp_path / "part")
    train(config_from(options | {"out": part, "max_minutes": 1e-9}))
    assert main(["finetune", "--resume", "--out", part, "--max-minutes", "9"]) == 0
    assert [x for x in losses(part) if x[1] == "train_loss"] == [
        x for x in losses(options["out"]) if x[1] == "train_loss"
    ]
    assert losses(part)[-1] == losses(options["out"])[-1]
    assert trained_with(checkpoint.open_checkpoint(part)).task == "answer"


# ---- answers ----


def test_generate_prints_the_answer_alone(trained: Path, capsys: pytest.CaptureFixture, tmp_path: Path):
    arguments = ["generate", "--checkpoint", str(trained / "out"), "--task", "answer"]
    assert main([*arguments, "--prompt", "3?"]) == 0
    assert capsys.readouterr().out == "ja\n"
    (tmp_path / "prompts").write_text("1?\n22?\n")
    assert main([*arguments, "--prompts", str(tmp_path / "prompts"), "--json"]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert printed == [{"prompt": text, "sample": 1, "continuation": "ja"} for text in ("1?", "22?")]
    assert main([*arguments, "--prompt", "3?", "--num-samples", "2"]) == 0
    assert capsys.readouterr().out == "--- prompt 1, sample 1 ---\nja\n--- prompt 1, sample 2 ---\nja\n"
    for shots in ([], ["--shots", str(trained / "examples.jsonl")]):
        assert main([*arguments, "--prompt", "3?", "--num-shots", "1", *shots]) == 0


def test_eval_measures_a_file_and_what_of_it_was_held_out(trained: Path, capsys: pytest.CaptureFixture):
    data = str(trained / "examples.jsonl")
    arguments = ["eval", "--checkpoint", str(trained / "out"), "--task", "answer", "--data", data]
    assert main([*arguments, "--json", "--baseline"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["examples"] == 30 and found["scores"]["exact_match"] == {
        "value": 100,
        "low": 100,
        "high": 100,
    }
    assert found["margin"]["f1"]["value"] == 100 - found["untrained"]["f1"]["value"] > 50
    assert [one["input"] for one in found["answered"]] == [f"{i}?" for i in range(30)]
    assert main([*arguments, "--json", "--held-out"]) == 0
    held_out = load_examples("answer", data).held_out
    found = json.loads(capsys.readouterr().out)
    assert [one["input"] for one in found["answered"]] == [example.input for example in held_out]
    assert main([*arguments, "--num-shots", "2", "--limit", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [one["input"] for one in found["answered"]] == ["2?", "3?", "4?"] and found["cut"] == 3
    assert main([*arguments, "--limit", "4"]) == 0
    table = capsys.readouterr().out
    assert table.startswith(f"answer: 4 examples, {data}\n")
    assert [line.split(maxsplit=1) for line in table.splitlines()[3:5]] == [
        ["exact_match", "100.0 (100.0 to 100.0)"],
        ["f1", "100.0 (100.0 to 100.0)"],
    ]
    assert "input     0?\nexpected  ja\ngot       ja\n" in table


def test_an_answer_does_not_depend_on_the_others_in_its_batch(trained: Path):
    data = str(trained / "examples.jsonl")
    found = [
        evaluate_task(trained / "out", "answer", data, max_new_tokens=6, batch_size=size).answered
        for size in (1, 7, 64)
    ]
    assert found[0] == found[1] == found[2]


def test_what_cannot_be_asked_is_refused(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    data = str(trained / "examples.jsonl")
    generate = ["generate", "--checkpoint", str(trained / "out")]
    evaluate = ["eval", "--checkpoint", str(trained / "out"), "--data", data]
    for command, option in ((generate, "--num-shots=1"), (evaluate, "--limit=1"), (evaluate, "--baseline")):
        assert f"{option.partition('=')[0]} needs a --task: answer" in fails([*command, option], capsys)
    generate += ["--task", "answer"]
    evaluate += ["--task", "answer"]
    assert "input of answer is empty" in fails([*generate, "--prompt", ""], capsys)
    assert "input of answer is empty" in fails(generate, capsys)
    assert "must not be negative" in fails([*generate, "--prompt", "a", "--num-shots", "-1"], capsys)
    assert "99 shots need as many examples, and there are 30" in fails(
        [*generate, "--prompt", "a", "--num-shots", "99", "--shots", data], capsys
    )
    assert "does not exist" in fails(
        [*generate, "--prompt", "a", "--num-shots", "1", "--shots", str(tmp_path / "absent")], capsys
    )
    assert "limit must be at least 1" in fails([*evaluate, "--limit", "0"], capsys)
    assert "num_shots must be at least 0" in fails([*evaluate, "--num-shots", "-1"], capsys)
    assert "no example of" in fails([*evaluate, "--num-shots", "30"], capsys)
    assert "max_new_tokens must not be negative" in fails([*evaluate, "--max-new-tokens", "-1"], capsys)
    assert "batch_size must be at least 1" in fails([*evaluate, "--batch-size", "0"], capsys)
    assert "do not apply to a task" in fails([*evaluate, "--plot", str(tmp_path / "x.png")], capsys)
    packages = {
        "sacrebleu": ("sacrebleu.metrics", "translate"),
        "rouge-score": ("rouge_score.rouge_scorer", "summarize"),
    }
    for package, (module, task) in packages.items():
        monkeypatch.setitem(sys.modules, module, None)
        assert f"pip install {package}" in fails([*evaluate[:-1], task, "--limit", "1"], capsys)


def test_the_whole_path_from_text_to_answers(tmp_path: Path, examples: str, capsys: pytest.CaptureFixture):
    """Run prepare, train, finetune, eval and generate, one command each."""
    (tmp_path / "corpus").mkdir()
    for i in range(40):
        text = f"Document {i} says what {i} is: {'fizz' if i % 3 else 'two words'}.\n" * 5
        (tmp_path / "corpus" / f"{i}.txt").write_text(text)
    base, tuned = str(tmp_path / "base"), str(tmp_path / "tuned")
    small = [f"--{name.replace('_', '-')}={value}" for name, value in SMALL.items()]
    steps = ["--max-steps=30", "--eval-every=30", "--save-every=30", "--sample-tokens=0"]
    prepared = str(tmp_path / "prepared")
    commands = [
        ["data", str(tmp_path / "corpus"), "--out", prepared, "--tokenizer", "bytes", "--val-share", "0.2"],
        ["train", "--data", prepared, "--out", base, *small, *steps],
        [
            *("finetune", "--task", "answer", "--from", base, "--data", examples, "--out", tuned, *steps),
            *("--lr=0.01", "--batch-size=8", "--warmup-steps=2"),
        ],
        ["eval", "--checkpoint", tuned, "--task", "answer", "--data", examples, "--held-out", "--baseline"],
        ["generate", "--checkpoint", tuned, "--task", "answer", "--prompt", "What is 7?"],
    ]
    printed = []
    for command in commands:
        assert main(command) == 0, command
        printed.append(capsys.readouterr().out)
    assert checkpoint.open_checkpoint(tuned).model == checkpoint.open_checkpoint(base).model
    assert "exact_match" in printed[3] and "margin" in printed[3]
    assert "Answer" not in printed[4] and printed[4].endswith("\n")
