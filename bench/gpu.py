"""GPU minutes into evidence:  python -m bench gpu --budget-minutes N --out DIR

One stage after another, each a process of its own: a crash of one, which on a GPU takes the whole process's
device with it, leaves the others. Benchmarks run in the order of what matters most; a stage that outlasts the
budget is ended, and what it measured counts. DIR/results.json is whole at any moment; at the end there are also
DIR/report.html and DIR/rest.tar.gz (logs, plots). Nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path

from bench.machine import ROOT
from bench.records import Record, load, save

_RESERVE = 20.0  # seconds for the report at the end
_GPU_TESTS = [f"tests/test_{op}.py" for op in
              ("philox", "gelu", "geglu", "linear", "linear_gelu", "mlp", "cross_entropy",
               "linear_cross_entropy", "add_layer_norm", "attention", "attention_varlen")]  # fmt: skip
# What each tool of compute-sanitizer looks for; all on small shapes, our kernels alone.
_SANITIZERS = {"memcheck": ("triton", "cuda"), "racecheck": ("cuda",), "synccheck": ("cuda",)}


@dataclass(frozen=True)
class Stage:
    """One process.

    Attributes:
        command: a program and its arguments; one that begins with an option is Python's.
        share: of the whole budget, the most it may take.
        needs: a program without which it is skipped.
        ours: whether its failure is a failure of the run.
    """

    name: str
    command: list[str]
    share: float = 1.0
    needs: str | None = None
    ours: bool = True

    @property
    def benchmark(self) -> bool:
        """Whether it writes records."""
        return self.command[:2] == ["-m", "bench"]


def stages(rehearse: bool, built: str | None) -> list[Stage]:
    """What is to be done, the most important first.

    Args:
        built: why the compiled kernels have to be built, or None where they are there.
    """
    from bench.ops import OPS

    ops = list(OPS)
    preset, tiny = ("tiny", ["--tiny", "--device", "cpu"]) if rehearse else ("gpu", ["--device", "cuda"])

    def bench(name: str, *arguments: str) -> Stage:
        return Stage(name, ["-m", "bench", *arguments, *tiny])

    def shapes(op: str, first: bool) -> list[str]:
        found = ["x".join(map(str, dims.values())) for dims in OPS[op].shapes[preset]]
        return [part for shape in (found[:1] if first else found[1:]) for part in ("--shape", shape)]

    device = "cpu" if rehearse else "cuda"
    tests = _GPU_TESTS[:2] if rehearse else _GPU_TESTS
    small = ["-m", "bench", "ops", "--tiny", "--device", device, "--peer", "none"]
    found = [
        Stage("tests", ["-m", "pytest", "--maxfail=20", "--device", device, *tests], share=0.35),
        *(
            Stage(
                f"sanitizer-{tool}",
                ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, *small,
                 *(part for backend in backends for part in ("--backend", backend))],
                share=0.08, needs="compute-sanitizer", ours=False,
            )
            for tool, backends in _SANITIZERS.items()
        ),
        bench("attention", "attention", *shapes("attention", True)),
        bench("cross_entropy", "cross_entropy", *shapes("cross_entropy", True)),
        bench("train", "train"),
        bench("accelerate", "accelerate"),
        *(bench(op, op, *shapes(op, True)) for op in ops[2:]),
        *(bench(f"{op}-more", op, *shapes(op, False)) for op in ops if shapes(op, False)),
        bench("scaling", "scaling"),
        Stage(
            "ncu",
            ["ncu", "--clock-control", "none", "--launch-count", "40", "--section", "SpeedOfLight",
             "--section", "Occupancy", sys.executable, *small],
            share=0.15, needs="ncu", ours=False,
        ),
    ]  # fmt: skip
    if built is not None:
        install = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
        found.insert(0, Stage("build", install, share=0.4, ours=False))
    return found


def run_gpu(out: Path, budget_minutes: float, *, rehearse: bool, commit: str | None) -> int:
    """Do all stages within the budget; 1 if tests failed or a result of ours was wrong, else 0.

    Raises ValueError for a budget that is none, and where there is no GPU and no rehearsal was asked for.
    """
    import torch

    from bench.machine import Machine
    from fastgpt import extension

    if not budget_minutes > 0:
        raise ValueError(f"--budget-minutes must be positive, not {budget_minutes}")
    if not rehearse and not torch.cuda.is_available():
        raise ValueError(
            "there is no CUDA GPU here; --rehearse goes through the same on the CPU at toy sizes"
        )
    deadline = time.monotonic() + 60 * budget_minutes
    work = out / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    facts = Machine("cpu" if rehearse else "cuda").facts(
        command="python -m bench " + " ".join(sys.argv[1:]), rehearsal=rehearse, commit=commit
    ) | {"stages": []}
    failed = False
    # A GPU that the CUDA kernels were not compiled for has them built anew, as one without any has.
    missing = extension.problem() or ("" if rehearse else extension.cuda_problem())
    for stage in stages(rehearse, missing or None):
        left = deadline - time.monotonic() - _RESERVE
        row: Record = {"name": stage.name, "seconds": 0.0, "outcome": ""}
        facts["stages"].append(row)
        if left <= 0:
            row["outcome"] = "skipped: the budget is spent"
        elif stage.needs and shutil.which(stage.needs) is None:
            row["outcome"] = f"skipped: there is no {stage.needs} here"
        else:
            limit = min(left, stage.share * 60 * budget_minutes)
            failed |= _run(stage, limit, work, facts, out, row, commit) and stage.ours
        print(f"{stage.name:<28}{row['seconds']:7.1f} s  {row['outcome']}", flush=True)
    _merge(out, facts)
    _finish(out)
    return 1 if failed else 0


def _run(
    stage: Stage, limit: float, work: Path, facts: Record, out: Path, row: Record, commit: str | None
) -> bool:
    """Run one stage, merging its records as they come; whether it failed."""
    command = stage.command
    if command[0].startswith("-"):
        command = [sys.executable, *command]
    if stage.benchmark:
        command = [*command, "--out", str(work / stage.name), *(["--commit", commit] if commit else [])]
    started = time.monotonic()
    with (work / f"{stage.name}.log").open("w") as log:
        log.write(" ".join(command) + "\n")
        log.flush()
        process = subprocess.Popen(
            command,
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
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
        "ended: out of time"
        if late
        else "ok"
        if process.returncode == 0
        else f"failed: exit {process.returncode}"
    )
    _merge(out, facts)
    return not late and process.returncode != 0


def _merge(out: Path, facts: Record) -> None:
    """All records of all stages in one file; each stage measured its own roofs."""
    records: list[Record] = []
    for stage in facts["stages"]:
        path = out / "work" / stage["name"] / "results.json"
        for record in load(path) if path.exists() else []:
            records.append({k: v for k, v in record.items() if k not in facts})
    if records:
        records[0] = records[0] | facts
        save(out / "results.json", records)


def _finish(out: Path) -> None:
    from bench.report import write_report

    results = out / "results.json"
    if results.exists():
        write_report(results, out)
        shutil.move(out / "plots", out / "work" / "plots")
    with tarfile.open(out / "rest.tar.gz", "w:gz") as tar:
        tar.add(out / "work", "rest")
    shutil.rmtree(out / "work")
    print(f"in {out}: " + ", ".join(sorted(p.name for p in out.iterdir())))
