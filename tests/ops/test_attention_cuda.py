"""The CUDA attention kernels at shapes of several whole tiles, which the tests of all backends are too small for.

Heads of 64 and 128 columns whose rows begin at multiples of 16 bytes go to the kernels without options, whose first
loop has no masks; one column less, an odd stride, or any option, and the general ones serve.
"""

import pytest
import torch

from fastgpt import ops
from fastgpt.testing import as_float64, assert_no_worse, check_error_rule, error, run_with_gradients, strided
from tests.support.cuda_kernels import other_order
from tests.support.plain_attention import composed, composed_varlen

pytestmark = pytest.mark.usefixtures("cuda")


def head_major(batch, heads, rows, size, dtype):
    """As a layer's output is split into heads: rows of all heads lie side by side."""
    return strided((batch, rows, heads, size), dtype, "contiguous").transpose(1, 2).detach().requires_grad_()


def inputs(dtype, heads, kv_heads, rows, columns, size):
    shapes = ((heads, rows), (kv_heads, columns), (kv_heads, columns))
    return [head_major(1, h, n, size, dtype) for h, n in shapes]


# (options, heads, key heads, rows, columns): several tiles of 64 or 128 of either, whole and not.
CASES = {
    "causal": ({"causal": "upper_left"}, 1, 1, 300, 300),
    "whole tiles": ({}, 1, 1, 128, 384),
    "grouped, fewer rows": ({"causal": "lower_right"}, 4, 2, 70, 330),
    "window": ({"causal": "lower_right", "window": (150, -1)}, 1, 1, 140, 400),
    "window on both sides": ({"window": (40, 170)}, 1, 1, 200, 300),
    "negative scale": ({"scale": -0.1, "causal": "upper_left"}, 1, 1, 140, 140),
    "dropout": ({"dropout_p": 0.2, "seed": 7, "causal": "upper_left"}, 1, 1, 140, 140),
}


@pytest.mark.parametrize("size", [64, 72, pytest.param(128, marks=pytest.mark.slow)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_many_tiles_obey_the_error_rule(case, dtype, size):
    options, *shape = CASES[case]
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, **options),
        lambda q, k, v: composed(q, k, v, **options),
        inputs(dtype, *shape, size),
    )


@pytest.mark.parametrize("size", [64, 128])
def test_no_row_sees_columns_past_the_end_where_scores_are_very_low(size):
    """Of a product of 0 there, exp(0 - lse) would be infinite, and that times 0 in dq."""
    tensors = inputs(torch.float16, 1, 1, 200, 70, size)
    with torch.no_grad():
        tensors[0].mul_(0.1).add_(8 * 64 / size)
        tensors[1].mul_(0.1).sub_(6)
    out, grads = run_with_gradients(ops.attention, tensors, None)
    assert out[0].isfinite().all()
    assert all(g.isfinite().all() for g in grads)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, 256), *((torch.float32, n) for n in (64, 128, 256))]
)
def test_large_heads_and_float32_obey_the_error_rule(dtype, size):
    options, *shape = CASES["causal"]
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, **options),
        lambda q, k, v: composed(q, k, v, **options),
        inputs(dtype, *shape, size),
    )


@pytest.mark.parametrize("size", [64, *(pytest.param(n, marks=pytest.mark.slow) for n in (128, 256))])
def test_long_float32_rows_of_one_sign_obey_the_error_rule(size):
    """Tensor cores truncate when they add: in such sums all these errors have one sign."""
    q, k, v, grad = (torch.randn(1, 1, rows, size) for rows in (64, 2048, 2048, 64))
    inputs, grads = [t.requires_grad_() for t in (q, k, v + 1)], [grad + 1]
    truth = run_with_gradients(composed, as_float64(inputs), grads)
    theirs = run_with_gradients(composed, inputs, grads)
    ours = run_with_gradients(ops.attention, inputs, grads)
    found, measured, exact = ([*outputs, *gradients] for outputs, gradients in (ours, theirs, truth))
    for what, o, t, e in zip(("out", "dq", "dk", "dv"), found, measured, exact, strict=True):
        assert_no_worse(o, e, error(t, e), what)


@pytest.mark.parametrize("size", [64, 128])
def test_packed_documents_of_many_tiles_get_what_they_get_alone(size):
    lengths = (200, 0, 1, 131)
    cu = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()])
    tensors = [strided((sum(lengths), h, size), torch.bfloat16, "contiguous") for h in (2, 1, 1)]
    check_error_rule(
        lambda q, k, v: ops.attention_varlen(q, k, v, cu, cu, 200, 200, causal="upper_left"),
        lambda q, k, v: composed_varlen(q, k, v, lengths, lengths, causal="upper_left"),
        tensors,
    )


@pytest.mark.parametrize("size", [64, pytest.param(128, marks=pytest.mark.slow)])
def test_order_of_warps_changes_no_result_but_dq_by_roundings(size):
    tensors = inputs(torch.bfloat16, 2, 1, 200, 300, size)
    ours = lambda q, k, v: ops.attention(q, k, v, causal="lower_right")  # noqa: E731
    fixed = lambda q, k, v: ops.attention(q, k, v, causal="lower_right", deterministic=True)  # noqa: E731
    found = []
    for seed in range(4):
        other_order(seed)
        found.append((run_with_gradients(ours, tensors, None), run_with_gradients(fixed, tensors, None)))
    for (out, (dq, dk, dv)), (fixed_out, fixed_grads) in found:
        (first_out, first_grads), first_fixed = found[0]
        assert torch.equal(out[0], first_out[0])
        assert all(map(torch.equal, (dk, dv), first_grads[1:]))
        torch.testing.assert_close(dq, first_grads[0])
        assert torch.equal(fixed_out[0], first_fixed[0][0])
        assert all(map(torch.equal, fixed_grads, first_fixed[1]))


def test_out_of_memory_in_cpp_is_pytorchs_out_of_memory_error(monkeypatch):
    """The stable ABI says only that an allocation failed: the reason is that of the same one from Python."""

    def empty(size, *, dtype, device):
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")

    q = torch.zeros(64, dtype=torch.bfloat16).expand(2**20, 1, 2**20, 64)
    k = torch.zeros(64, dtype=torch.bfloat16).expand(2**20, 1, 1, 64)
    with pytest.raises(RuntimeError, match="can't allocate memory"):  # what a CPU says
        ops.attention(q, k, k)
    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(torch.OutOfMemoryError, match=f"CUDA out of memory. Tried to allocate {2**47} bytes"):
        ops.attention(q, k, k)


def test_sizes_whose_sums_would_overflow_are_refused():
    """Positions are 32-bit integers in the kernels, and so are sums of two of them."""
    q, k = torch.zeros(1, 1, 2, 64), torch.zeros(64).expand(1, 1, 2**30, 64)
    with pytest.raises(RuntimeError, match=r"attention supports less than 2\^30 columns, got 1073741824"):
        ops.attention(q, k, k)
