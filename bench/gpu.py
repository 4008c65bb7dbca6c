"""Tests and benchmarks on a GPU within a time budget: `python -m bench gpu --budget-minutes N --out DIR`.

The stages run one after the other, each in its own process, so that a crash does not affect the other stages: a CUDA
error makes the device unusable for its whole process. A smoke test comes first, then the tests and the benchmark of
each op, the most important op first. A stage that exceeds its share of the budget is killed; its records remain valid.
DIR/results.json and DIR/stages.json are complete at any time. At the end there are also DIR/report.html and
DIR/rest.tar.gz, which has the logs. Nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from xml.etree import ElementTree

from bench.harness.machine import ROOT
from bench.harness.records import Record, load, save

_RESERVE = 20.0  # seconds for the report
TRITON_CACHE = ROOT / "build" / "triton"  # can be copied from another machine
# The test files of each op, the most important op for a training step first.
TESTS: dict[str, tuple[str, ...]] = {
    "attention": (
        *("attention", "attention_cuda", "attention_split", "attention_extremes"),
        *("attention_head_sizes", "attention_masks", "attention_mask_grad", "attention_sinks"),
    ),
    "cross_entropy": ("cross_entropy", "cross_entropy_with_grad", "cross_entropy_extremes"),
    "linear_cross_entropy": ("linear_cross_entropy",),
    "attention_varlen": ("attention_varlen", "flash_attention_cuda"),
    "add_layer_norm": ("add_layer_norm",),
    "rms_norm": ("rms_norm",),
    "add_rms_norm": (),  # tested with rms_norm
    "mlp": ("mlp", "mlp_cuda"),
    "linear_gelu": ("linear_gelu", "linear_gelu_cuda"),
    "linear": ("linear",),
    "gelu": ("gelu",),
    "bias_gelu": (),  # tested with gelu
    "geglu": ("geglu", "op_sizes"),
    "swiglu": ("swiglu",),
    "relu_squared": ("relu_squared",),
    "rope": ("rope",),
}
TRAINED_WITH = 3  # training steps are timed after this number of ops
REHEARSED = "gelu"  # a rehearsal runs the tests of this op and only collects the others
SHARE = {"attention": 0.2}  # maximum share of the budget for the tests of an op; 0.1 for other ops
WORKERS = 8  # processes of pytest-xdist, which compile in parallel
SANITIZED = "whole or window"  # cases of test_attention_cuda.py


@dataclass(frozen=True)
class Stage:
    """One process of the run.

    Attributes:
        command: program and arguments; if the first word is an option or a .py file, the program is Python.
        share: maximum share of the budget.
        needs: required program; without it the stage is skipped.
        required: the run fails if this stage does not succeed.
    """

    name: str
    command: list[str]
    share: float = 1.0
    needs: str | None = None
    required: bool = True

    @property
    def benchmark(self) -> bool:
        """True if the stage writes records."""
        return self.command[:2] == ["-m", "bench"]

    @property
    def tests(self) -> bool:
        """True if the stage runs tests."""
        return self.command[:2] == ["-m", "pytest"]


def stages(rehearse: bool, architecture: str | None) -> list[Stage]:
    """List the stages, the most important first.

    Args:
        architecture: architecture to compile the CUDA kernels for, such as "9.0a"; None if they are compiled.
    """
    from bench.ops.registry import OPS

    device = "cpu" if rehearse else "cuda"
    preset, tiny = ("tiny", ["--tiny"]) if rehearse else ("gpu", [])

    def bench(name: str, *arguments: str, share: float = 1.0, required: bool = True) -> Stage:
        command = ["-m", "bench", *arguments, *tiny, "--device", device]
        return Stage(name, command, share, required=required)

    def shapes(op: str, first: bool) -> list[str]:
        found = ["x".join(map(str, dims.values())) for dims in OPS[op].shapes[preset]]
        return [part for shape in (found[:1] if first else found[1:]) for part in ("--shape", shape)]

    def tests(name: str, files: tuple[str, ...], share: float) -> Stage:
        workers = ["-n", str(WORKERS), "--dist", "loadgroup"] if find_spec("xdist") and not rehearse else []
        collect = ["--collect-only"] if rehearse and name != f"test-{REHEARSED}" else []
        paths = [str(path) for file in files for path in Path("tests").rglob(f"test_{file}.py")]
        return Stage(
            name, ["-m", "pytest", "--maxfail=20", "--device", device, *workers, *collect, *paths], share
        )

    found = [tests("smoke", ("primitives_cuda", "smoke"), 0.15)]
    for number, (op, files) in enumerate(TESTS.items(), 1):
        if files:
            found.append(tests(f"test-{op}", files, SHARE.get(op, 0.1)))
        found.append(bench(op, op, *shapes(op, True), share=0.15))
        if number == TRAINED_WITH:
            found += [bench("train", "train", share=0.2), bench("accelerate", "accelerate", share=0.15)]
    found += [
        bench(f"{op}-more", op, *shapes(op, False), required=False) for op in TESTS if shapes(op, False)
    ]
    whole_tiles = ["-m", "pytest", "--device", device, "tests/ops/test_attention_cuda.py", "-k", SANITIZED]
    found += [
        Stage(
            f"sanitizer-{tool}",
            ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, *whole_tiles],
            share=0.15, needs="compute-sanitizer", required=False,
        )
        for tool in ("memcheck", "racecheck")
    ]  # fmt: skip
    found.append(bench("scaling", "scaling", required=False))
    small = ["-m", "bench", "ops", "--tiny", "--device", device, "--peer", "none"]
    profile = ["ncu", "--clock-control", "none", "--launch-count", "40", "--section", "SpeedOfLight"]
    found.append(Stage("ncu", [*profile, sys.executable, *small], 0.15, needs="ncu", required=False))
    if architecture is not None:
        build = ["setup.py", "build_ext", "--inplace", "--cuda", "--variants=", "--cuda-architectures"]
        found.insert(0, Stage("build", [*build, architecture], share=0.3))
    return found


def run_gpu(out: Path, budget_minutes: float, *, rehearse: bool, commit: str | None) -> int:
    """Run all stages within the budget.

    Returns:
        1 if a required stage did not succeed, else 0.

    Raises:
        ValueError: the budget is not positive, or there is no GPU and `rehearse` is False.
    """
    if not budget_minutes > 0:
        raise ValueError(f"--budget-minutes is {budget_minutes}. Use a positive number.")
    deadline = time.monotonic() + 60 * budget_minutes
    facts, architecture = _facts(rehearse, commit)
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    facts["stages"] = []
    failed = []
    for stage in stages(rehearse, architecture):
        left = deadline - time.monotonic() - _RESERVE
        row: Record = {"name": stage.name, "seconds": 0.0, "outcome": ""}
        facts["stages"].append(row)
        if left <= 0:
            row["outcome"] = "skipped: no budget left"
        elif stage.needs and shutil.which(stage.needs) is None:
            row["outcome"] = f"skipped: {stage.needs} is not installed"
        else:
            _run(stage, min(left, stage.share * 60 * budget_minutes), work, facts, out, row, commit)
        _merge(out, facts)
        if stage.required and row["outcome"] != "ok":
            failed.append(stage.name)
        counts = "".join(f", {row[kind]} {kind}" for kind in ("passed", "failed", "skipped") if kind in row)
        print(f"{stage.name:<28}{row['seconds']:7.1f} s  {row['outcome']}{counts}", flush=True)
    _finish(out)
    if failed:
        print(f"failed stages: {', '.join(failed)}")
    return 1 if failed else 0


_FACTS = """
import json, sys
import torch
from bench.harness.machine import Machine
from fastgpt import extension
device, command, commit = sys.argv[1:]
if device == "cuda" and not torch.cuda.is_available():
    sys.exit(3)
