"""The benchmarks: their checks, their errors, their files and their records."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from bench import __main__ as cli
from bench.cli import MEASUREMENTS
from bench.harness.cases import Case, Peer
from bench.harness.compare import compare
from bench.harness.machine import Machine
from bench.harness.measure import Contender, Plan, run_case
from bench.harness.peers import MissingError
from bench.harness.records import EMPTY, load, save
from bench.harness.scaling import exponent, fits
from bench.ops.registry import OPS
from bench.training import accelerate
from bench.training.train import SIZES, run_train
from fastgpt import ops
from fastgpt.backends import OPS as ALL_OPS
from tests.support.benching import ROOT, bench, validate

SHORT = Plan(seconds=0, min_rounds=3, directions=("fwd+bwd",), backends=("cpp",), peers=("PyTorch",))


@pytest.fixture(scope="module")
def machine():
    machine = Machine("cpu")
    machine._bounds = {"fp32": (1e10, 1e11)}  # no need to measure them here
    return machine


def tiny(op):
    return next(iter(OPS[op].cases("tiny", ["fp32"])))


def changed(op, **values):
    """A copy of an op's description with other attributes."""
    from dataclasses import replace

    return replace(OPS[op], **values)


def test_every_op_has_a_benchmark():
    assert set(OPS) == set(ALL_OPS)
    assert set(OPS) < set(MEASUREMENTS)


@pytest.mark.parametrize("op", OPS)
def test_flops_and_bytes_are_plausible(op):
    """Backward has a cost, and no bound is zero."""
    for case in OPS[op].cases("cpu", ["fp32"]):
        for forward, both in (OPS[op].flops(case), OPS[op].bytes(case)):
            assert 0 < forward < both
        assert 0 < OPS[op].min_peak_bytes(case) <= OPS[op].bytes(case)[1]


def test_attention_counts_its_products():
    """Compare with an explicit mask: two products forward and seven in total, 2 D operations per unmasked pair."""
    case = Case({"B": 2, "H": 3, "T": 5, "D": 4}, "fp32")
    pairs = 2 * 3 * int(torch.ones(5, 5).tril().sum())
    assert OPS["attention"].flops(case) == (2 * 2 * 4 * pairs, 7 * 2 * 4 * pairs)


@pytest.mark.parametrize("op", OPS)
def test_ours_and_pytorch_are_verified_and_timed(op, machine):
    peers = [p.name for p in OPS[op].peers]
    peer = "PyTorch" if "PyTorch" in peers else "SDPA flash"
    plan = Plan(seconds=0, min_rounds=3, directions=("fwd", "fwd+bwd"), backends=("cpp",), peers=(peer,))
    records = run_case(OPS[op], tiny(op), machine, plan)
    validate([records[0] | machine.facts(command="test"), *records])
    assert [(r["direction"], r["peer"]) for r in records] == [
        ("fwd", None), ("fwd", peer), ("fwd+bwd", None), ("fwd+bwd", peer),
    ]  # fmt: skip
    for record in records:
        assert record["status"] == "ok", record["reason"]
        assert record["verified"] and record["error"] <= 1 and record["seconds"] > 0 and record["rounds"] == 3
        assert (record["ratio"] is None) == (record["peer"] is None)


