"""The one command for a GPU: its stages, its budget, what it survives and what fails it."""

import time
from pathlib import Path

import pytest
import torch
from benching import bench, validate

from bench import __main__ as cli
from bench import gpu
from bench.machine import Machine
from bench.ops import OPS
from bench.records import load


def staged(monkeypatch, *found):
    monkeypatch.setattr(gpu, "stages", lambda rehearse, built: list(found))
    monkeypatch.setattr(Machine, "_measure_roofs", lambda self, dtype: (1e10, 1e11))


QUICK_STAGE = gpu.Stage("gelu", ["-m", "bench", "gelu", "--tiny", "--seconds", "0", "--peer", "PyTorch"])


@pytest.mark.slow
def test_gpu_run_survives_what_others_lack_and_break(monkeypatch, tmp_path, capsys):
    staged(
        monkeypatch,
        gpu.Stage("build", ["-c", "raise SystemExit(3)"], ours=False),
        gpu.Stage("tool", ["tool", "x"], needs="a-program-that-nobody-has", ours=False),
        QUICK_STAGE,
    )
    assert gpu.run_gpu(tmp_path, 3.0, rehearse=True, commit="abc") == 0
    out = capsys.readouterr().out
    assert "failed: exit 3" in out and "there is no a-program-that-nobody-has here" in out
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "rest.tar.gz", "results.json"]
    records = load(tmp_path / "results.json")
    validate(records)
    assert [s["name"] for s in records[0]["stages"]] == ["build", "tool", "gelu"]
    assert records[0]["rehearsal"] and sum("device" in r for r in records) == 1


@pytest.mark.slow
def test_gpu_run_fails_when_a_stage_of_ours_does(monkeypatch, tmp_path):
    staged(monkeypatch, gpu.Stage("tests", ["-c", "raise SystemExit(1)"]), QUICK_STAGE)
    assert gpu.run_gpu(tmp_path, 3.0, rehearse=True, commit=None) == 1
    assert any(r["op"] == "gelu" for r in load(tmp_path / "results.json"))  # and yet the rest is done


@pytest.mark.slow
def test_gpu_run_ends_a_stage_in_time_and_keeps_its_records(monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "_RESERVE", 1.0)
    slow = gpu.Stage("all", ["-m", "bench", "all", "--tiny", "--seconds", "60", "--peer", "none"])
    staged(monkeypatch, slow, gpu.Stage("never", ["-c", "pass"]))
    started = time.monotonic()
    assert gpu.run_gpu(tmp_path, 0.5, rehearse=True, commit=None) == 0
    assert time.monotonic() - started < 45
    records = load(tmp_path / "results.json")
    assert [s["outcome"] for s in records[0]["stages"]] == [
        "ended: out of time",
        "skipped: the budget is spent",
    ]
    assert len(records) > 2


def test_gpu_run_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["gpu", "--out", "nowhere"]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_stages_come_in_the_order_of_what_matters():
    found = gpu.stages(rehearse=False, built="why")
    names = [stage.name for stage in found]
    sanitizers = ["sanitizer-memcheck", "sanitizer-racecheck", "sanitizer-synccheck"]
    assert names[:9] == ["build", "tests", *sanitizers, "attention", "cross_entropy", "train", "accelerate"]
    assert names[-2:] == ["scaling", "ncu"]
    assert all(stage.command[-2:] == ["--backend", "cuda"] for stage in found[2:5])
    assert found[5].command[3:5] == ["--shape", "16x12x1024x64"]  # GPT-2's
    assert "--no-deps" in found[0].command and "--no-build-isolation" in found[0].command
    assert set(OPS) <= set(names)


@pytest.mark.slow
def test_rehearsal_goes_through_everything(tmp_path):
    run = bench("gpu", "--rehearse", "--budget-minutes", 15, "--out", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["report.html", "rest.tar.gz", "results.json"]
    records = load(tmp_path / "results.json")
    validate(records)
    assert all(s["outcome"] == "ok" or "there is no" in s["outcome"] for s in records[0]["stages"]), records[
        0
    ]
    measured = {(r["op"], r["backend"]) for r in records if r["peer"] is None and r["verified"]}
    assert {(op, backend) for op in OPS for backend in ("cpp", "triton")} <= measured
    steps = ("train", "accelerate")
    assert {(op, backend) for op in steps for backend in ("cpp", "triton")} <= measured
    liger = {r["op"]: r["status"] for r in records if r["peer"] == "Liger-Kernel" and r["group"] == "ops"}
    assert liger["cross_entropy"] == liger["linear_cross_entropy"] == "ok"  # interpreted
