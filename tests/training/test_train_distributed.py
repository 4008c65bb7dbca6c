"""Distributed training: the losses of one process, checkpoints for any number, one message after a lost process."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported after a group was made, its defaults would hold that group

from fastgpt.checkpoints import native as checkpoint
from fastgpt.data import DatasetWriter
from fastgpt.distributed import DistributedContext
from fastgpt.tokenizer import ByteTokenizer
from tests.support.forked import python

pytestmark = pytest.mark.xdist_group("train_distributed")  # whose fixtures are made once

SINGLE = os.environ | {"OMP_NUM_THREADS": "1"}
TRAIN = ["-m", "fastgpt", "train"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """Use packed documents of different lengths and two passes per step, so that all denominators are global."""
    folder = tmp_path_factory.mktemp("corpus")
    chance = random.Random(0)
    for i in range(60):
        lines = [
            f"def f{i}(x):\n    return x + {chance.randrange(99)}\n\n" for _ in range(chance.randrange(1, 9))
        ]
        (folder / f"{i}.py").write_text("".join(lines))
    return {
        **{"data": str(folder), "packing": "documents", "dtype": "float32"},
        **{"n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 64, "batch_size": 4, "grad_accum": 2},
        **{"max_steps": 8, "warmup_steps": 2, "lr": 1e-2, "label_smoothing": 0.1, "z_loss": 1e-3},
        **{"eval_every": 4, "eval_batches": 3, "save_every": 4, "log_every": 1, "sample_tokens": 4},
    }


def command(
    options: dict, *flags: str, processes: int = 1, restarts: int = 0, program: list[str] = TRAIN
) -> list[str]:
    given = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    if processes == 1:
        return [sys.executable, *program, *given, *flags]
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, *launch, f"--max-restarts={restarts}", *program, *given, *flags]


def run(options: dict, *flags: str, processes: int = 1) -> str:
    words = command(options, *flags, processes=processes)
    if processes == 1:
        done = python(*words[1:])
    else:
        done = subprocess.run(words, capture_output=True, text=True, env=SINGLE, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


def losses(out: str | Path) -> list[tuple]:
    records = map(json.loads, (Path(out) / "log.jsonl").read_text().splitlines())
    return [(r["step"], kind, r[kind]) for r in records for kind in ("train_loss", "val_loss") if kind in r]


def assert_same(found: str | Path, expected: str | Path) -> None:
    a, b = losses(found), losses(expected)
    assert [record[:2] for record in a] == [record[:2] for record in b]
    assert [record[2] for record in a] == pytest.approx([record[2] for record in b], rel=1e-5)


@pytest.fixture(scope="module")
def alone(options: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in one process."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    run(options | {"out": out})
    return out


@pytest.fixture(scope="module")
def sharded(options: dict, alone: Path) -> Path:
    """Train the first half of the same run, sharded over two processes."""
    out = alone.parent / "sharded"
    run(options | {"out": out, "parallel": "fsdp", "max_minutes": 1e-9}, processes=2)
    return out


def test_two_processes_have_the_losses_of_one(options: dict, alone: Path):
    out = alone.parent / "ddp"
    assert "2 processes (ddp), cpu" in run(options | {"out": out}, processes=2)
    assert_same(out, alone)


def test_the_reducer_never_holds_the_group_last(monkeypatch: pytest.MonkeyPatch):
    """A group destroyed with the reducer waits for gloo's threads under the GIL, which could hang a run at its end."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # a group puts its own there
    died: list[str] = []
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    wrapped = DistributedContext(world=2).wrap(torch.nn.Linear(2, 2))
    group = weakref.ref(wrapped.process_group, lambda _: died.append("group"))
    reducer = weakref.ref(wrapped.reducer, lambda _: died.append("reducer"))
    dist.destroy_process_group()
    assert group() is not None and reducer() is not None
    del wrapped
    assert died == ["reducer", "group"]


