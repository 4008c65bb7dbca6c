"""Helpers of the benchmark tests: the schema, the command line as a process, and made-up results."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jsonschema

from bench.report.plots import PLOTS

NAMES = tuple(PLOTS)
ROOT = Path(__file__).parents[2]
SCHEMA = json.loads((ROOT / "bench" / "schema.json").read_text())


def validate(records):
    """Raises unless the records follow the schema."""
    jsonschema.Draft202012Validator(SCHEMA).validate(records)


def bench(*arguments, **options):
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    return subprocess.run(
        [sys.executable, "-m", "bench", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, check=False, env=environment, **options,
    )  # fmt: skip


SCRIPT = "does not build: <script>alert('x')</script> & more"
EMPTY = {
    "reason": None, "verified": True, "error": None, "seconds": None, "spread": None, "rounds": 9, "ratio": None,
    "ratio_low": None, "ratio_high": None, "flops": 1e9, "bytes": 10**9, "roofline_seconds": None,
    "share_of_roofline": None, "bound": "memory", "peak_bytes": None, "status": "ok", "dims": {}, "peer": None,
    "backend": "cpp", "group": "ops", "direction": "fwd+bwd", "dtype": "fp32", "op": "gelu", "case": "64x64",
}  # fmt: skip
MACHINE = {
    "device": "Some CPU <2 cores>", "torch": "2.13.0", "triton": None, "commit": "0123456789abcdef", "dirty": False,
    "date": "2026-01-01T00:00:00+00:00", "command": "python -m bench all", "python": "3.11.7", "threads": 2,
    "malloc": "malloc trimming disabled", "driver": None, "cuda": None, "cudnn": None, "clocks": None,
    "packages": {"torch": "2.13.0"}, "rehearsal": False, "datasheet_flops": None,
}  # fmt: skip
GPU = {"device": "NVIDIA H200", "cuda": "12.8", "driver": "570", "datasheet_flops": {"bf16": 989e12}}
PEERS = {"PyTorch": 1.5, "torch.compile": 1.2, "cut-cross-entropy (torch.compile)": 3.0}
CASES = (
    ("linear_cross_entropy", "2048x768x50304", 4e11, 9e8),
    ("attention", "16x6x256x64", 2e9, 1e8), ("attention", "1x4x4096x64", 1.5e10, 2e8),
    ("gelu", "4096x3072 none", 3e8, 3e8), ("gelu", "4096x3072 tanh", 3e8, 3e8),
    ("add_layer_norm", "4096x768", 7e7, 1e8),
)  # fmt: skip


def row(**fields):
    return EMPTY | fields


def peer(name, **fields):
    return row(peer=name, backend="torch", **fields)


def bad(status, **fields):
    return row(status=status, reason=SCRIPT, verified=False, rounds=0) | fields | {"seconds": None}


def roofline_bounds(dtype):
    copy = peer(
        "PyTorch", op="roofline", group="roofline", case="copy", dtype=dtype, direction="copy", seconds=0.1
    )
    matmul = copy | {"case": "matmul", "direction": "matmul", "flops": 2e11, "seconds": 1.0}
    return [copy, copy | {"seconds": 0.05, "case": "a faster copy"}, matmul]


def timed(op, case, flops, moved, dtype, direction):
    """Yield ours, three valid peers and three invalid ones."""
    seconds = {"fwd": 0.012, "fwd+bwd": 0.04}[direction]
    shape = {"op": op, "case": case, "dtype": dtype, "direction": direction, "flops": flops, "bytes": moved}
    shape |= {
        "roofline_seconds": seconds / 2,
        "bound": "compute" if flops / moved > 10 else "memory",
        "error": 0.4,
    }
    yield row(**shape, seconds=seconds, spread=0.02, share_of_roofline=0.5, peak_bytes=3 << 20)
    for name, r in PEERS.items():
        more = {"seconds": seconds * r, "spread": 0.02, "share_of_roofline": 0.5 / r, "peak_bytes": 12 << 20}
        yield peer(name, **shape, **more, ratio=r, ratio_low=0.9 * r, ratio_high=1.1 * r)
    for status in ("missing", "failed", "wrong"):
        yield bad(status, **shape | {"peer": f"<{status} peer>", "error": None})


def series():
    """PyTorch runs out of memory at the largest size."""
    for t in range(256, 2049, 256):
        shape = {
            "op": "attention",
            "group": "scaling",
            "sweep": "T",
            "dims": {"B": 1, "T": t},
            "case": f"1 {t}",
            "roofline_seconds": 5e-9 * t**2,
            "min_peak_bytes": 900 * t,
        }
        yield row(**shape, seconds=1e-8 * t**2, peak_bytes=1000 * t)
        yield peer("torch.compile", **shape, seconds=2e-8 * t**2, peak_bytes=1100 * t)
        eager = peer("PyTorch", **shape, seconds=3e-8 * t**2, peak_bytes=10 * t**2)
        yield eager if t < 2048 else bad("failed", **shape, peer="PyTorch")


def training(op, case):
    shape = {"op": op, "group": "train", "case": case, "direction": "step", "dtype": "bf16"}
    shape |= {"dims": {"L": 6, "H": 6, "C": 384, "T": 256, "B": 4, "V": 50257}}
    for name, r in {None: 1.0, **PEERS}.items():
        more = {"losses": [5.0 - 0.1 * i + 1e-4 * r for i in range(8)], "mfu_measured": 0.4 / r}
        more |= {"seconds": r, "tokens_per_second": 9000 / r, "ratio": r if name else None}
        yield row(**shape, **more, peer=name)
    yield bad("wrong", **shape, peer="Liger-Kernel", losses=[6.0] * 8, tokens_per_second=9000)


def everything(**machine):
    found = [r for dtype in ("fp32", "bf16") for r in roofline_bounds(dtype)]
    kinds = [(dtype, direction) for dtype in ("fp32", "bf16") for direction in ("fwd", "fwd+bwd")]
    found += [r for case in CASES for kind in kinds for r in timed(*case, *kind)]
    return [
        found[0] | MACHINE | machine,
        *found[1:],
        *series(),
        *training("train", "6x6x384"),
        *training("accelerate", "GPT2LMHeadModel 6x6"),
    ]


def without(group):
    return [r for r in everything() if r["group"] != group]


def spoilt(reason, **which):
    """Everything, with those of our own records wrong that have these values."""
    which["peer"] = None
    wrong = {"status": "wrong", "verified": False, "seconds": None, "reason": reason}
    return [r | wrong if all(r[k] == which[k] for k in which) else r for r in everything()]