facts = Machine(device).facts(command=command, rehearsal=device == "cpu", commit=commit or None)
missing = device == "cuda" and bool(extension.cuda_problem(0))
major, minor = torch.cuda.get_device_capability(0) if missing else (0, 0)
print(json.dumps([facts, f"{major}.{minor}" + "a" * (major in (9, 10)) if missing else None]))
"""


def _facts(rehearse: bool, commit: str | None) -> tuple[Record, str | None]:
    """Describe the machine and return the argument `architecture` of `stages`.

    A subprocess does this, because this process must not hold the GPU during the stages.
    """
    command = "python -m bench " + " ".join(sys.argv[1:])
    arguments = ["cpu" if rehearse else "cuda", command, commit or ""]
    done = subprocess.run(
        [sys.executable, "-c", _FACTS, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )
    if done.returncode == 3:
        raise ValueError("no CUDA GPU here. Use --rehearse for the same stages on the CPU at toy sizes.")
    if done.returncode:
        raise ValueError(
            f"the description of the machine failed. Fix this error: {done.stderr.strip()[-2000:]}"
        )
    facts, architecture = json.loads(done.stdout.splitlines()[-1])
    return facts, architecture


def _run(
    stage: Stage, limit: float, work: Path, facts: Record, out: Path, row: Record, commit: str | None
) -> None:
    """Run one stage, merge its records during the run, and store duration and outcome in `row`."""
    command = stage.command
    if command[0].startswith("-") or command[0].endswith(".py"):
        command = [sys.executable, *command]
    if stage.benchmark:
        command = [*command, "--out", str(work / stage.name), *(["--commit", commit] if commit else [])]
    counts = work / f"{stage.name}.xml"
    if stage.tests:
        command = [*command, f"--junitxml={counts}"]
    started = time.monotonic()
    with (work / f"{stage.name}.log").open("w") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={"TRITON_CACHE_DIR": str(TRITON_CACHE)} | os.environ,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
        )
        try:
            while process.poll() is None and time.monotonic() - started < limit:
                time.sleep(0.5)
                _merge(out, facts)
        finally:
            late = process.poll() is None
            if late:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    row["seconds"] = round(time.monotonic() - started, 1)
    row["outcome"] = (
        "killed: out of time"
        if late
        else "ok"
        if process.returncode == 0
        else f"failed: exit {process.returncode}"
    )
    if counts.exists():
        row |= _counted(counts)


def _counted(report: Path) -> Record:
    """Count the tests that passed, failed and were skipped."""
    suite = ElementTree.parse(report).getroot().find("testsuite")
    assert suite is not None
    total, skipped, *bad = (int(suite.get(n, 0)) for n in ("tests", "skipped", "failures", "errors"))
    return {"passed": total - skipped - sum(bad), "failed": sum(bad), "skipped": skipped}


def _merge(out: Path, facts: Record) -> None:
    """Save the records of all stages in one file; each stage has its own roofline bounds."""
    records: list[Record] = []
    for stage in facts["stages"]:
        path = out / "work" / stage["name"] / "results.json"
        for record in load(path) if path.exists() else []:
            records.append({k: v for k, v in record.items() if k not in facts})
    save(out / "stages.json", [facts])
    if records:
        records[0] = records[0] | facts
        save(out / "results.json", records)


def _finish(out: Path) -> None:
    from bench.report.page import html

    results = out / "results.json"
    if results.exists():
        (out / "report.html").write_text(html([load(results)]), encoding="utf-8")
    with tarfile.open(out / "rest.tar.gz", "w:gz") as tar:
        tar.add(out / "work", "rest")
    shutil.rmtree(out / "work")
    print(f"in {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))