def test_tensor_held_by_gloo_does_not_abort_the_process_at_its_end():
    program = """
import sys
import torch
import torch.distributed as dist
from fastgpt.distributed import DistributedContext

processes = DistributedContext.from_env(torch.device("cpu"), "ddp")
dist.held_to_the_end = dist.group.WORLD  # as PyTorch's own caches hold it under FSDP2
sys.setswitchinterval(100)  # a thread that asks for the GIL does not get it: it must be given
dist.all_reduce(torch.ones(1), async_op=True)
processes.close()
"""
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], env=SINGLE | alone, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_two_processes_that_share_the_model_have_the_losses_of_one(options: dict, alone: Path):
    out = alone.parent / "fsdp"
    printed = run(options | {"out": out, "parallel": "fsdp"}, processes=2)
    assert_same(out, alone)
    assert "2 processes (fsdp), cpu" in printed and "--- sample ---\n" in printed
    assert len(list((out / "step-00000008").glob("model-0000?-of-00002.safetensors"))) == 2
    models = [checkpoint.open_checkpoint(path).load_model() for path in (out, alone)]
    tokens = torch.arange(97, 123)[None]
    torch.testing.assert_close(models[0](tokens)[0], models[1](tokens)[0], rtol=1e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "parallel"), [(1, "auto"), (4, "fsdp"), (2, "ddp")])
def test_a_sharded_checkpoint_of_two_goes_on_with_any_number(
    options: dict, alone: Path, sharded: Path, processes: int, parallel: str
):
    assert checkpoint.open_checkpoint(sharded).step == 1
    out = alone.parent / f"resumed-{processes}-{parallel}"
    shutil.copytree(sharded, out)
    flags = ["--resume", f"--parallel={parallel}", "--max-minutes=9"]
    printed = run({"out": out}, *flags, processes=processes)
    assert "resumed at step 1\n" in printed
    expected = [record for record in losses(alone) if record[:2] != (1, "val_loss")]
    found = [record for record in losses(out) if record[:2] != (1, "val_loss")]
    assert [r[:2] for r in found] == [r[:2] for r in expected]
    assert [r[2] for r in found] == pytest.approx([r[2] for r in expected], rel=1e-5)


@pytest.mark.slow
def test_a_checkpoint_of_one_goes_on_sharded(options: dict, alone: Path):
    out = alone.parent / "from-one"
    run(options | {"out": out, "max_minutes": 1e-9})
    run({"out": out}, "--resume", "--parallel=fsdp", "--max-minutes=9", processes=2)
    assert losses(out)[-1][2] == pytest.approx(losses(alone)[-1][2], rel=1e-5)


def workers(launcher: subprocess.Popen) -> list[psutil.Process]:
    """Return the training processes of a launcher, by rank."""
    found = [child for child in psutil.Process(launcher.pid).children() if "train" in child.cmdline()]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


def start(options: dict, *flags: str, restarts: int = 0) -> subprocess.Popen:
    return subprocess.Popen(
        command(options, *flags, processes=2, restarts=restarts),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=SINGLE,
    )  # fmt: skip