@pytest.mark.parametrize(
    "op", [pytest.param(op, marks=() if op == "gelu" else pytest.mark.slow) for op in OPS]
)
@pytest.mark.parametrize("what", ["value", "gradient", "dtype", "nan"])
def test_planted_wrong_kernel_fails_the_run(op, what, machine, monkeypatch, tmp_path, capsys):
    """A wrong kernel of ours has no time, and the command exits with 1."""
    right = OPS[op].ours

    class Spoil(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return (
                x * 1.01
                if what == "value"
                else x.half()
                if what == "dtype"
                else x / 0
                if what == "nan"
                else x * 1
            )

        @staticmethod
        def backward(ctx, g):
            return g * 1.01 if what == "gradient" else g.float()

    def wrong(case):
        def function(*inputs):
            out = right(case)(*inputs)
            first, *others = out if isinstance(out, tuple) else (out,)
            if first.dtype == torch.float64:  # the reference stays correct
                return out
            return (Spoil.apply(first), *others) if others else Spoil.apply(first)

        return function

    monkeypatch.setitem(OPS, op, changed(op, ours=wrong))
    monkeypatch.setattr("bench.harness.machine.Machine._measure_bounds", lambda self, dtype: (1e10, 1e11))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    peer = OPS[op].peers[0].name
    code = cli.main(
        [op, "--tiny", "--backend", "cpp", "--peer", peer, "--seconds", "0", "--out", str(tmp_path)]
    )
    ours, theirs = [r for r in load(tmp_path / "results.json") if r["op"] == op][:2]
    assert code == 1
    assert (ours["status"], ours["verified"], ours["seconds"], ours["peak_bytes"]) == (
        "wrong",
        False,
        None,
        None,
    )
    assert (theirs["status"], theirs["ratio"]) == ("ok", None)
    assert f"WRONG: fastgpt cpp, {op}" in capsys.readouterr().err


def crash(x, y):
    raise RuntimeError("it fell\nover")


def missing(case):
    raise MissingError("needs another planet")


def test_status_of_a_peer_that_crashes_or_is_wrong(machine):
    eager = OPS["cross_entropy"].peers[0]
    peers = [
        Peer("crashes", "p", lambda case: crash),
        Peer("wrong", "p", lambda case: lambda x, y: eager.make(case)(x, y) * 1.1),
        Peer("missing", "p", missing),
        Peer("no backward", "p", lambda case: lambda x, y: eager.make(case)(x, y).detach()),
        eager,
    ]
    plan = Plan(seconds=0, min_rounds=3, directions=("fwd+bwd",), backends=("cpp",))
    rows = run_case(changed("cross_entropy", peers=peers), tiny("cross_entropy"), machine, plan)
    status = {r["peer"]: r["status"] for r in rows}
    assert status == {
        None: "ok", "crashes": "failed", "wrong": "wrong", "missing": "missing", "no backward": "failed",
        "PyTorch": "ok",
    }  # fmt: skip
    reasons = {r["peer"]: r["reason"] for r in rows}
    assert reasons["crashes"] == "RuntimeError: it fell over"
    assert reasons["missing"] == "needs another planet"
    assert "error" in reasons["wrong"]
    assert all(r["seconds"] is None and r["ratio"] is None for r in rows if r["status"] != "ok")


def test_peer_that_crashes_late_is_out_and_the_others_go_on(machine):
    calls = []

    def late(x, y):
        calls.append(1)
        if len(calls) > 4:
            raise MemoryError("out of memory")
        return torch.nn.functional.cross_entropy(x, y)

    op = changed("cross_entropy", peers=[Peer("late", "p", lambda case: late), OPS["cross_entropy"].peers[0]])
    plan = Plan(seconds=0, min_rounds=4, directions=("fwd+bwd",), backends=("cpp",))
    ours, out, eager = run_case(op, tiny("cross_entropy"), machine, plan)
    assert (out["status"], out["seconds"], out["reason"]) == ("failed", None, "MemoryError: out of memory")
    assert ours["rounds"] == eager["rounds"] == 4 and eager["ratio"] is not None


def test_peer_that_overwrites_its_inputs_gets_them_back(machine):
    """It is verified and timed on the original values, and the other contenders never get overwritten inputs."""
    seen = []

    def greedy(x, y):
        class Overwrites(torch.autograd.Function):
            @staticmethod
            def forward(ctx, x):
                loss = torch.nn.functional.cross_entropy(x.detach(), y)
                seen.append(float(loss))
                grad = torch.softmax(x.detach(), -1)
                grad[torch.arange(len(y)), y] -= 1
                ctx.grad = x.detach().copy_(grad / len(y))
                return loss

            @staticmethod
            def backward(ctx, g):
                return ctx.grad * g

        return Overwrites.apply(x)

    op = changed("cross_entropy", peers=[Peer("greedy", "p", lambda case: greedy, mutates=True)])
    plan = Plan(seconds=0, min_rounds=9, directions=("fwd+bwd",), backends=("cpp",))
    ours, theirs = run_case(op, tiny("cross_entropy"), machine, plan)
    assert theirs["status"] == "ok", theirs["reason"]
    assert ours["status"] == "ok"
    rotations = len({round(loss, 6) for loss in seen})
    assert rotations <= 9  # one loss for each set of inputs and the verified ones: none of an overwritten one
    assert len(seen) > rotations


def test_round_gives_every_contender_a_turn(machine):
    order = []

    def noted(name):
        def make(case):
            def function(x, y):
                order.append(name)
                return torch.nn.functional.cross_entropy(x, y)

            return function

        return Peer(name, "p", make)

    op = changed("cross_entropy", peers=[noted("a"), noted("b")])
    run_case(op, tiny("cross_entropy"), machine, Plan(0, 6, 6, ("fwd+bwd",), backends=()))
    rounds = order[2:-2]  # the check before, the peak memory after
    assert len(rounds) == 2 * 7  # one to warm up
    assert all(set(pair) == {"a", "b"} for pair in zip(rounds[::2], rounds[1::2], strict=True))
    assert rounds[2:4] != rounds[4:6] != rounds[6:8]  # alternating


def test_peak_bytes_are_the_peak_of_the_call(machine):
    """A call with 3 × 40 MiB at the same time and 200 MiB in sequence."""

    def call():
        a = [torch.ones(10 << 20) for _ in range(3)]
        del a
        for _ in range(5):
            torch.ones(10 << 20)

    assert machine.peak_bytes(call) == pytest.approx(120 << 20, abs=2 << 20)
    assert machine.peak_bytes(lambda: None) < 2 << 20


def test_exponent_of_a_power():
    assert exponent([1, 2, 4, 8], [3 * x**1.7 for x in (1, 2, 4, 8)]) == pytest.approx(1.7)


def scaled(t, seconds, peak):
    return EMPTY | {
        "op": "attention", "group": "scaling", "case": str(t), "dims": {"T": t}, "dtype": "fp32",
        "direction": "fwd+bwd", "backend": "cpp", "peer": None, "status": "ok", "sweep": "T",
        "seconds": seconds, "roofline_seconds": 1e-9 * t**2,
        "peak_bytes": peak, "min_peak_bytes": 100 * t,
    }  # fmt: skip


def test_fit_marks_a_difference_from_the_bound():
    rows = fits([scaled(t, 1e-8 * t**2, 8 * t * t) for t in (128, 256, 512)])
    found = {r["quantity"]: (round(r["exponent"], 3), round(r["expected"], 3), r["differs"]) for r in rows}
    assert found == {"seconds": (2.0, 2.0, False), "peak_bytes": (2.0, 1.0, True)}
    assert not fits([scaled(t, 1e-8, 1) for t in (128, 256)])  # two points are no curve


def rated(peer, ratio, low, high):
    return EMPTY | {
        "op": "gelu", "group": "ops", "case": "8x64", "dims": {}, "dtype": "fp32", "direction": "fwd",
        "backend": "torch", "peer": peer, "status": "ok", "ratio": ratio, "ratio_low": low, "ratio_high": high,
    }  # fmt: skip


def test_compare_counts_overlapping_intervals():
    a = [rated("p", 1.5, 1.4, 1.6), rated("q", 2.0, 1.9, 2.1), rated("gone", 1, 1, 1)]
    b = [rated("p", 1.65, 1.55, 1.7), rated("q", 2.4, 2.2, 2.6)]
    table, share = compare(a, b)
    assert share == 0.5
    assert "1 of 2 ratios agree" in table and table.count("differ") == 1
    with pytest.raises(ValueError, match="no case in common"):
        compare(a[:1], b[1:])


@pytest.mark.parametrize(
    ("arguments", "known"),
    [
        (["gelus"], "'gelu'"),
        (["gelu", "--shape", "1x2"], "4096x3072"),
        (["gelu", "--peer", "nobody"], "torch.compile"),
        (["gelu", "--backend", "fpga"], "triton"),
        (["train", "--peer", "nobody"], "transformers + Liger-Kernel"),
        (["accelerate", "--peer", "nobody"], "unmodified"),
        (["gelu", "--device", "cuda"], "no CUDA GPU here"),
        (["gpu", "--rehearse", "--budget-minutes", "0"], "positive"),
    ],
)
def test_error_for_an_unknown_word_lists_the_known_ones(arguments, known, capsys):
    try:
        code = cli.main(arguments)
    except SystemExit as error:  # argparse's own
        code = error.code
    assert code == 2
    assert known in capsys.readouterr().err


@pytest.mark.slow
def test_json_on_stdout_is_the_records():
    run = bench("gelu", "--tiny", "--seconds", 0, "--json", "--peer", "PyTorch")
    assert run.returncode == 0, run.stderr
    records = json.loads(run.stdout)
    validate(records)
    machine = records[0]
    assert {"device", "torch", "triton", "commit", "dirty"} <= machine.keys()
    assert machine["torch"] == torch.__version__
    assert {r["backend"] for r in records if r["peer"] is None} == {"cpp", "triton"}
    assert all(r["status"] == "ok" for r in records)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES["tiny"], ids=["gpt2", "llama"])
