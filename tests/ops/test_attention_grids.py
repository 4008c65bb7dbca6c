"""Grids of attention's Triton kernels: batches and heads beyond 65,535 are folded into the first axis."""

import pytest
import torch

import fastgpt
from fastgpt import ops
from fastgpt.testing import run_with_gradients
from tests.ops.test_attention import inputs

launch = pytest.importorskip("fastgpt.kernels.attention_launch")

BOUNDS = torch.tensor([0, 7, 7, 40], dtype=torch.int32)


def packed(q, k, v, **options):
    """Three documents of 40 rows in all."""
    return ops.attention_varlen(q, k, v, BOUNDS, BOUNDS, 33, 33, causal="lower_right", **options)


def documents():
    return [torch.randn(40, heads, 16, requires_grad=True) for heads in (4, 2, 2)]


CASES = {
    "grouped, dropout": (
        lambda q, k, v: ops.attention(q, k, v, causal="lower_right", dropout_p=0.3, seed=5),
        lambda: inputs(torch.float32, batch=3, kv_heads=2, rows=40, columns=40),
    ),
    "deterministic": (
        lambda q, k, v: ops.attention(q, k, v, causal="lower_right", deterministic=True),
        lambda: inputs(torch.float32, batch=3, kv_heads=2, rows=40, columns=40),
    ),
    "columns in parts": (
        lambda q, k, v: ops.attention(q, k, v, causal="lower_right"),
        lambda: inputs(torch.float32, batch=2, kv_heads=2, rows=3, columns=140),
    ),
    "documents": (packed, documents),
    "documents, deterministic": (lambda q, k, v: packed(q, k, v, deterministic=True), documents),
}


@pytest.mark.parametrize("case", CASES)
def test_folded_grids_give_what_grids_of_three_axes_give(case, monkeypatch):
    function, tensors = CASES[case]
    tensors = tensors()
    with fastgpt.use_backend("triton"):
        expected, expected_grads = run_with_gradients(function, tensors, None)
        monkeypatch.setattr(launch, "GRID_AXIS_MAX", 1)
        found, grads = run_with_gradients(function, tensors, None)
    for a, b in zip((*found, *grads), (*expected, *expected_grads), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)  # dq is added up in another order


def test_grid_has_three_axes_up_to_65535_heads_and_batches():
    assert launch.grid_of(5, 65_535, 65_535) == ((5, 65_535, 65_535), None)
    assert launch.grid_of(5, 65_536, 2) == ((131_072, 5), 65_536)
    assert launch.grid_of(5, 3, 65_536) == ((196_608, 5), 3)