def read_until(process: subprocess.Popen, pattern: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if re.match(pattern, line):
            return
    raise AssertionError(f"no line like {pattern}; {process.stderr and process.stderr.read()}")


@pytest.mark.slow
def test_a_lost_process_ends_the_run_in_a_sentence_and_a_restart_resumes(options: dict, tmp_path: Path):
    process = start(options | {"out": tmp_path, "max_steps": 100_000})
    read_until(process, "step 6/")
    workers(process)[0].kill()
    _, errors = process.communicate(timeout=120)
    assert process.returncode != 0
    assert (
        "fastgpt: error: another process of this run is gone; start the same command again with --resume"
        in errors
    )
    shutil.rmtree(tmp_path / "step-00000008", ignore_errors=True)  # it may have been that fast
    printed = run({"out": tmp_path, "max_steps": 8}, "--resume", processes=2)
    assert "resumed at step 4\n" in printed


@pytest.mark.slow
def test_torchrun_restarts_a_run_where_it_was_saved(options: dict, tmp_path: Path, alone: Path):
    process = start(options | {"out": tmp_path}, restarts=1)
    read_until(process, "step 5/")
    workers(process)[1].kill()
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert re.search(r"^resumed at step [4-8]$", printed, re.MULTILINE)
    assert_same(tmp_path, alone)


@pytest.mark.slow
def test_a_signal_saves_and_ends_all_processes(options: dict, tmp_path: Path):
    process = start(options | {"out": tmp_path, "max_steps": 100_000, "save_every": 100_000})
    read_until(process, "step 3/")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    (stopped,) = re.findall(r"^stopped at step (\d+): saved; to go on: ", printed, re.MULTILINE)
    assert checkpoint.open_checkpoint(tmp_path).step == int(stopped)


@pytest.mark.slow
def test_a_signal_to_one_process_alone_saves_and_ends_all(options: dict, tmp_path: Path):
    process = start(options | {"out": tmp_path, "max_steps": 100_000, "save_every": 100_000})
    read_until(process, "step 3/")
    workers(process)[1].terminate()
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    (stopped,) = re.findall(r"^stopped at step (\d+): saved; to go on: ", printed, re.MULTILINE)
    assert checkpoint.open_checkpoint(tmp_path).step == int(stopped)


# ---- what befalls one process alone ----


def two_processes(options: dict, folder: Path, mischief: str) -> tuple[list[str], str]:
    """Train in two processes, with `mischief` in the one whose `rank` it checks.

    Return their results ("" for a killed one) and their output on stderr. torchrun, which ends the others, polls once a
    second.
    """
    script = folder / "train.py"
    lines = [
        "import os, resource, signal, sys",
        "from pathlib import Path",
        "rank = int(os.environ['RANK'])",
        mischief,
        "from fastgpt.cli import main",
        "status = main()",
        f"Path({str(folder)!r}, f'status-{{rank}}').write_text(str(status))",
        "sys.exit(status)",
    ]
    script.write_text("\n".join(lines))
    done = subprocess.run(
        command(options, processes=2, program=["--monitor-interval=1", str(script), "train"]),
        capture_output=True, text=True, env=SINGLE, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    files = [folder / f"status-{rank}" for rank in range(2)]
    return [file.read_text() if file.exists() else "" for file in files], done.stderr


FULL_DISK = """
from fastgpt.checkpoints import native as checkpoint
save = checkpoint.save
def save_where_there_is_no_room(out, step, *arguments, **options):
    if step == 8 and rank == {rank}:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
    return save(out, step, *arguments, **options)
checkpoint.save = save_where_there_is_no_room
"""


@pytest.mark.slow
@pytest.mark.parametrize(("parallel", "rank"), [("fsdp", 1), ("ddp", 0)])
def test_a_full_disk_of_one_process_ends_all_in_our_sentence(
    options: dict, tmp_path: Path, parallel: str, rank: int
):
    out = tmp_path / "out"
    statuses, errors = two_processes(
        options | {"out": out, "parallel": parallel}, tmp_path, FULL_DISK.format(rank=rank)
    )
    assert statuses == ["2", "2"], errors
    said = r"fastgpt: error: the checkpoint \S+/step-00000008 could not be written \((.*?)\); older ones are untouched"
    reasons = re.findall(said, errors)
    assert len(reasons) == 2 and all("File too large" in reason for reason in reasons), errors
    assert "CheckpointException" not in errors and "enforce fail" not in errors
    assert checkpoint.open_checkpoint(out).step == 4
    assert not list(out.glob(".writing-*"))


KILLED_BETWEEN_TWO_WRITES = """
from fastgpt.checkpoints import native as checkpoint
write_tensors = checkpoint.write_tensors
def write_or_die(file, tensors):
    if rank == 1 and file.match(".writing-step-00000008/optimizer-00002-of-00002.safetensors"):
        os.kill(os.getpid(), signal.SIGKILL)
    write_tensors(file, tensors)
checkpoint.write_tensors = write_or_die
"""


@pytest.mark.slow
def test_a_sharded_checkpoint_that_was_half_written_is_never_resumed_from(
    options: dict, tmp_path: Path, alone: Path
):
    out = tmp_path / "out"
    statuses, errors = two_processes(
        options | {"out": out, "parallel": "fsdp"}, tmp_path, KILLED_BETWEEN_TWO_WRITES
    )
    assert statuses == ["2", ""] and "another process of this run is gone" in errors
    (half,) = out.glob(".writing-*")
    parts = [half / f"{stem}-00002-of-00002.safetensors" for stem in ("model", "optimizer")]
    assert [part.exists() for part in parts] == [True, False]
    assert checkpoint.open_checkpoint(out).step == 4
    printed = run({"out": out}, "--resume", "--parallel=auto")
    assert "resumed at step 4\n" in printed
    assert_same(out, alone)
    assert not list(out.glob(".writing-*"))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["line", "shard"])
def test_data_that_one_process_alone_cannot_read_ends_all_in_the_sentence(
    options: dict, tmp_path: Path, kind: str
):
    """Each process has its own disk."""
    for rank in range(2):
        folder = tmp_path / f"disk-{rank}"
        folder.mkdir()
        lines = [json.dumps({"input": f"{i}?", "output": "yes"}) for i in range(40)]
        (folder / "data.jsonl").write_text("\n".join([*lines, "{" * rank]))
        with DatasetWriter(folder / "data", ByteTokenizer()) as writer:
            for split in ("train", "val"):
                writer.add(split, list(b"def f(x): return x") * 9)
            writer.finish({})
    with (folder / "data" / "train-00000.npy").open("r+b") as shard:
        shard.seek(-1, os.SEEK_END)
        shard.write(b"\xff")
    data = {"line": {"data": "data.jsonl", "task": "answer"}, "shard": {"data": "data"}}[kind]
    sentence = {"line": "data.jsonl, line 41: ", "shard": "data/train-00000.npy is damaged: "}[kind]
    mischief = f"os.chdir(Path({str(tmp_path)!r}, f'disk-{{rank}}'))"
    statuses, errors = two_processes(options | data | {"out": tmp_path / "out"}, tmp_path, mischief)
    assert statuses == ["2", "2"], errors
    assert errors.count(f"fastgpt: error: {sentence}") == 2, errors


def test_a_batch_that_cannot_be_shared_is_refused(options: dict, tmp_path: Path):
    done = subprocess.run(
        command(options | {"out": tmp_path, "batch_size": 3}, processes=2),
        capture_output=True, text=True, env=SINGLE, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "batch_size=3 is not divisible by the 2 processes" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_run_killed_twenty_times_has_the_losses_of_a_whole_one(options: dict, tmp_path: Path, parallel: str):
    options = options | {"max_steps": 200, "save_every": 3, "eval_every": 50, "parallel": parallel}
    run(options | {"out": tmp_path / "whole"}, processes=2)
    chance = random.Random(parallel)
    part = tmp_path / "part"
    saved = 0
    for kill in range(20):
        process = start(options | {"out": part}, *["--resume"] * (saved > 0))
        read_until(process, rf"step {saved + chance.randrange(1, 9)}/")
        time.sleep(chance.uniform(0, 0.05))
        workers(process)[chance.randrange(2)].kill()
        process.communicate(timeout=120)
        assert process.returncode != 0, f"kill {kill} came too late"
        assert checkpoint.exists(part) >= (saved > 0)
        if checkpoint.exists(part):
            step = checkpoint.open_checkpoint(part).step
            assert step >= saved
            saved = step
    run(options | {"out": part}, *["--resume"] * (saved > 0), processes=2)
    assert losses(part) == losses(tmp_path / "whole")
