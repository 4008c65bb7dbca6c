"""Measurements and verdict of `fastgpt bench`."""

from __future__ import annotations

import json

import pytest
import torch

from fastgpt.cli import main
from fastgpt.integrations import benchmark
from fastgpt.integrations.benchmark import ACCELERATED, COMPILED, UNMODIFIED, BenchConfig, Timing

hf = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """A tiny GPT-2, without weights."""
    path = tmp_path_factory.mktemp("model")
    config = hf.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, architectures=["GPT2LMHeadModel"])
    config.save_pretrained(path)
    return path


def test_contenders_take_turns_in_both_settings(directory, capsys):
    command = ["bench", str(directory), "--no-compile", "--seconds=0.1", "--length=16", "--threads=1"]
    assert main([*command, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    settings = [False, True] if found["timings"][-1]["kept"] else [False]
    assert [(t["kept"], t["contender"]) for t in found["timings"]] == [
        (kept, name) for kept in settings for name in (UNMODIFIED, ACCELERATED)
    ]
    assert found["rounds"] >= 3 and found["tokens"] == 16 and 0 < found["mfu"] < 1
    assert found["timings"][0]["speedup"] == 1
    assert found["losses"][0] == pytest.approx(found["losses"][1], rel=1e-3)
    assert "1 thread," in found["machine"] and "GPT2LMHeadModel" in found["model"]
    assert all(t["milliseconds"] > 0 for t in found["timings"])


def test_models_share_weights_and_only_one_is_accelerated(directory):
    bench = benchmark._Bench(str(directory), BenchConfig(compile=False, length=8))
    unmodified, accelerated = bench.models[UNMODIFIED], bench.models[ACCELERATED]
    ours = {name: p for name, p in accelerated.named_parameters(remove_duplicate=False)}
    for name, parameter in unmodified.named_parameters(remove_duplicate=False):
        assert ours[name] is parameter
    assert type(unmodified.lm_head) is torch.nn.Linear
    assert "fastgpt" in type(accelerated).__module__
    bench._step(ACCELERATED)
    assert all(p.grad is None for p in unmodified.parameters())


def timings(unmodified, accelerated, compiled=None, memory=(200, 100)):
    names = {UNMODIFIED: unmodified, COMPILED: compiled, ACCELERATED: accelerated}
    return [
        Timing(name, False, ms, unmodified / ms, memory[name == ACCELERATED])
        for name, ms in names.items()
        if ms is not None
    ]


@pytest.mark.parametrize(
    ("found", "off", "says"),
    [
        (
            timings(20.0, 10.0),
            "",
            "worth it here. accelerate: 2.00 times as fast as unmodified, 50% of the memory",
        ),
        (
            timings(20.0, 10.0, 10.2),
            "",
            "not worth it here: torch.compile runs at 59% of this machine's rate",
        ),
        (
            timings(20.0, 10.0, 30.0),
            "",
            "worth it here. accelerate: 2.00 times as fast as unmodified, 3.00 times",
        ),
        (timings(20.0, 19.9), "", "not worth it here: unmodified runs at 30% of this machine's rate"),
        (
            timings(20.0, 21.0),
            "the kernels are off",
            "not worth it here: the kernels are off. accelerate: 0.95",
        ),
    ],
    ids=range(5),
)
def test_the_verdict_compares_with_the_better_peer(found, off, says):
    assert benchmark._verdict(found, 0.3, off).startswith(says)


def test_losses_that_differ_are_an_error():
    facts = {
        "losses": (5.0, 5.2),
        "memory": {UNMODIFIED: None},
        "flops": 1,
        "peak_flops": 1,
        "model": "",
        "machine": "",
    }
    with pytest.raises(ValueError, match=r"5\.0000 unmodified and 5\.2000 accelerated"):
        benchmark._comparison(BenchConfig(), torch.device("cpu"), facts, {(False, UNMODIFIED): [1.0]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model"], "there is no model 'no-such-model': give gpt2, bert, llama, or a directory"),
        (["gpt2", "--length=0"], "length must be at least 1"),
        (["gpt2", "--seconds=0"], "seconds must be positive"),
        (["gpt2", "--threads=0"], "threads must be at least 1"),
        (["gpt2", "--device=mps"], "the devices are auto, cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_measured_is_refused_first(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_other_kinds_of_models_and_errors_of_a_process_are_named(tmp_path, capsys):
    hf.ViTConfig(architectures=["ViTForImageClassification"]).save_pretrained(tmp_path)
    assert main(["bench", str(tmp_path)]) == 2
    assert "fastgpt bench takes language models" in capsys.readouterr().err
    hf.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=1, n_head=3, architectures=["GPT2LMHeadModel"]
    ).save_pretrained(tmp_path)
    assert main(["bench", str(tmp_path), "--no-compile"]) == 2
    assert "divisible" in capsys.readouterr().err


def test_every_name_is_a_model_of_its_size():
    sizes = {}
    for name in benchmark.MODELS:
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in benchmark._build(name).parameters()) // 10**6
    assert sizes == {"gpt2": 124, "bert": 109, "llama": 134}
