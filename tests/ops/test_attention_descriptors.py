"""Triton's attention by tensor descriptors: the bits that it gives by pointers, and for which tensors."""

import pytest
import torch

import fastgpt
from fastgpt import ops
from fastgpt.testing import run_with_gradients
from tests.ops.test_attention import CASES, inputs

launch = pytest.importorskip("fastgpt.kernels.attention_launch")


def by_descriptors_and_by_pointers(function, tensors, monkeypatch):
    """(result, gradients) of Triton's kernels by tensor descriptors and by pointers."""
    made = []
    descriptor = launch.TensorDescriptor
    monkeypatch.setattr(launch, "TensorDescriptor", lambda *a: made.append(a) or descriptor(*a))
    with fastgpt.use_backend("triton"):
        first = run_with_gradients(function, tensors, None)
        assert made
        made.clear()
        monkeypatch.setattr(launch, "_fits_descriptor", lambda x: False)
        second = run_with_gradients(function, tensors, None)
        assert not made
    return first, second


NONE = ("head size 33", "head size 3, value size 5", "head size 256")  # which no descriptor describes
QUICK = (
    "upper-left causal, more columns",
    "one row, as in decoding",
    "window",
    "softcap",
    "dropout, causal, grouped",
)


@pytest.mark.parametrize(
    ("case", "deterministic"),
    [
        pytest.param(c, d, marks=() if (c in QUICK and not d) or c == "window" else pytest.mark.slow)
        for c in CASES
        if c not in NONE
        for d in (False, True)
    ],
)
def test_tensor_descriptors_give_what_pointers_give(case, deterministic, monkeypatch):
    options, shape = CASES[case]
    found = by_descriptors_and_by_pointers(
        lambda q, k, v: ops.attention(q, k, v, deterministic=deterministic, **options),
        inputs(torch.float16, **shape),
        monkeypatch,
    )
    (out, grads), (expected, expected_grads) = found
    for a, b in zip((*out, *grads), (*expected, *expected_grads), strict=True):
        assert torch.equal(a, b)


def test_tensor_descriptors_pass_a_padded_head_dimension(monkeypatch):
    """What lies past a head's size, and past the last row, is another head's, and NaN here."""
    packed = torch.full((2, 3, 40, 32), torch.nan, dtype=torch.float16)
    packed[:, :, :21, :24] = torch.randn(2, 3, 21, 24)
    tensors = [packed[:, :, :21, :24].requires_grad_() for _ in range(3)]
    (out, grads), (expected, expected_grads) = by_descriptors_and_by_pointers(
        lambda q, k, v: ops.attention(q, k, v, causal="upper_left"), tensors, monkeypatch
    )
    for a, b in zip((*out, *grads), (*expected, *expected_grads), strict=True):
        assert a.isfinite().all()
        assert torch.equal(a, b)


def test_tensor_descriptors_are_for_what_the_copying_unit_takes():
    good = torch.zeros(2, 20, 4, 16, dtype=torch.float16).transpose(1, 2)
    assert launch.use_descriptors(None, good)
    packed = launch.PackedDocuments(*[torch.zeros(2, dtype=torch.int32)] * 2, 20, 20)
    assert not launch.use_descriptors(packed, good)
    for bad in (
        good.float(),
        good[..., 1:],  # begins at an odd address
        torch.zeros(2, 4, 20, 19, dtype=torch.float16)[..., :16],  # rows begin at odd addresses
        good.transpose(2, 3),
        good[:1, :1].expand(2, 4, 20, 16),
        good[:, :, :0],
    ):
        assert not launch.use_descriptors(None, good, bad), (bad.shape, bad.stride())
