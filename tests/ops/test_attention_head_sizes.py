"""Heads and rows that fill the tiles of matrix instructions, and those that leave a part of one."""

import pytest
import torch

from fastgpt import ops
from fastgpt.testing import check_error_rule, strided
from tests.support.plain_attention import composed


@pytest.mark.only("reference", "cpp")
@pytest.mark.parametrize("causal", ["none", "lower_right"])
@pytest.mark.parametrize("size", [32, 40, 64, 72, 128])
def test_whole_and_partial_tiles(backend, dtype, size, causal):
    rows, columns = 150, 175
    shapes = ((1, 2, rows, size), *[(1, 1, columns, size)] * 2)
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, causal=causal),
        lambda q, k, v: composed(q, k, v, causal=causal),
        [strided(shape, dtype, "contiguous") for shape in shapes],
    )


@pytest.mark.only("cpp")
def test_sums_over_many_tiles_of_columns(backend):
    q, k, v = (torch.randn(1, 1, 300, 64).bfloat16().requires_grad_() for _ in range(3))
    found = ops.attention(q, k, v)
    exact = composed(*(t.detach().double() for t in (q, k, v)))
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=0.01)