def test_training_losses_agree_before_a_speed_counts(size, machine):
    plan = Plan(0, 3, 3, ("step",), backends=("cpp",))
    records = run_train(size, "fp32", machine, plan)
    validate([records[0] | machine.facts(command="test"), *records])
    status = {r["peer"]: r["status"] for r in records}
    assert status.pop("transformers + Liger-Kernel") in ("missing", "failed")  # it needs a GPU
    assert status == {None: "ok", "PyTorch": "ok", "torch.compile": "ok", "transformers": "ok"}
    for record in records:
        if record["status"] == "ok":
            assert len(record["losses"]) == 8 and record["losses"][-1] < record["losses"][0]
            assert record["tokens_per_second"] == pytest.approx(32 / record["seconds"])


@pytest.mark.parametrize("family", accelerate.FAMILIES)
def test_accelerated_model_is_timed_next_to_the_unmodified_one(family, machine):
    size = accelerate.SIZES["tiny"][0][1]
    plan = Plan(0, 3, 3, ("step",), ("cpp",), ("unmodified",))
    ours, theirs = records = accelerate.run_accelerate(family, size, "fp32", machine, plan, compared=4)
    validate([records[0] | machine.facts(command="test"), *records])
    assert (ours["status"], theirs["status"]) == ("ok", "ok")
    assert (ours["case"], theirs["peer"]) == (f"{family} 1x2x32x16x2x256", "unmodified")
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)


