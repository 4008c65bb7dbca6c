"""Command line of the benchmarks, in a checkout: `python -m bench --help`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.cli import parser

# The dtypes of each preset; training steps use the last one.
DTYPES_OF = {"tiny": ("fp32",), "quick": ("fp32", "bf16"), "cpu": ("fp32", "bf16"), "gpu": ("fp32", "bf16")}
# Approximate seconds of the rounds of a case and direction.
SECONDS = {"tiny": 0.3, "quick": 1.2, "full": 2.0}


def main(arguments: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0; 1 if a result of fastgpt is wrong or two files differ; 2 for a wrong option; 130 after an interrupt.
    """
    options = parser().parse_args(arguments)
    try:
        return COMMANDS.get(options.command, _measure)(options)
    except ValueError as error:
        print(f"python -m bench: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("python -m bench: interrupted; the output file has the finished cases", file=sys.stderr)
        return 130


def _measure(options: argparse.Namespace) -> int:
    import torch

    from bench.harness.machine import Machine
    from bench.harness.records import Results

    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here. Omit --device, or use --device cpu.")
    if options.tiny:
        preset = "tiny"
    elif device == "cuda":
        preset = "gpu"
    else:
        preset = "quick" if options.quick else "cpu"
    if options.tiny and device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at import, which comes later
    jobs = list(_jobs(options, preset))

    machine = Machine(device)
    out = options.out or (Path("out/bench") if options.plot else None)
    command = "python -m bench " + " ".join(sys.argv[1:])
    facts = machine.facts(command=command, rehearsal=options.tiny, commit=options.commit)
    results = Results(out / "results.json" if out else None, facts)
    _print_facts(facts)
    return _run(jobs, machine, results, options, out)


def _jobs(options: argparse.Namespace, preset: str) -> Iterator[tuple[str, Any, Any]]:
    """Yield the jobs that the options select: ("op", op, case) or (kind, dtype, arguments of the function).

    Raises:
        ValueError: unknown shape, peer or backend; the message lists the known ones.
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
        if command == kind or (command == "all" and kind != "generate")  # minutes without a KV cache
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
            raise ValueError(f"unknown {what} {value!r}. Use one of: {', '.join(known)}")


def _run(
    jobs: list[tuple[str, Any, Any]],
    machine: Any,
    results: Any,
    options: argparse.Namespace,
    out: Path | None,
) -> int:
    """Measure the jobs and print their records; return 1 if a result of fastgpt is wrong."""
    from tqdm import tqdm

    from bench.harness.machine import bound_records
    from bench.harness.measure import Plan, run_case
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
    results.add(*bound_records(machine, dtypes))
    _print_records(results.records, options)
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
            _print_records(records, options)
    _print_end(results, options, time.perf_counter() - started)
    if options.plot:
        from bench.report.page import html

        assert out is not None
        (out / "report.html").write_text(html([results.records]), encoding="utf-8")
        print(f"wrote {out / 'report.html'}", file=sys.stderr)
    wrong = results.wrong()
    for record in wrong:
        case = f"{record['op']} {record['case']} {record['dtype']}"
        print(f"WRONG: fastgpt {record['backend']}, {case}: {record['reason']}", file=sys.stderr)
    return 1 if wrong else 0


def _print_facts(facts: dict[str, Any]) -> None:
    changes = " with changes" if facts["dirty"] else ""
    versions = f"torch {facts['torch']}, triton {facts['triton']}; {facts['threads']} threads"
    print(f"{facts['device']}; {versions}", file=sys.stderr)
    print(
        f"{facts['malloc']}; clocks: {facts['clocks']}; commit {facts['commit']}{changes}",
        file=sys.stderr,
    )


def _print_records(records: list[dict[str, Any]], options: argparse.Namespace) -> None:
    """Print a line for each record: the time, or the reason without one."""
    from tqdm import tqdm

    if not options.json:
        with tqdm.external_write_mode():
            print("\n".join(map(_line, records)), flush=True)


def _line(r: dict[str, Any]) -> str:
    from bench.harness.records import contender

    start = f"{r['op']:<21}{r['case'] + ' ':<21}{r['dtype']:<5}{r['direction']:<9}{contender(r):<34}"
    if r["group"] == "roofline":
        copy = r["direction"] == "copy"
        rate = (r["bytes"] if copy else r["flops"]) / r["seconds"] / 1e9
        return f"{start}{rate:,.0f} {'GB/s' if copy else 'GFLOP/s'}"
    if r["status"] != "ok":
        return f"{start}{r['status']}: {r['reason']}"
    bound = "MFU" if r["group"] == "train" else f"of the {r['bound']} roofline"
    words = [f"{r['seconds'] * 1e3:10.3f} ms ±{r['spread']:<5.0%}{r['share_of_roofline']:4.0%} {bound}"]
    if r.get("mfu_datasheet"):
        words[0] += f", {r['mfu_datasheet']:.0%} of the datasheet's peak"
    if "tokens_per_second" in r:
        words.append(f"{r['tokens_per_second']:,.0f} tokens/s")
    if "host_seconds" in r:
        words.append(f"host {r['host_seconds'] * 1e3:.3f} ms")
    if r["peak_bytes"] is not None:
        words.append(f"peak {r['peak_bytes'] / 2**20:,.0f} MiB")
    if r["ratio"] is not None:
        words.append(f"{r['ratio']:.2f}× our time ({r['ratio_low']:.2f} to {r['ratio_high']:.2f})")
    return start + "  ".join(words)


def _print_end(results: Any, options: argparse.Namespace, seconds: float) -> None:
    from bench.harness.scaling import COLUMNS, fits, rows
    from bench.report.readme import markdown_table

    if options.json:
        print(json.dumps(results.records, ensure_ascii=False, indent=1))
        return
    fitted = fits(results.records)
    if options.tiny:
        print("\ntoy sizes: a rehearsal, its times have no meaning")
    elif fitted:
        print("\n" + markdown_table(COLUMNS, rows(fitted), left=COLUMNS))
    where = f", in {results.path}" if results.path else ""
    print(f"\n{len(results.records)} records in {seconds:.0f} s{where}")


def _trainer(options: argparse.Namespace) -> int:
    from bench.training.trainer import run

    return run(options.size, options.rounds, options.json)


def _data(options: argparse.Namespace) -> int:
    from bench.training.data import run

    if options.rounds < 1:
        raise ValueError(f"--rounds is {options.rounds}. Use 1 or more.")
    return run(options.rounds, options.json)


def _gpu(options: argparse.Namespace) -> int:
    from bench.gpu import run_gpu

    return run_gpu(options.out, options.budget_minutes, rehearse=options.rehearse, commit=options.commit)


def _resources(options: argparse.Namespace) -> int:
    if os.environ.pop("TRITON_INTERPRET", "") not in ("", "0"):
        print("TRITON_INTERPRET is ignored: resources needs Triton's compiler.", file=sys.stderr)
    from bench.codegen import cubins
    from bench.codegen.launches import configurations
    from bench.codegen.resources import run
    from bench.codegen.sass import ARCHITECTURES

    known = list(dict.fromkeys(c.op for c in configurations()))
    _check("op", options.op, known)
    _check("architecture", options.arch, ARCHITECTURES)
    if options.write and (options.op or options.arch):
        raise ValueError("--write needs all ops and architectures. Omit the ops and --arch.")
    chosen = [c for c in configurations() if c.op in (options.op or known)]
    files = cubins.sources(options.op)
    if options.source == "triton" or (cubins.problem() and options.source is None):
        files = []
    elif options.source == "cuda":
        chosen = []
        if cubins.problem():
            raise ValueError(
                f"the CUDA kernels cannot be compiled: {cubins.problem()}. Install the CUDA toolkit."
            )
    architectures = options.arch or ARCHITECTURES
    return run(chosen, files, options.op, architectures, as_json=options.json, write=options.write)


def _tune(options: argparse.Namespace) -> int:
    if options.shape and len(options.op) != 1:
        raise ValueError("--shape is for one op. Name the op: python -m bench tune OP --shape ...")
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it at import, which comes later
    from bench.codegen.tune import run

    return run(options.op, options.shape or [], options.dtype or ["bf16"], rehearse=options.rehearse)


def _report(options: argparse.Namespace) -> int:
    from bench.harness.machine import ROOT
    from bench.harness.records import load
    from bench.report.page import html
    from bench.report.readme import block, update, write_plots

    results = ROOT / "bench" / "results"
    paths = sorted(results.glob("*/results.json"))
    if options.html:
        options.html.write_text(html([load(path) for path in paths]), encoding="utf-8")
        print(f"wrote {options.html}")
        return 0
    for path in paths:
        for written in write_plots(path):
            print(f"wrote {written}")
    for page, ops in (("README.md", False), ("docs/benchmarks.md", True)):
        changed = update(ROOT / page, block(results, ops=ops, root="../" * page.count("/")))
        print(f"{page} is " + ("updated" if changed else "up to date"))
    return 0


def _compare(options: argparse.Namespace) -> int:
    from bench.harness.compare import compare
    from bench.harness.records import load

    table, share = compare(load(options.a), load(options.b))
    print(table)
    return 0 if share >= 0.9 else 1


COMMANDS: dict[str, Callable[[argparse.Namespace], int]] = {
    "trainer": _trainer, "data": _data, "gpu": _gpu, "resources": _resources, "tune": _tune, "report": _report,
    "compare": _compare,
}  # fmt: skip


if __name__ == "__main__":
    from fastgpt.console import run_command

    sys.exit(run_command(main))
