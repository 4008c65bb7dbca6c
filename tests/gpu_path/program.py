"""The program of test_gpu_path.py, in a process of its own: everything on GPUs that do not exist, as JSON on stdout.

python -m tests.gpu_path.program
"""

from __future__ import annotations

import json
import sys
import traceback
from collections import Counter
from dataclasses import asdict
from typing import Any

from tests.gpu_path import machine as machines

machine = machines.enter()  # before fastgpt is imported

from fastgpt import backends  # noqa: E402
from tests.gpu_path import calls  # noqa: E402

CAPABILITIES = ((7, 5), (8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))


def called() -> dict[str, Any]:
    """Each call's decisions, launches and, if it fails, its error."""
    found = {}
    for name, run in calls.calls():
        machine.reset()
        error = ""
        with backends._record() as decisions:
            try:
                run()
            except Exception:
                error = traceback.format_exc()
        found[name] = {
            "decisions": [(d.op, d.backend, d.reasons) for d in decisions],
            "launches": [asdict(x) for x in machine.launches],
            "error": error,
        }
    return found


def compilations() -> dict[str, Counter[str]]:
    """How often each kernel is compiled on an H100: training, generation, attention over a growing cache, dropout."""
    found = {}
    with machines.gpu(machine, (9, 0)):
        model = calls.gpt()
        calls.train(model, 8, 1024)
        found["first step"] = Counter(machine.compiled)
        machine.compiled.clear()
        for step in range(1, 100):
            calls.train(model, 1 + step % 8, 1 + step * 37 % 1024)
        found["99 steps of other lengths"] = Counter(machine.compiled)
        machine.compiled.clear()
        calls.generate(model.eval(), 100, 60)
        found["generation"] = Counter(machine.compiled)
        machine.compiled.clear()
        for length in (*range(1, 300), *range(300, 8193, 61), *range(512, 8193, 512)):
            calls.decoding(1, 12, length)()
        found["decoding"] = Counter(machine.compiled)
        machine.compiled.clear()
        for p in (0.1, 0.2, 0.5, 0.6, 0.9):
            calls.attention(dropout_p=p)()
        found["dropout"] = Counter(machine.compiled)
    return found


def reading() -> str:
    """What happens to a kernel's launcher, or a check, that reads a number from the GPU."""
    with machines.gpu(machine, (9, 0)):
        try:
            calls.cuda(4).sum().item()
        except Exception as error:
            return type(error).__name__
    return ""


def main() -> None:
    by_capability = {}
    for capability in CAPABILITIES:
        with machines.gpu(machine, capability):
            by_capability[".".join(map(str, capability))] = called()
    found = {"calls": by_capability, "compilations": compilations(), "reading": reading()}
    json.dump(found, sys.stdout)


if __name__ == "__main__":
    main()
