"""The benchmarks' command line:  python -m bench --help  (from a checkout)"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fastgpt.backends import OPS as OP_NAMES

MEASURING = {
    **{name: f"{name}: forward and backward beside every peer" for name in OP_NAMES},
    "ops": "all ops",
    "train": "whole training steps of a GPT-2",
    "accelerate": "whole training steps of models of transformers, as they come and accelerated",
    "generate": "tokens a second of generated text, with the cache and without, beside transformers'",
    "scaling": "seconds and memory of each op while one size grows",
    "all": "ops, train, accelerate and scaling",
}


# The dtypes of each preset; the last one is training's.
DTYPES_OF = {"tiny": ("fp32",), "quick": ("fp32", "bf16"), "cpu": ("fp32", "bf16"), "gpu": ("fp32", "bf16")}
# Seconds of rounds a case and direction, about.
SECONDS = {"tiny": 0.3, "quick": 1.2, "full": 2.0}


def main(arguments: list[str] | None = None) -> int:
    """Run a command; 0 if all is well, 1 if a result of ours was wrong, 2 for a wrong option."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.run(options))
    except ValueError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m bench: interrupted; what was measured is in the output file", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench", description="fastgpt's benchmarks")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, text in MEASURING.items():
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=_measure, command=name)
        command.add_argument(
            "--quick", action="store_true", help="the first sizes only, forward + backward, short"
        )
        command.add_argument(
            "--tiny", action="store_true", help="toy sizes, on the CPU Triton's interpreter too"
        )
        command.add_argument(
            "--shape", action="append", metavar="AxB…", help="only this size (may be repeated)"
        )
        command.add_argument(
            "--dtype", action="append", choices=("fp32", "bf16", "fp16"), help="only this dtype"
        )
        command.add_argument(
            "--peer", action="append", metavar="NAME", help="only this peer; none for no peer"
        )
        command.add_argument("--backend", action="append", metavar="NAME", help="only this backend of ours")
        command.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
        command.add_argument(
            "--seconds", type=float, help="time for the rounds of one case and direction, about"
        )
        command.add_argument("--out", type=Path, metavar="DIR", help="write DIR/results.json as results come")
        command.add_argument("--json", action="store_true", help="print the records instead of the table")
        command.add_argument("--plot", action="store_true", help="also draw DIR/plots and DIR/report.html")
        command.add_argument("--commit", help="what commit this is, where there is no .git to ask")

    trainer = commands.add_parser(
        "trainer", help="fastgpt train beside a bare training step, and packed documents beside padded ones"
    )
    trainer.set_defaults(run=_trainer)
    trainer.add_argument("--size", default="cpu", choices=("tiny", "cpu"), help="default: cpu")
    trainer.add_argument("--rounds", type=int, default=20, metavar="N", help="default: 20")
    trainer.add_argument("--json", action="store_true", help="print one JSON object instead of the table")

    data = commands.add_parser("data", help="speed and memory of preparing data, beside tokenizers alone")
    data.set_defaults(run=_data)
    data.add_argument("--rounds", type=int, default=5, metavar="N", help="default: 5")
    data.add_argument("--json", action="store_true", help="print one JSON object instead of the table")

    gpu = commands.add_parser("gpu", help="everything a GPU can tell, in a budget of minutes")
    gpu.set_defaults(run=_gpu)
    gpu.add_argument("--budget-minutes", type=float, default=12.0, metavar="N", help="default: 12")
    gpu.add_argument("--out", type=Path, default=Path("out/gpu"), metavar="DIR", help="default: out/gpu")
    gpu.add_argument(
        "--rehearse", action="store_true", help="the same on the CPU, toy sizes, Triton interpreted"
    )
    gpu.add_argument("--commit", help="what commit this is, where there is no .git to ask")

    taken = commands.add_parser(
        "resources", help="what each GPU kernel takes of three generations of GPUs; needs none"
    )
    taken.set_defaults(run=_resources)
    taken.add_argument("op", nargs="*", help="only the kernels of these ops")
    taken.add_argument(
        "--arch",
        action="append",
        metavar="NAME",
        help="only this one: sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_120",
    )
    taken.add_argument(
        "--source",
        choices=("triton", "cuda"),
        help="only these (default: both, those in CUDA C++ where nvcc is)",
    )
    taken.add_argument("--json", action="store_true", help="print the records instead of the table")
    taken.add_argument("--write", action="store_true", help="also write them to bench/results/resources.json")

    tune = commands.add_parser("tune", help="faster tile sizes for this GPU and your sizes, kept on the disk")
    tune.set_defaults(run=_tune)
    tune.add_argument("op", nargs="*", help="only these ops")
    tune.add_argument("--shape", action="append", metavar="AxB…", help="this size (may be repeated; one op)")
    tune.add_argument("--dtype", action="append", choices=("fp32", "bf16", "fp16"), help="default: bf16")
    tune.add_argument(
        "--rehearse", action="store_true", help="the same on the CPU, toy sizes, Triton interpreted"
    )

    report = commands.add_parser(
        "report", help="tables and plots of bench/results, and the README's from them"
    )
    report.set_defaults(run=_report)

    compared = commands.add_parser("compare", help="whether two result files agree")
    compared.set_defaults(run=_compare)
    compared.add_argument("a", type=Path)
    compared.add_argument("b", type=Path)
    return parser


