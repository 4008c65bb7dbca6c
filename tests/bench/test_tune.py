"""Tuned rows: trials and results of the tuner, lookup by the launchers, and invalid files."""

import contextlib
import json
import threading
import warnings
from types import SimpleNamespace

import pytest
import torch

from tests.support.benching import bench

pytest.importorskip("triton")
import triton

import fastgpt
from bench import __main__ as cli
from bench.codegen import tune
from fastgpt import ops
from fastgpt.kernels import gelu, tuned

DEVICE = "Some GPU"


@pytest.fixture(autouse=True)
def _cache(monkeypatch, tmp_path):
    """A separate cache directory, and a GPU with a fixed name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: DEVICE)
    tuned._known.cache_clear()
    yield
    tuned._known.cache_clear()


def on_gpu(dtype=torch.bfloat16):
    """Return an object with the attributes that `chosen` reads from a tensor."""
    return SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0), dtype=dtype)


def test_saved_rows_are_chosen_for_their_device_dtype_and_size_alone():
    tuned.save(DEVICE, {("linear_gelu_fwd", "bfloat16", (3072, 768)): (64, 64, 32, 4, 3)})
    tuned.save("another GPU", {("gelu_fwd", "bfloat16", ()): (1024, 8)})
    row = (128, 128, 64, 8, 3)
    assert tuned.chosen("linear_gelu_fwd", on_gpu(), (3072, 768), row) == (64, 64, 32, 4, 3)
    assert tuned.chosen("linear_gelu_fwd", on_gpu(), (3072, 769), row) == row
    assert tuned.chosen("linear_gelu_fwd", on_gpu(torch.float16), (3072, 768), row) == row
    assert tuned.chosen("linear_gelu_bwd", on_gpu(), (3072, 768), row) == row
    assert (
        tuned.chosen("linear_gelu_fwd", on_gpu(), (3072, 768), row[:4]) == row[:4]
    )  # of an older row's form
    assert tuned.chosen("gelu_fwd", on_gpu(), (), (2048, 4)) == (2048, 4)
    assert (
        tuned.chosen("linear_gelu_fwd", torch.empty(1), (3072, 768), row) == row
    )  # the interpreter has its own


def test_saving_adds_to_what_was_there_and_replaces_what_was_tuned_again():
    tuned.save(DEVICE, {("gelu_fwd", "bfloat16", ()): (1024, 8), ("gelu_bwd", "bfloat16", ()): (1024, 8)})
    assert tuned.chosen("gelu_fwd", on_gpu(), (), (2048, 4)) == (1024, 8)
    tuned.save(DEVICE, {("gelu_fwd", "bfloat16", ()): (4096, 4)})
    assert tuned.chosen("gelu_fwd", on_gpu(), (), (2048, 4)) == (4096, 4)
    assert tuned.chosen("gelu_bwd", on_gpu(), (), (2048, 4)) == (1024, 8)
    assert [p.name for p in tuned.path().parent.iterdir()] == ["tuned.json"]


ROW = {
    "device": DEVICE,
    "triton": triton.__version__,
    "kernel": "gelu_fwd",
    "dtype": "bfloat16",
    "size": [],
    "row": [1],
}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "not what `python -m bench tune` writes"),
        ("[]", "not what `python -m bench tune` writes"),
        ('{"rows": [{"device": "x"}]}', "not what `python -m bench tune` writes"),
        (json.dumps({"rows": [ROW | {"row": ["4096"]}]}), "other fields than it should"),
        (json.dumps({"rows": [ROW | {"row": [0, 4]}]}), "a number outside of 1 to 65536"),
        (json.dumps({"rows": [ROW | {"row": [4, 10**9]}]}), "a number outside of 1 to 65536"),
        ("[" * 100_000, "not what `python -m bench tune` writes"),
        (json.dumps({"rows": [ROW | {"triton": "1.0"}]}), f"of Triton 1.0 and this is {triton.__version__}"),
        (b"\xff", "codec can't decode"),
    ],
)
def test_a_file_that_is_not_ours_is_ignored_with_a_warning(text, reason):
    tuned.path().parent.mkdir()
    tuned.path().write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.warns(UserWarning, match="is ignored, kernels run with their own tables") as caught:
        assert tuned.chosen("gelu_fwd", on_gpu(), (), (2048, 4)) == (2048, 4)
    assert reason in str(caught[0].message)
    assert "run `python -m bench tune` again, or delete it" in str(caught[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tuned.chosen("gelu_fwd", on_gpu(), (), (2048, 4))  # it was read once


def test_two_that_save_at_once_lose_no_row(monkeypatch):
    load, waiting = tuned.load, threading.Barrier(2)

    def slow():
        found = load()
        with contextlib.suppress(threading.BrokenBarrierError):  # the other one waits for the lock
            waiting.wait(0.2)
        return found

    monkeypatch.setattr(tuned, "load", slow)
    rows = [{(f"kernel{i}", "float32", (1,)): (64,)} for i in range(2)]
    threads = [threading.Thread(target=tuned.save, args=(DEVICE, row)) for row in rows]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [record["kernel"] for record in load()] == ["kernel0", "kernel1"]


def test_a_save_that_fails_leaves_what_was_there_and_nothing_else(monkeypatch):
    tuned.save(DEVICE, {("gelu_fwd", "bfloat16", ()): (1024, 8)})
    before = tuned.path().read_bytes()
    with pytest.raises(TypeError):
        tuned.save(DEVICE, {("gelu_fwd", "float32", (object(),)): (64,)})

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tuned.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        tuned.save(DEVICE, {("gelu_fwd", "float32", ()): (64,)})
    assert [file.name for file in tuned.path().parent.iterdir()] == ["tuned.json"]
    assert tuned.path().read_bytes() == before


def test_the_number_of_rows_has_a_bound(monkeypatch):
    monkeypatch.setattr(tuned, "_MAX_ROWS", 3)
    tuned.save(DEVICE, {("gelu_fwd", "float32", (size,)): (64,) for size in range(5)})
    assert len(tuned.load()) == 3


def test_a_relative_cache_is_not_used(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert tuned.path() == tmp_path / "home" / ".cache" / "fastgpt" / "tuned.json"


def test_without_a_file_nothing_is_said():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuned.chosen("gelu_fwd", on_gpu(), (), (2048, 4)) == (2048, 4)
        assert tuned._known(0) == {}


def test_rows_that_are_tried_reach_the_launch(monkeypatch):
    launched = []

    class Recorder:
        def __getitem__(self, grid):
            return lambda *arguments, num_warps: launched.append((grid, arguments[-1], num_warps))

    monkeypatch.setattr(gelu, "_gelu_fwd", Recorder())
    with fastgpt.use_backend("triton"), tuned.trying({"gelu_fwd": (1024, 8)}) as trial:
        ops.gelu(torch.ones(1025))
    assert launched == [((2,), 1024, 8)]
    assert trial.asked == {("gelu_fwd", "float32", ()): gelu.TILE}
    with fastgpt.use_backend("triton"):
        ops.gelu(torch.ones(1025))
    assert launched[1] == ((1,), *gelu.TILE)


def test_every_kernel_with_a_row_has_candidates_of_its_form():
    """Candidates have the length of the row; the launchers report the kernels with rows."""
    asked = {}
    with fastgpt.use_backend("triton"):
        for name in tune.TUNED:
            op = tune.OPS[name]
            case = next(iter(op.cases("tiny", ["fp32"])))
            with tuned.trying({}) as trial:
                found = op.ours(case)(*op.inputs(case, torch.device("cpu")))
                (found if isinstance(found, torch.Tensor) else found[0]).sum().backward()
            asked |= {question[0]: row for question, row in trial.asked.items()}
    assert set(asked) == set(tune.CANDIDATES) - {
        "attention_dkv",
        "attention_dq",
    }  # those of deterministic algorithms
    for kernel, row in asked.items():
        assert {len(candidate) for candidate in tune.CANDIDATES[kernel]} == {len(row)}, kernel


def test_a_row_that_errs_or_does_not_run_is_not_timed(monkeypatch, capsys):
    op = tune.OPS["gelu"]
    trials = tune._Trials(op, next(iter(op.cases("tiny", ["fp32"]))), tune.Machine("cpu"))
    with fastgpt.use_backend("triton"):
        assert list(trials.times("gelu_fwd", [(2048, 4), (1000, 4)])) == [
            (2048, 4)
        ]  # a range must be a power of 2
        monkeypatch.setattr(trials, "function", lambda x: ops.gelu(x) * 1.001)
        assert trials.times("gelu_fwd", [(2048, 4)]) == {}
    out = capsys.readouterr().out
    assert "gelu_fwd (1000, 4): " in out
    assert "gelu_fwd (2048, 4): output 0: error" in out


@pytest.mark.parametrize(
    ("times", "best"),
    [
        ({(1,): 1.0, (2,): 0.99}, (1,)),
        ({(1,): 1.0, (2,): 0.9, (3,): 0.8}, (3,)),
        ({(2,): 5.0}, (2,)),
        ({}, (1,)),
    ],
)
def test_a_row_must_be_faster_by_more_than_noise(times, best):
    assert tune._best((1,), times) == best


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "tuning needs a CUDA GPU. Use --rehearse"),
        (["gellu"], "unknown op 'gellu'. Use one of: attention, cross_entropy"),
        (["--shape", "8x64"], "--shape is for one op"),
        (
            ["linear_gelu", "--rehearse", "--shape", "8x64"],
            "--shape '8x64' does not fit linear_gelu. Use 3 sizes: NxCxF.",
        ),
    ],
)
def test_wrong_options_are_refused_with_a_message(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["tune", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert not tuned.path().exists()


@pytest.mark.slow
def test_rehearsal_goes_through_everything_and_keeps_nothing(tmp_path):
    done = bench("tune", "gelu", "linear_gelu", "--rehearse", "--dtype", "fp32")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:5]] == [
        "kernel",
        "gelu_fwd",
        "gelu_bwd",
        "linear_gelu_fwd",
        "bias_gelu_bwd",
    ]
    assert lines[5] == "a rehearsal: no row was chosen by its time; 4 rows were saved, loaded and deleted"
    assert list(tmp_path.iterdir()) == []
