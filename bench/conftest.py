"""The cases of the preset "quick" under pytest-benchmark: `pytest bench --benchmark-only`.

Each case is checked against the reference and then timed, for our op and for PyTorch as separate benchmarks.
`make compare` saves the run and compares it with the previous one.
"""

import pytest
import torch

from bench.harness.machine import Machine
from bench.harness.measure import Plan, contenders_of
from bench.ops.registry import OPS

PRESET = "quick"


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        op = OPS[metafunc.function.__name__.removeprefix("bench_")]
        cases = list(op.cases(PRESET, ("fp32", "bf16")))
        metafunc.parametrize("case", cases, ids=lambda case: f"{case.name}-{case.dtype}")
        metafunc.parametrize("implementation", ["fastgpt", "PyTorch"])


@pytest.fixture(scope="session")
def machine():
    """The machine, with malloc trimming disabled as in `fastgpt train`."""
    return Machine("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def run(benchmark, machine, implementation):
    """run(op, case): verify one contender, then time its forward and backward."""

    def run(op, case):
        fastgpt = implementation == "fastgpt"
        plan = Plan(backends=None if fastgpt else (), peers=() if fastgpt else (op.peers[0].name,))
        (*_, contender), one = contenders_of(op, case, machine, plan)
        assert contender.status == "ok", contender.reason

        def setup():
            one.clear()

        def once():
            torch.autograd.backward(contender.function(*one.inputs), one.upstream)
            machine.synchronize()

        benchmark.extra_info |= {
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "malloc": "trimming disabled",
        }
        benchmark.pedantic(once, setup=setup, rounds=11, warmup_rounds=2)

    return run