def _measure(options: argparse.Namespace) -> int:
    import torch

    from bench.harness.machine import Machine
    from bench.harness.records import Results

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("there is no CUDA GPU here: omit --device, or give --device cpu")
    if options.tiny:
        preset = "tiny"
    elif device == "cuda":
        preset = "gpu"
    else:
        preset = "quick" if options.quick else "cpu"
    if options.tiny and device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nothing has done yet
    jobs = list(_jobs(options, preset))

    machine = Machine(device)
    out = options.out or (Path("out/bench") if options.plot else None)
    command = "python -m bench " + " ".join(sys.argv[1:])
    facts = machine.facts(command=command, rehearsal=options.tiny, commit=options.commit)
    results = Results(out / "results.json" if out else None, facts)
    _introduce(facts, sys.stderr)
    return _run(jobs, machine, results, options, out)


def _jobs(options: argparse.Namespace, preset: str) -> Iterator[tuple[str, Any, Any]]:
    """(kind, op or None, case or size) of everything the options ask for.

    Raises ValueError, with the list of what is known, for a shape, peer or backend that is not.
    """
    from bench.ops.registry import OPS
    from bench.training import accelerate, generate, train
    from bench.training.steps import name
    from fastgpt.backends import BACKENDS

    command = options.command
    several = command in ("ops", "all", "scaling")
    ops = [op for op in OPS.values() if several or op.name == command]
    steps = {
        kind: bench
        for kind, bench in (("train", train), ("accelerate", accelerate), ("generate", generate))
        if command == kind or (command == "all" and kind != "generate")  # without the cache it takes minutes
    }
    peers = [p.name for op in ops for p in op.peers] + [p for bench in steps.values() for p in bench.PEERS]
    _check("peer", options.peer, [*sorted(set(peers)), "none"])
    _check("backend", options.backend, [b for b in BACKENDS if b != "reference"])

    cases = [(op, case) for op in ops for case in op.cases(preset, options.dtype or DTYPES_OF[preset])]
    if command == "scaling":
        cases = []
    # The most important shape of every op comes first, so that an interrupted run has all of them.
    first = [("op", op, case, case.shape) for op, case in cases if case.dims == op.shapes[preset][0]]
    rest = [("op", op, case, case.shape) for op, case in cases if case.dims != op.shapes[preset][0]]
    found: list[tuple[str, Any, Any, str]] = [*first]
    dtypes = options.dtype or DTYPES_OF[preset][-1:]
    if "train" in steps:
        found += [("train", dtype, (size,), name(size)) for size in train.SIZES[preset] for dtype in dtypes]
    if "accelerate" in steps:
        models = accelerate.SIZES[preset]
        found += [("accelerate", dtype, model, name(model[1])) for model in models for dtype in dtypes]
    if "generate" in steps:
        both = options.dtype or DTYPES_OF[preset]
        found += [("generate", d, (size,), name(size)) for size in generate.SIZES[preset] for d in both]
    if not options.quick:
        found += rest
    if command == "scaling" or (command == "all" and not options.quick):
        swept = "cpu" if preset == "quick" else preset
        found += [("op", op, case, case.shape) for op in ops for case in op.swept(swept)]
    _check("shape", options.shape, list(dict.fromkeys(shape for *_, shape in found)))
    return ((kind, a, b) for kind, a, b, shape in found if not options.shape or shape in options.shape)


