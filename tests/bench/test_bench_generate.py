"""The benchmark of text generation: a contender with a token of too small a logit is not timed."""

import pytest

from bench.harness.machine import Machine
from bench.harness.measure import Plan
from bench.training import generate
from fastgpt.generation.kv_cache import KVCache
from tests.support.benching import validate

pytestmark = pytest.mark.xdist_group("bench_generate")  # the fixtures of this module are created once


@pytest.fixture(scope="module")
def machine():
    machine = Machine("cpu")
    machine._bounds = dict.fromkeys(("fp32", "bf16"), (1e10, 1e11))  # no need to measure them here
    return machine


def test_generated_tokens_are_the_likeliest_before_a_speed_counts(machine):
    plan = Plan(0, 3, 3, ("generate",), backends=("cpp",))
    records = generate.run_generate(generate.SIZES["tiny"][0], "bf16", machine, plan)
    validate([records[0] | machine.facts(command="test"), *records])
    assert {r["peer"]: r["status"] for r in records} == dict.fromkeys((None, *generate.PEERS), "ok")
    for record in records:
        assert record["tokens_per_second"] == pytest.approx(16 / record["seconds"])
        assert (record["ratio"] is None) == (record["peer"] is None)


def test_planted_wrong_cache_fails_the_benchmark_of_generation(machine, monkeypatch):
    """A cache without its first token: contenders without this cache are still timed."""
    append = KVCache.append
    monkeypatch.setattr(KVCache, "append", lambda *a: tuple(t[:, :, 1:] for t in append(*a)))
    size = {"L": 2, "H": 2, "C": 64, "T": 16, "N": 16, "B": 4, "V": 256}
    plan = Plan(0, 3, 3, ("generate",), ("cpp",), ("without the cache",))
    ours, theirs = generate.run_generate(size, "fp32", machine, plan)
    assert (ours["status"], ours["seconds"], theirs["status"]) == ("wrong", None, "ok")
