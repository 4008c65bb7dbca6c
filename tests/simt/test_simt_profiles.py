"""The CUDA kernels on other emulated GPUs: less shared memory, no clusters, arithmetic as inexact as a GPU's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import fastgpt
from fastgpt import ops
from fastgpt.testing import check_error_rule
from tests.simt import emulator
from tests.support.plain_attention import composed

pytestmark = pytest.mark.skipif(bool(emulator.problem()), reason=emulator.problem())

TESTS = Path(__file__).parents[1]
FILES = (
    *("add_layer_norm", "attention", "attention_cuda", "attention_varlen", "cross_entropy"),
    *("cross_entropy_with_grad", "geglu", "gelu", "linear_cross_entropy", "linear_gelu", "linear_gelu_cuda"),
    *("mlp", "mlp_cuda", "op_sizes", "relu_squared", "rms_norm", "rope", "swiglu"),
)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("profile", [name for name in emulator.PROFILES if name != "h100"])
def test_cuda_kernels_serve_this_gpu(profile, file):
    """The tests of the default tier that run CUDA kernels, on another GPU."""
    only = [] if file.endswith(("_cuda", "_with_grad")) else ["-k", "cuda"]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "--simt-profile", profile, *only]
    done = subprocess.run(
        [*command, TESTS / "ops" / f"test_{file}.py"],
        cwd=TESTS.parent,
        env=os.environ | {"PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


def run(profile, dtype, size, rows=70, **options):
    inputs = [torch.randn(1, 1, rows, size).to(dtype).requires_grad_() for _ in range(3)]
    with emulator.running(profile), fastgpt.use_backend("cuda"):
        check_error_rule(
            lambda q, k, v: ops.attention(q, k, v, **options),
            lambda q, k, v: composed(q, k, v, **options),
            inputs,
        )


@pytest.mark.parametrize(
    ("dtype", "size"),
    [*((torch.bfloat16, n) for n in (64, 128, 256)), *((torch.float32, n) for n in (64, 128))],
)
def test_attention_forward_and_backward_fit_into_99_kib(dtype, size):
    run("rtx4090", dtype, size, causal="upper_left")


@pytest.mark.parametrize("rows", [20, 50])
def test_short_rows_of_16_bits_obey_the_error_rule_in_99_kib(rows):
    """Whose delta the kernel of 256 columns a head can sum up in one tile, or not."""
    run("rtx4090", torch.bfloat16, 256, rows, causal="upper_left")


@pytest.mark.parametrize("op", ["attention", "attention_varlen"])
def test_float32_of_256_columns_is_refused_before_the_forward(op):
    """And served where there is as much shared memory as the refusal asks for."""
    shape = (1, 1, 5, 160) if op == "attention" else (5, 1, 160)
    q = torch.randn(shape, requires_grad=True)
    cu = torch.tensor([0, 5])
    extras = () if op == "attention" else (cu, cu, 5, 5)
    sentence = "takes 137 KiB of shared memory a block, and this GPU has 99"
    with emulator.running("rtx4090"):
        with fastgpt.use_backend("cuda"), pytest.raises(fastgpt.BackendUnavailable, match=sentence):
            getattr(ops, op)(q, q, q, *extras)
        explanation = fastgpt.explain(getattr(ops, op), q, q, q, *extras)
        assert explanation.backend == "cpp"
    with emulator.running("a100"), fastgpt.use_backend("cuda"):
        getattr(ops, op)(q, q, q, *extras).sum().backward()
        assert q.grad.isfinite().all()
