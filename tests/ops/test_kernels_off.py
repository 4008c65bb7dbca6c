"""Kernels that do not load are never silent: a warning, once, with what mends it."""

import pytest
import torch

import fastgpt
from fastgpt import backends, extension, ops
from fastgpt import functional as F
from fastgpt.cli import main
from fastgpt.training.config import TrainConfig
from fastgpt.training.trainer import train


@pytest.fixture
def broken_extension(monkeypatch):
    """An installation whose compiled kernels do not load."""
    monkeypatch.setattr(
        extension, "_load", lambda: (None, "built for torch 1.0; rebuild it with: pip install")
    )
    for cached in (backends._cached_machine_refusal, backends._warn_once):
        cached.cache_clear()
    yield
    for cached in (backends._cached_machine_refusal, backends._warn_once):
        cached.cache_clear()


OFF = "kernels are off on cpu and plain PyTorch runs instead: cpp: built for torch 1.0; rebuild it with: pip"


@pytest.mark.parametrize("function", [ops.gelu, F.gelu])
def test_kernels_that_do_not_load_are_said_once(broken_extension, function):
    with pytest.warns(RuntimeWarning, match=OFF) as found:
        for _ in range(3):
            function(torch.randn(3))
    assert len(found) == 1


def test_kernels_that_do_not_load_are_said_while_compiling(broken_extension):
    torch._dynamo.reset()
    with pytest.warns(RuntimeWarning, match=OFF):
        torch.compile(ops.gelu, backend="eager", fullgraph=True)(torch.randn(3))


def test_what_was_asked_for_or_cannot_be_served_is_no_reason_to_warn(recwarn):
    backends._warn_once.cache_clear()
    with fastgpt.use_backend("reference"):
        ops.gelu(torch.randn(3))
    ops.attention(*(torch.randn(1, 1, 2, 257) for _ in "qkv"))
    ops.gelu(torch.ones(3, device="meta"))
    assert not [w for w in recwarn if "kernels are off" in str(w.message)] or not extension.loaded()


def test_info_check_is_1_where_kernels_do_not_load(broken_extension, capsys):
    assert main(["info"]) == 0
    assert main(["info", "--check"]) == 1
    assert "fastgpt: error: the fused kernels are off on cpu" in capsys.readouterr().err


@pytest.mark.skipif(not extension.loaded(), reason="the C++ kernels are not built")
def test_info_check_is_0_where_they_do():
    if torch.cuda.is_available():
        pytest.skip("a GPU may lack some")
    assert main(["info", "--check"]) == 0


def test_a_run_of_training_says_it(broken_extension, tmp_path, capsys):
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "batch_size": 1, "max_steps": 1}
    with pytest.warns(RuntimeWarning, match=OFF):
        train(TrainConfig(data="stdlib", out=str(tmp_path / "run"), device="cpu", **sizes))
    assert f"warning: the fused {OFF}" in capsys.readouterr().out
