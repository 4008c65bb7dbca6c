"""The options of `python -m bench`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastgpt.backends import OPS as OP_NAMES

MEASUREMENTS = {
    **{name: f"{name}: forward and backward next to every peer" for name in OP_NAMES},
    "ops": "all ops",
    "train": "training steps of a GPT-2",
    "accelerate": "training steps of transformers models, unmodified and accelerated",
    "generate": "tokens/s of text generation, with and without KV cache, next to transformers",
    "scaling": "seconds and memory of each op over one size",
    "all": "ops, train, accelerate and scaling",
}
_DTYPES = ("fp32", "bf16", "fp16")
_JSON = "JSON output instead of a table"
_REHEARSE = "the same steps on the CPU, at toy sizes, with Triton interpreted"
_COMMIT = "commit of these files, for a directory without .git"


def parser() -> argparse.ArgumentParser:
    """Build the parser; the name of the subcommand is in `command`."""
    whole = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of fastgpt.")
    commands = whole.add_subparsers(required=True, metavar="COMMAND", dest="command")
    for name, text in MEASUREMENTS.items():
        _add_measurement(commands, name, text)
    _add_studies(commands)
    _add_gpu(commands)
    _add_codegen(commands)

    report = commands.add_parser(
        "report", help="tables and plots of README and docs/benchmarks.md from bench/results"
    )
    report.add_argument("--html", type=Path, metavar="OUT", help="path of one HTML page with all results")

    compare = commands.add_parser("compare", help="comparison of the ratios in two result files")
    compare.add_argument("a", type=Path, help="first results.json")
    compare.add_argument("b", type=Path, help="second results.json")
    return whole


def _add_measurement(commands: Any, name: str, text: str) -> None:
    command = commands.add_parser(name, help=text, description=text)
    command.add_argument(
        "--quick", action="store_true", help="only the first size of each op, forward + backward, few rounds"
    )
    command.add_argument("--tiny", action="store_true", help="toy sizes; on the CPU also Triton, interpreted")
    command.add_argument("--shape", action="append", metavar="AxB…", help="only this size (may be repeated)")
    command.add_argument(
        "--dtype", action="append", choices=_DTYPES, help="only this dtype (may be repeated)"
    )
    command.add_argument(
        "--peer", action="append", metavar="NAME", help='only this peer (may be repeated); "none": no peer'
    )
    command.add_argument(
        "--backend", action="append", metavar="NAME", help="only this backend of fastgpt (may be repeated)"
    )
    command.add_argument(
        "--device", choices=("cpu", "cuda"), help="device (default: cuda if available, else cpu)"
    )
    command.add_argument(
        "--seconds", type=float, help="approximate duration of the rounds of a case and direction"
    )
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="directory of results.json, which is saved after every case"
    )
    command.add_argument("--json", action="store_true", help=_JSON)
    command.add_argument(
        "--plot",
        action="store_true",
        help="also DIR/report.html, with tables and plots (default DIR: out/bench)",
    )
    command.add_argument("--commit", help=_COMMIT)


def _add_studies(commands: Any) -> None:
    trainer = commands.add_parser(
        "trainer", help="fastgpt train next to a bare training step; packed next to padded documents"
    )
    trainer.add_argument(
        "--size", default="cpu", choices=("tiny", "cpu"), help="size of the model (default: cpu)"
    )
    trainer.add_argument("--rounds", type=int, default=20, metavar="N", help="number of rounds (default: 20)")
    trainer.add_argument("--json", action="store_true", help=_JSON)

    data = commands.add_parser(
        "data", help="speed and memory of data preparation, next to the package tokenizers alone"
    )
    data.add_argument("--rounds", type=int, default=5, metavar="N", help="number of rounds (default: 5)")
    data.add_argument("--json", action="store_true", help=_JSON)


def _add_gpu(commands: Any) -> None:
    gpu = commands.add_parser("gpu", help="tests, benchmarks and profiles on a GPU within a time budget")
    gpu.add_argument(
        "--budget-minutes", type=float, default=12.0, metavar="N", help="time budget (default: 12)"
    )
    gpu.add_argument(
        "--out",
        type=Path,
        default=Path("out/gpu"),
        metavar="DIR",
        help="directory of the results (default: out/gpu)",
    )
    gpu.add_argument("--rehearse", action="store_true", help=_REHEARSE)
    gpu.add_argument("--commit", help=_COMMIT)

    tune = commands.add_parser(
        "tune", help="faster tile sizes for this GPU, cached on disk for the launchers"
    )
    tune.add_argument("op", nargs="*", help="only these ops")
    tune.add_argument("--shape", action="append", metavar="AxB…", help="size (may be repeated; one op)")
    tune.add_argument(
        "--dtype", action="append", choices=_DTYPES, help="dtype (may be repeated; default: bf16)"
    )
    tune.add_argument("--rehearse", action="store_true", help=_REHEARSE)


def _add_codegen(commands: Any) -> None:
    resources = commands.add_parser(
        "resources", help="registers, spills, shared memory and occupancy of the GPU kernels; needs no GPU"
    )
    resources.add_argument("op", nargs="*", help="only the kernels of these ops")
    resources.add_argument(
        "--arch",
        action="append",
        metavar="NAME",
        help="only this architecture (may be repeated): sm_80, sm_86, sm_89, sm_90a, sm_100a, sm_120",
    )
    resources.add_argument(
        "--source",
        choices=("triton", "cuda"),
        help="only these kernels (default: Triton, and CUDA C++ if nvcc is installed)",
    )
    resources.add_argument("--json", action="store_true", help=_JSON)
    resources.add_argument("--write", action="store_true", help="update of bench/results/resources.json")