def _check(what: str, given: Sequence[str] | None, known: Sequence[str]) -> None:
    for value in given or []:
        if value not in known:
            raise ValueError(f"unknown {what} {value!r}; known here: {', '.join(known)}")


def _run(
    jobs: list[tuple[str, Any, Any]],
    machine: Any,
    results: Any,
    options: argparse.Namespace,
    out: Path | None,
) -> int:
    from tqdm import tqdm

    from bench.harness.measure import Plan, roof_records, run_case
    from bench.report.scaling import fits, table
    from bench.training.accelerate import run_accelerate
    from bench.training.generate import run_generate
    from bench.training.train import run_train

    runs: dict[str, Callable[..., list[dict[str, Any]]]] = {
        "train": run_train,
        "accelerate": run_accelerate,
        "generate": run_generate,
    }
    short = options.quick or options.tiny
    length = "tiny" if options.tiny else "quick" if options.quick else "full"
    seconds = SECONDS[length] if options.seconds is None else options.seconds
    peers = None if options.peer is None else tuple(options.peer)
    plan = Plan(
        seconds=seconds,
        directions=("fwd+bwd",) if short else ("fwd", "fwd+bwd"),
        backends=None if options.backend is None else tuple(options.backend),
        peers=peers,
    )
    started = time.perf_counter()
    dtypes = list(dict.fromkeys(b.dtype if kind == "op" else a for kind, a, b in jobs))
    results.add(*roof_records(machine, dtypes))
    _show(results.records, options)
    with tqdm(jobs, unit="case", disable=None, file=sys.stderr) as bar:
        for kind, a, b in bar:
            bar.set_description(f"{a.name} {b.name} {b.dtype}" if kind == "op" else f"{kind} {b}")
            if kind != "op":
                steps = Plan(10 * seconds, 5, 41, ("step",), plan.backends, peers)
                records = runs[kind](*b, a, machine, steps, compared=4 if short else 8)
            else:
                swept = Plan(seconds / 3, 3, 21, ("fwd+bwd",), plan.backends, peers)
                records = run_case(a, b, machine, swept if b.sweep else plan)
            results.add(*records)
            _show(records, options)
    rows = fits(results.records)
    if options.json:
        print(json.dumps(results.records, ensure_ascii=False, indent=1))
    else:
        if options.tiny:
            print("\ntoy sizes: a rehearsal, whose times say nothing")
        elif rows:
            print("\n" + table(rows))
        print(
            f"\n{len(results.records)} records in {time.perf_counter() - started:.0f} s"
            + (f", in {results.path}" if out else "")
        )
    if options.plot:
        from bench.report.write import write_report

        assert out is not None
        for path in write_report(results.path, out):
            print(f"wrote {path}", file=sys.stderr)
    wrong = results.wrong()
    for record in wrong:
        case = f"{record['op']} {record['case']} {record['dtype']}"
        print(f"WRONG: fastgpt {record['backend']}, {case}: {record['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def _introduce(facts: dict[str, Any], file: Any) -> None:
    state = {True: " with changes", False: "", None: ""}[facts["dirty"]]
    print(
        f"{facts['device']}; torch {facts['torch']}, triton {facts['triton']}; {facts['threads']} threads",
        file=file,
    )
    print(f"heap: {facts['heap']}; clocks: {facts['clocks']}; commit {facts['commit']}{state}", file=file)


def _show(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """A line for each record; what has no time says why."""
    from tqdm import tqdm

    from bench.report.headlines import contender

    if options.json:
        return
    lines = []
    for r in records:
        start = f"{r['op']:<21}{r['case'] + ' ':<21}{r['dtype']:<5}{r['direction']:<9}{contender(r):<34}"
        if r["group"] == "roof":
            rate = f"{r['bytes'] / r['seconds'] / 1e9:,.0f} GB/s" if r["direction"] == "copy" else ""
            lines.append(start + (rate or f"{r['flops'] / r['seconds'] / 1e9:,.0f} GFLOP/s"))
        elif r["status"] != "ok":
            lines.append(f"{start}{r['status']}: {r['reason']}")
        else:
            host = f"  host {r['host_seconds'] * 1e3:.3f} ms" if "host_seconds" in r else ""
            peak = "" if r["peak_bytes"] is None else f"  peak {r['peak_bytes'] / 2**20:,.0f} MiB"
            speed = f"  {r['tokens_per_second']:,.0f} tokens/s" if "tokens_per_second" in r else ""
            sheet = f", {r['mfu_datasheet']:.0%} of the datasheet's" if r.get("mfu_datasheet") else ""
            ratio = (
                ""
                if r["ratio"] is None
                else f"  takes {r['ratio']:.2f}× our time ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})"
            )
            share = f"{r['share_of_roof']:4.0%} of the {r['bound']} roof{sheet}"
            lines.append(
                f"{start}{r['seconds'] * 1e3:10.3f} ms ±{r['spread']:<5.0%}{share}{speed}{host}{peak}{ratio}"
            )
    with tqdm.external_write_mode():
        print("\n".join(lines), flush=True)


def _trainer(options: argparse.Namespace) -> int:
    from bench.training.trainer import run

    return run(options.size, options.rounds, options.json)


def _data(options: argparse.Namespace) -> int:
    from bench.training.data import run

    if options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, not {options.rounds}")
    return run(options.rounds, options.json)


def _gpu(options: argparse.Namespace) -> int:
    from bench.gpu import run_gpu

    return run_gpu(options.out, options.budget_minutes, rehearse=options.rehearse, commit=options.commit)


def _resources(options: argparse.Namespace) -> int:
    if os.environ.pop("TRITON_INTERPRET", "") not in ("", "0"):
        print(
            "TRITON_INTERPRET is set; resources needs Triton's compiler and goes without it", file=sys.stderr
        )
    from bench.codegen import cubins
    from bench.codegen.launches import configurations
    from bench.codegen.resources import run
    from bench.codegen.sass import ARCHITECTURES

    known = list(dict.fromkeys(c.op for c in configurations()))
    _check("op", options.op, known)
    _check("architecture", options.arch, ARCHITECTURES)
    if options.write and (options.op or options.arch):
        raise ValueError(
            "--write is for all ops and architectures at once: leave out what chooses among them"
        )
    chosen = [c for c in configurations() if c.op in (options.op or known)]
    files = cubins.sources(options.op)
    if options.source == "triton" or (cubins.problem() and options.source is None):
        files = []
    elif options.source == "cuda":
        chosen = []
        if cubins.problem():
            raise ValueError(f"the CUDA kernels cannot be compiled: {cubins.problem()}")
    architectures = options.arch or ARCHITECTURES
    return run(chosen, files, options.op, architectures, as_json=options.json, write=options.write)


def _tune(options: argparse.Namespace) -> int:
    if options.shape and len(options.op) != 1:
        raise ValueError("--shape is for one op: name it, python -m bench tune OP --shape ...")
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which nothing has done yet
    from bench.codegen.tune import run

    return run(options.op, options.shape or [], options.dtype or ["bf16"], rehearse=options.rehearse)


def _report(options: argparse.Namespace) -> int:
    from bench.harness.machine import ROOT
    from bench.report.write import update_readme, write_report

    results = ROOT / "bench" / "results"
    for path in sorted(results.glob("*/results.json")):
        for written in write_report(path, path.parent):
            print(f"wrote {written}")
    changed = update_readme(ROOT / "README.md", results)
    print("README.md " + ("updated" if changed else "was up to date"))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from bench.harness.compare import compare
    from bench.harness.records import load

    table, share = compare(load(options.a), load(options.b))
    print(table)
    return 0 if share >= 0.9 else 1


if __name__ == "__main__":
    from fastgpt.console import run_command

    sys.exit(run_command(main))
