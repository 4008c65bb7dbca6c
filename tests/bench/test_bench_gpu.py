"""`python -m bench gpu`: its stages, its budget, and the failures that it tolerates or reports."""

import re
import time
from pathlib import Path

import pytest
import torch

from bench import __main__ as cli
from bench import gpu
from bench.harness.records import load
from bench.ops.registry import OPS
from fastgpt.backends import SHARED_FILES
from tests.support.benching import ROOT, bench, validate


def staged(monkeypatch, *found):
    monkeypatch.setattr(gpu, "stages", lambda rehearse, architecture: list(found))


def outcomes(folder):
    (facts,) = load(folder / "stages.json")
    return [stage["outcome"] for stage in facts["stages"]]


FILES = ["report.html", "rest.tar.gz", "results.json", "stages.json"]
QUICK_STAGE = gpu.Stage("gelu", ["-m", "bench", "gelu", "--tiny", "--seconds", "0", "--peer", "PyTorch"])
PASSES = "def test_one(): pass\ndef test_two(): import pytest; pytest.skip()\n"


@pytest.mark.slow
def test_gpu_run_survives_what_others_lack_and_break(monkeypatch, tmp_path, capsys):
    (tmp_path / "test_few.py").write_text(PASSES)
    tests = ["-m", "pytest", "--confcutdir", str(tmp_path), str(tmp_path / "test_few.py")]
    staged(
        monkeypatch,
        gpu.Stage("broken", ["-c", "raise SystemExit(3)"], required=False),
        gpu.Stage("tool", ["tool", "x"], needs="a-program-that-nobody-has", required=False),
        gpu.Stage("tests", tests),
        QUICK_STAGE,
    )
    assert gpu.run_gpu(tmp_path / "out", 3.0, rehearse=True, commit="abc") == 0
    out = capsys.readouterr().out
    assert "failed: exit 3" in out and "a-program-that-nobody-has is not installed" in out
    assert "ok, 1 passed, 0 failed, 1 skipped" in out
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == FILES
    records = load(tmp_path / "out" / "results.json")
    validate(records)
    assert [s["name"] for s in records[0]["stages"]] == ["broken", "tool", "tests", "gelu"]
    assert records[0]["rehearsal"] and sum("device" in r for r in records) == 1


@pytest.mark.slow
def test_gpu_run_fails_when_a_required_stage_does(monkeypatch, tmp_path, capsys):
    staged(monkeypatch, gpu.Stage("tests", ["-c", "raise SystemExit(1)"]), QUICK_STAGE)
    assert gpu.run_gpu(tmp_path, 3.0, rehearse=True, commit=None) == 1
    assert "failed stages: tests" in capsys.readouterr().out
    assert any(r["op"] == "gelu" for r in load(tmp_path / "results.json"))  # and yet the rest is done


@pytest.mark.slow
def test_gpu_run_fails_when_a_required_stage_does_not_finish(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "_RESERVE", 1.0)
    slow = gpu.Stage("all", ["-m", "bench", "all", "--tiny", "--seconds", "60", "--peer", "none"])
    staged(monkeypatch, slow, gpu.Stage("never", ["-c", "pass"]))
    started = time.monotonic()
    assert gpu.run_gpu(tmp_path, 0.5, rehearse=True, commit=None) == 1
    assert time.monotonic() - started < 60
    assert outcomes(tmp_path) == ["killed: out of time", "skipped: no budget left"]
    assert "failed stages: all, never" in capsys.readouterr().out
    assert len(load(tmp_path / "results.json")) >= 2


@pytest.mark.slow
def test_gpu_run_without_a_benchmark_still_says_what_became_of_its_stages(monkeypatch, tmp_path):
    staged(monkeypatch, gpu.Stage("build", ["-c", "raise SystemExit(1)"]))
    assert gpu.run_gpu(tmp_path, 3.0, rehearse=True, commit=None) == 1
    assert outcomes(tmp_path) == ["failed: exit 1"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rest.tar.gz", "stages.json"]


def test_gpu_run_without_a_gpu_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert cli.main(["gpu", "--out", "nowhere"]) == 2
    assert "--rehearse" in capsys.readouterr().err
    assert not Path("nowhere").exists()


def test_stages_come_in_the_order_of_what_matters():
    found = gpu.stages(rehearse=False, architecture="9.0a")
    names = [stage.name for stage in found]
    first = ["attention", "cross_entropy", "linear_cross_entropy"]
    assert names[:2] == ["build", "smoke"]
    assert names[2:8] == [name for op in first for name in (f"test-{op}", op)]
    assert names[8:10] == ["train", "accelerate"]
    assert names[-4:] == ["sanitizer-memcheck", "sanitizer-racecheck", "scaling", "ncu"]
    assert "16x12x1024x64" in found[3].command  # GPT-2's
    assert found[0].command[-2:] == ["--cuda-architectures", "9.0a"]
    assert set(OPS) == set(gpu.TESTS) <= set(names)
    optional = [stage.name for stage in found if not stage.required]
    assert all(name.endswith("-more") or name in names[-4:] for name in optional)
    assert [stage.name for stage in gpu.stages(rehearse=False, architecture=None)] == names[1:]


def test_every_op_is_tested_before_it_is_timed():
    names = [stage.name for stage in gpu.stages(rehearse=False, architecture=None)]
    for op, files in gpu.TESTS.items():
        before = f"test-{op if files else SHARED_FILES[op]}"
        assert names.index(before) < names.index(op)


def test_every_test_file_of_an_op_runs_on_a_gpu():
    listed = {file for files in gpu.TESTS.values() for file in files}
    taken = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        if re.search(r"^def \w+\([^)]*\b(backend|cuda)\b|usefixtures\(.cuda", path.read_text(), re.M):
            taken.add(path.stem.removeprefix("test_"))
    assert listed <= taken
    assert {file for file in taken if file.startswith(tuple(OPS))} <= listed


@pytest.mark.slow
def test_rehearsal_goes_through_everything(tmp_path):
    run = bench("gpu", "--rehearse", "--budget-minutes", 15, "--out", tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES
    records = load(tmp_path / "results.json")
    validate(records)
    planned = gpu.stages(rehearse=True, architecture=None)
    done = records[0]["stages"]
    assert [stage.name for stage in planned] == [stage["name"] for stage in done]
    for stage, row in zip(planned, done, strict=True):
        assert row["outcome"] == "ok" or (stage.needs and "is not installed" in row["outcome"]), row
        assert stage.benchmark or not stage.tests or "passed" in row
    (gelu,) = (row for row in done if row["name"] == "test-gelu")
    assert gelu["passed"] > 50 and not gelu["failed"]
    measured = {(r["op"], r["backend"]) for r in records if r["peer"] is None and r["verified"]}
    assert {(op, backend) for op in OPS for backend in ("cpp", "triton")} <= measured
    steps = ("train", "accelerate")
    assert {(op, backend) for op in steps for backend in ("cpp", "triton")} <= measured
    liger = {r["op"]: r["status"] for r in records if r["peer"] == "Liger-Kernel" and r["group"] == "ops"}
    assert liger["cross_entropy"] == liger["linear_cross_entropy"] == "ok"  # interpreted
