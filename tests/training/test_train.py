"""Training: the loss decreases, a killed run resumes bit for bit, and errors have clear messages."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastgpt import extension
from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.native import CheckpointError
from fastgpt.cli import main
from fastgpt.data import Batch, Stream
from fastgpt.device import resolve_device, resolve_dtype
from fastgpt.generation.text import generate
from fastgpt.model import GPT
from fastgpt.training.config import TrainConfig
from fastgpt.training.initialize import config_from
from fastgpt.training.optimizers import learning_rate, make_optimizers
from fastgpt.training.signals import StopSignal
from fastgpt.training.trainer import _step_seed, train
from tests.support.forked import python

TEXT = "".join(f"def f{i}(x):\n    return x + {i}\n\n" for i in range(400))


SINGLE = os.environ | {"OMP_NUM_THREADS": "1"}  # such small products only wait for a second thread


@pytest.fixture
def options(tmp_path: Path) -> dict:
    (tmp_path / "text.py").write_text(TEXT)
    return {
        "data": str(tmp_path / "text.py"),
        "out": str(tmp_path / "out"),
        **{"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 32, "batch_size": 4, "dropout": 0.1},
        **{
            "max_steps": 12,
            "warmup_steps": 2,
            "lr": 1e-2,
            "eval_every": 4,
            "eval_batches": 2,
            "save_every": 4,
        },
        **{"log_every": 1, "sample_tokens": 8},
    }


def losses(out: str | Path) -> list[tuple]:
    """Read every (step, kind, loss) of log.jsonl, unrounded."""
    records = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return [(r["step"], kind, r[kind]) for r in records for kind in ("train_loss", "val_loss") if kind in r]


def command(options: dict, *extra: str) -> list[str]:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    return [sys.executable, "-m", "fastgpt", "train", *flags, *extra]


def test_a_run_learns_and_writes_its_files(options: dict, capfd: pytest.CaptureFixture):
    options |= {"max_steps": 60, "eval_every": 20, "save_every": 20, "log_every": 20, "dropout": 0.0}
    result = train(TrainConfig().override(options))
    printed = capfd.readouterr().out
    assert result.finished and result.step == 60
    assert result.val_loss is not None and result.val_loss < result.unigram_entropy - 1
    assert (
        "step 60: validation loss" in printed
        and "step 20/60 (33%)  train loss" in printed
        and "  MFU " in printed
    )
    assert f"validation loss {result.val_loss:.4f}" in printed.splitlines()[-1]
    assert re.search(r"step 60/60 \(100%\) .* \d+:\d\d elapsed, 0:00 left\n", printed)
    assert f"machine: cpu, {torch.get_num_threads()} thread" in printed
    assert f"backend cpp ({extension.variant()})" in printed
    out = Path(options["out"])
    assert (out / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in out.iterdir() if path.is_dir()) == ["step-00000040", "step-00000060"]
    assert [step for step, kind, _ in losses(out) if kind == "val_loss"] == [0, 20, 40, 60]
    assert "def" in generate(out, "def f7(x):\n", 60, temperature=0)


def test_resuming_repeats_the_unbroken_run_exactly(
    options: dict, tmp_path: Path, capfd: pytest.CaptureFixture
):
    whole = options | {"out": str(tmp_path / "whole"), "grad_accum": 2}
    train(TrainConfig().override(whole))
    part = whole | {"out": str(tmp_path / "part")}
    train(TrainConfig().override(part | {"max_minutes": 1e-9}))  # time is up after the first step
    assert [step for step, *_ in losses(part["out"])][-1] == 1
    capfd.readouterr()
    result = train(config_from({"out": part["out"], "resume": True, "max_minutes": 10.0}))
    assert "resumed at step 1\n" in capfd.readouterr().out
    assert result.finished and result.step == 12
    expected = [record for record in losses(whole["out"]) if record[1] == "train_loss"]
    assert [record for record in losses(part["out"]) if record[1] == "train_loss"] == expected
    assert losses(part["out"])[-1] == losses(whole["out"])[-1]


@pytest.mark.slow
def test_run_that_is_killed_repeatedly_has_the_losses_of_a_whole_one(options: dict, tmp_path: Path):
    options |= {
        "max_steps": 60,
        "eval_every": 10,
        "save_every": 5,
        "n_layer": 2,
        "n_embd": 64,
        "batch_size": 16,
    }
    whole = options | {"out": str(tmp_path / "whole")}
    subprocess.run(command(whole), check=True, capture_output=True, env=SINGLE)
    part = options | {"out": str(tmp_path / "part")}
    chance = random.Random(7)
    resumed = False
    for threshold in (chance.randint(8, 18), chance.randint(24, 34), chance.randint(40, 50)):
        process = subprocess.Popen(
            command(part, *["--resume"] * resumed), stdout=subprocess.PIPE, text=True, env=SINGLE
        )
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(f"step {threshold}/"):
                break
        time.sleep(chance.uniform(0, 0.03))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.stdout.close()
        resumed = True
    final = subprocess.run(command(part, "--resume"), check=True, capture_output=True, env=SINGLE, text=True)
    assert "resumed at step " in final.stdout
    assert losses(part["out"]) == losses(whole["out"])
    assert not list(Path(part["out"]).glob(".writing-*"))
    a, b = (checkpoint.open_checkpoint(run["out"]).load_model().state_dict() for run in (whole, part))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(s, marks=pytest.mark.slow) for s in (signal.SIGINT, signal.SIGHUP))],
)
def test_a_signal_saves_and_ends_the_run(options: dict, number: signal.Signals):
    options |= {"max_steps": 100_000, "save_every": 100_000, "eval_every": 100_000}
    process = subprocess.Popen(
        command(options), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=SINGLE
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3/"):
            break
    process.send_signal(number)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and err == ""
    step = checkpoint.open_checkpoint(options["out"]).step
    assert f"stopped at step {step}: saved" in out
    assert losses(options["out"])[-1][0] == step


def test_an_occupied_or_an_empty_directory_is_refused(options: dict):
    with pytest.raises(CheckpointError, match="--resume found nothing to continue"):
        config_from({"out": options["out"], "resume": True})
    config = TrainConfig().override(options | {"max_steps": 1, "sample_tokens": 0})
    train(config)
    with pytest.raises(CheckpointError, match="pass --resume to continue it, or another --out"):
        train(config)


def test_resuming_cannot_change_the_model_but_can_go_on_for_longer(options: dict):
    train(TrainConfig().override(options))
    for name, value in [("n_embd", 64), ("position", "rotary"), ("bias", False), ("tokenizer", "bpe")]:
        with pytest.raises(CheckpointError, match=f"cannot change the model: {name} is"):
            train(config_from({"out": options["out"], "resume": True, name: value}))
    config = config_from({"out": options["out"], "resume": True, "max_steps": 15})
    assert config.override({"resume": False, "max_steps": 12}) == TrainConfig().override(options)
    assert train(config).step == 15
    assert [step for step, kind, _ in losses(options["out"]) if kind == "train_loss"] == list(range(1, 16))


def test_resuming_a_finished_run_only_reports_it(options: dict):
    train(TrainConfig().override(options))
    before = losses(options["out"])
    assert train(config_from({"out": options["out"], "resume": True})).val_loss == before[-1][2]
    assert losses(options["out"]) == before


def test_resuming_on_another_text_is_refused(options: dict, tmp_path: Path):
    train(TrainConfig().override(options))
    before = checkpoint.steps(Path(options["out"]))
    (tmp_path / "text.py").write_text(TEXT.replace("return", "yield"))
    (tmp_path / "same.py").write_text(TEXT)
    resume = {"out": options["out"], "resume": True, "max_steps": 14}
    for data in ({}, {"data": options["data"]}):
        with pytest.raises(CheckpointError, match=f"--init-from {options['out']} --out NEW"):
            train(config_from(resume | data))
    assert checkpoint.steps(Path(options["out"])) == before
    assert train(config_from(resume | {"data": str(tmp_path / "same.py")})).step == 14


def test_a_full_disk_ends_the_run_and_spares_the_checkpoint_before(options: dict):
    """Simulate a full disk with a file-size limit: parameters fit, moments do not."""
    train(TrainConfig().override(options | {"max_steps": 4}))
    limit = (
        checkpoint.open_checkpoint(options["out"]).path.joinpath("model.safetensors").stat().st_size + 1000
    )
    script = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
    script += "import sys; from fastgpt.cli import main; sys.exit(main())"
    done = python("-c", script, *command(options, "--resume")[3:])
    assert done.returncode == 2
    assert done.stderr.startswith("fastgpt: error: the checkpoint ") and done.stderr.count("\n") == 1
    assert "could not be written" in done.stderr and "older ones are untouched" in done.stderr
    assert checkpoint.open_checkpoint(options["out"]).step == 4
    assert not list(Path(options["out"]).glob(".writing-*"))


def fill_the_disk(monkeypatch: pytest.MonkeyPatch, file: str) -> None:
    """Make every later write to a file of this name fail."""

    def replace(old: str, new: Path, rename: Callable[..., None] = os.replace) -> None:
        if Path(new).name == file:
            raise OSError(errno.ENOSPC, "No space left on device")
        rename(old, new)

    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("file", ["config.toml", "environment.json", "log.jsonl"])
def test_a_full_disk_says_what_could_not_be_written(
    options: dict, file: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    out = Path(options["out"])
    fill_the_disk(monkeypatch, file)
    assert main(command(options, "--max-steps", "1")[3:]) == 2
    assert capfd.readouterr().err == f"fastgpt: error: {out / file}: No space left on device\n"


def test_what_is_optional_warns_once_and_does_not_end_the_run(
    options: dict, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
):
    """Let plot, sample and TensorBoard fail repeatedly, each in its own way."""
    import torch.utils.tensorboard

    class Writer:
        def __init__(self, *_: object, **__: object) -> None: ...

        def add_scalar(self, *_: object) -> None:
            raise RuntimeError("the event file\nis gone")

        def close(self) -> None:
            raise OSError(28, "No space left on device", "events")

    def sample(*_: object) -> str:
        raise IndexError("a token")

    monkeypatch.setattr(torch.utils.tensorboard, "SummaryWriter", Writer)
    monkeypatch.setattr("fastgpt.training.trainer.sample", sample)
    monkeypatch.setenv("MPLBACKEND", "module://not.there")
    out = Path(options["out"])
    fill_the_disk(monkeypatch, "loss.png")
    assert main(command(options, "--tensorboard")[3:]) == 0
    assert capfd.readouterr().err.splitlines() == [
        f"fastgpt: warning: {name} could not be written ({reason}); the run goes on without it"
        for name, reason in (
            ("TensorBoard", "the event file is gone"),
            ("loss.png", f"{out / 'loss.png'}: No space left on device"),
            ("the sample", "a token"),
        )
    ]
    assert checkpoint.open_checkpoint(out).step == 12
    assert main(["info"]) == 0 and os.environ["MPLBACKEND"] == "module://not.there"


@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "Qt5Agg", "nonsense"])
def test_no_choice_of_a_backend_stops_a_plot(tmp_path: Path, backend: str):
    script = "from fastgpt.evaluation.plots import loss_curve; import sys\n"
    script += "train, val = [(1, 2.0), (2, float('nan')), (3, float('inf'))], [(3, float('nan'))]\n"
    script += "loss_curve(sys.argv[1], train, val, 1.0, 'x', 't')"
    picture = tmp_path / "loss.png"
    environment = SINGLE | {"MPLBACKEND": backend}
    subprocess.run([sys.executable, "-c", script, str(picture)], check=True, env=environment)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_text_shorter_than_a_block_is_refused(options: dict, tmp_path: Path):
    (tmp_path / "text.py").write_text(TEXT[:200])
    with pytest.raises(
        ValueError, match=r"the held-out text of .* cannot be used: 20 tokens are too few for a block of 32"
    ):
        train(TrainConfig().override(options))


def test_a_loss_that_is_no_number_ends_the_run_without_a_checkpoint(options: dict):
    with pytest.raises(FloatingPointError, match="try a lower --lr"):
        train(
            TrainConfig().override(
                options | {"lr": 1e30, "warmup_steps": 0, "grad_clip": 0.0, "max_steps": 40}
            )
        )
    assert not checkpoint.exists(Path(options["out"]))


def test_every_step_and_process_draws_its_own_dropout():
    seeds = {_step_seed(seed, step, rank) for seed in (0, 1) for step in range(50) for rank in range(4)}
    assert len(seeds) == 400


def test_accumulation_is_the_same_step_as_one_large_batch(options: dict, monkeypatch: pytest.MonkeyPatch):
    """Compare two passes of 4 sequences with one of the same 8: equal except for rounding."""
    original = Stream.batch

    def pooled(self: Stream, number: int, rows: slice) -> Batch:
        first, count = number * self.batch_size // 4, self.batch_size // 4
        four = Stream(self.tokens, batch_size=4, block_size=self.block_size, seed=self.seed)
        parts = [original(four, first + i) for i in range(count)]
        return Batch(torch.cat([part.idx for part in parts]), torch.cat([part.targets for part in parts]))

    monkeypatch.setattr(Stream, "batch", pooled)
    options |= {"dropout": 0.0, "dtype": "float32"}
    found = []
    for batch_size, accumulate in [(8, 1), (4, 2)]:
        run = options | {
            "out": f"{options['out']}{batch_size}",
            "batch_size": batch_size,
            "grad_accum": accumulate,
        }
        train(TrainConfig().override(run))
        found.append([loss for _, kind, loss in losses(run["out"]) if kind == "train_loss"])
    assert found[0] == pytest.approx(found[1], abs=2e-3)


def test_bpe_trains_and_generates(options: dict):
    result = train(TrainConfig().override(options | {"tokenizer": "bpe", "vocab_size": 300}))
    assert result.finished
    assert generate(options["out"], "def", 5, seed=0).startswith("def")


def test_the_learning_rate_warms_up_and_follows_a_cosine():
    config = TrainConfig(lr=1.0, min_lr=0.1, warmup_steps=10, max_steps=110)
    assert [learning_rate(step, config) for step in (0, 4, 9)] == pytest.approx([0.1, 0.5, 1.0])
    assert learning_rate(10, config) == pytest.approx(1.0)
    assert learning_rate(60, config) == pytest.approx(0.55)
    assert learning_rate(35, config) == pytest.approx(0.1 + 0.45 * (1 + math.sqrt(0.5)))
    assert learning_rate(110, config) == learning_rate(500, config) == pytest.approx(0.1)


def test_weight_decay_acts_on_matrices_alone():
    config = TrainConfig(n_layer=1, n_head=1, n_embd=8, weight_decay=0.3)
    model = GPT(config.model(16))
    (optimizer,) = make_optimizers(model, config)
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = name.endswith(("wte.weight", "wpe.weight", "attn.weight", "proj.weight", "fc.weight"))
        assert decay[id(parameter)] == (0.3 if matrix else 0.0), name


def test_auto_picks_bfloat16_exactly_where_the_cpu_multiplies_in_it():
    cpu = torch.device("cpu")
    flags = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else None
    if flags is None:
        pytest.skip("no /proc/cpuinfo to compare with")
    assert (resolve_dtype("auto", cpu) == torch.bfloat16) is ("avx512_bf16" in flags)
    assert resolve_dtype("float32", cpu) == torch.float32
    with pytest.raises(ValueError, match="the device 'gpu9' cannot be used"):
        resolve_device("gpu9")


def test_a_restart_by_torchrun_resumes_the_same_run_and_no_other(
    options: dict, monkeypatch: pytest.MonkeyPatch
):
    """The first start refuses a directory with a checkpoint; the restart must not resume it."""
    train(config_from(options | {"max_steps": 2}))
    assert not config_from(options | {"max_steps": 2}).resume
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert config_from(options | {"max_steps": 2}).resume
    with pytest.raises(CheckpointError, match="pass --resume to continue it, or another --out"):
        train(config_from(options))
    assert checkpoint.open_checkpoint(options["out"]).step == 2


@pytest.fixture
def _interruptible():
    """Enable SIGINT and SIGHUP, which are ignored in background jobs and under nohup."""
    former = (
        signal.signal(signal.SIGINT, signal.default_int_handler),
        signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    yield
    for number, handler in zip((signal.SIGINT, signal.SIGHUP), former, strict=True):
        signal.signal(number, handler)


@pytest.mark.usefixtures("_interruptible")
def test_a_second_sigterm_does_not_cut_the_save_short():
    """Handle the signal that torchrun forwards although a scheduler sent it to every process."""
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.received
    with StopSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.received
    with StopSignal() as stop, pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_hangup_that_is_ignored_stays_ignored():
    """Ignore SIGHUP like nohup."""
    former = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.received
    finally:
        signal.signal(signal.SIGHUP, former)