def test_planted_wrong_acceleration_is_not_timed(machine, monkeypatch):
    right = ops.linear_cross_entropy
    monkeypatch.setattr("fastgpt.ops.linear_cross_entropy", lambda *a, **k: 1.1 * right(*a, **k))
    plan = Plan(0, 3, 3, ("step",), ("cpp",), ("unmodified",))
    ours, theirs = accelerate.run_accelerate(*accelerate.SIZES["tiny"][0], "fp32", machine, plan)
    assert (ours["status"], ours["seconds"], theirs["status"]) == ("wrong", None, "ok")


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_planted_wrong_model_fails_the_training_benchmark(what, machine, monkeypatch):
    right = ops.mlp

    def wrong(*arguments):
        y = right(*arguments)
        return 1.1 * y if what == "loss" else 2 * y - y.detach()  # the same value, twice the gradient

    monkeypatch.setattr("fastgpt.ops.mlp", wrong)
    # A size for which a wrong gradient is visible within eight steps.
    size = {"L": 2, "H": 2, "C": 64, "T": 32, "B": 4, "V": 256}
    ours, theirs = run_train(size, "fp32", machine, Plan(0, 3, 3, ("step",), ("cpp",), ("PyTorch",)))
    assert (ours["status"], ours["seconds"]) == ("wrong", None)
    assert theirs["status"] == "ok"


@pytest.mark.slow
def test_interrupted_run_keeps_what_it_had(tmp_path):
    """SIGKILL during a run: the file is valid and has every finished case."""
    command = [
        sys.executable,
        "-m",
        "bench",
        "ops",
        "--tiny",
        "--seconds",
        "0",
        "--peer",
        "none",
        "--out",
        tmp_path,
    ]
    path = tmp_path / "results.json"
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | {"TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not (path.exists() and len(load(path)) > 4):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    kept = load(path)
    validate(kept)
    assert len(kept) > 4
    assert not any(r["op"] == "add_layer_norm" for r in kept)  # the run was not over


def test_invalid_result_files_are_refused(tmp_path):
    for text in ("{", "[]", '[{"op": 1}]', '{"device": 1}'):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(ValueError, match=r"results\.json"):
            load(tmp_path / "results.json")


def test_saving_replaces_the_file_whole(tmp_path):
    path = tmp_path / "a" / "results.json"
    save(path, [{"op": "x", "device": "d"}])
    save(path, [{"op": "y", "device": "d"}])
    assert [r["op"] for r in load(path)] == ["y"]
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_reason_of_a_failure_is_the_root_cause():
    contender = Contender("p", "p", lambda: None)
    try:
        try:
            raise ValueError("the cause")
        except ValueError as cause:
            raise RuntimeError("compiler wrapped it") from cause
    except RuntimeError as error:
        contender.fail("failed", error)
    assert contender.reason == "ValueError: the cause"


@pytest.mark.parametrize("path", sorted((ROOT / "bench" / "results").glob("*/*.json")), ids=str)
def test_committed_results_follow_the_schema(path):
    validate(load(path))
