"""Calls with one argument replaced by something odd: the drop-in gives PyTorch's result, or its type of error."""

import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as T
from torch import Tensor, nn

import fastgpt
import fastgpt.flash_attention
from fastgpt import functional as F
from tests.support.dropin import NAMES, check_same_error

X, Y, W, Q = torch.randn(2, 4), torch.tensor([1, 2]), torch.randn(5, 4), torch.randn(1, 2, 3, 8)

ARGUMENTS = {
    "gelu": dict(input=X, approximate="none", out=torch.empty(2, 4)),
    "layer_norm": dict(input=X, normalized_shape=[4], weight=W[0], bias=W[1], eps=1e-5),
    "rms_norm": dict(input=X, normalized_shape=[4], weight=W[0], eps=None),
    "cross_entropy": dict(
        input=X, target=Y, weight=None, size_average=None, ignore_index=-100, reduce=None, reduction="mean",
        label_smoothing=0.0,
    ),
    "linear_cross_entropy": dict(
        input=X, linear_weight=W, target=Y, linear_bias=None, weight=None, reduction="mean", ignore_index=-100,
        label_smoothing=0.0, options=None,
    ),
    "scaled_dot_product_attention": dict(
        query=Q, key=Q, value=Q, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ),
}  # fmt: skip

ODD = (
    *(
        None,
        True,
        0,
        1,
        -1,
        1.5,
        1j,
        2**63,
        -(2**63),
        2**70,
        float("inf"),
        object(),
        b"x",
        {"a": 1},
        range(4, 5),
    ),
    *([], (), [4], (4,), (True,), [4.0], torch.Size([4]), [torch.tensor(4)], "x", "mean", "tanh"),
    *(np.int64(4), np.float32(0.0), torch.tensor(4), torch.tensor([1]), torch.tensor(1.0), torch.zeros(0)),
    *(X, X.long(), X.bool(), X.double(), X.half(), X.to("meta"), X.to_sparse(), torch.complex(X, X)),
    *(Y, Y.int(), Y.to(torch.uint8), Y.bool(), W[0], torch.randn(2), torch.randn(3), torch.randn(5)),
    *(Q, Q[0], Q[:, :, :1]),
)


def outcome(function, arguments):
    copies = {k: v.clone() if k == "out" and isinstance(v, Tensor) else v for k, v in arguments.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return function(**copies)
    except Exception as error:
        return error


def comparable(result):
    return isinstance(result, Tensor) and not (result.is_meta or result.is_sparse or result.is_complex())


@pytest.mark.parametrize("name", [name for name in NAMES if hasattr(T, name)])
def test_odd_argument_is_treated_as_by_pytorch(name):
    for place in ARGUMENTS[name]:
        for odd in ODD:
            arguments = {**ARGUMENTS[name], place: odd}
            fits = not isinstance(odd, Tensor) or (odd.dim() > 1 and odd.shape[-2] == 3)
            if place in ("key", "value") and not fits:
                continue  # PyTorch reads beside the shorter of the two
            theirs, ours = (outcome(getattr(module, name), arguments) for module in (T, F))
            said = (place, odd, theirs, ours)
            assert type(ours) is type(theirs), said
            if comparable(theirs):
                assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype), said
                torch.testing.assert_close(ours, theirs, equal_nan=True, rtol=0.02, atol=0.02)


def test_gelu_writes_into_out():
    x, out = torch.randn(3), torch.empty(3)
    assert F.gelu(x, approximate="tanh", out=out) is out
    torch.testing.assert_close(out, T.gelu(x, approximate="tanh"))
    with fastgpt.use_backend("reference"), pytest.raises(fastgpt.BackendUnavailable, match="out is given"):
        F.gelu(x, out=out)


def test_ignore_index_that_is_no_int64_is_pytorchs_error():
    for index in (2**63, -(2**63) - 1, 2**70):
        check_same_error(ValueError, "cross_entropy", X, Y, ignore_index=index)
    for index in (2**63 - 1, -(2**63)):
        torch.testing.assert_close(
            F.cross_entropy(X, Y, ignore_index=index), T.cross_entropy(X, Y, ignore_index=index)
        )


def test_autocast_rounds_an_additive_mask_as_pytorch_does():
    q, lowest = torch.randn(2, 1, 3, 8), torch.finfo(torch.float32).min
    for mask in (torch.full((3, 3), lowest), torch.tensor([0.0, lowest, 1.00390625]).expand(3, 3)):
        with torch.autocast("cpu", torch.bfloat16):
            ours, theirs = (m.scaled_dot_product_attention(q, q, q, mask) for m in (F, T))
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("lengths", [(6, 7), (7, 6), (6, 1), (1, 6), (6, 0)])
@pytest.mark.parametrize("dims", [2, 3, 4])
def test_keys_and_values_of_different_lengths_are_an_error(backend, dims, lengths):
    """PyTorch's flash attention reads and writes beside the shorter of the two."""
    q, k, v = (torch.randn(*(2, 3)[4 - dims :], n, 8) for n in (5, *lengths))
    with pytest.raises(RuntimeError):
        F.scaled_dot_product_attention(q, k, v)
    with pytest.raises(ValueError):
        fastgpt.ops.attention(*(t.expand(2, 3, *t.shape[-2:]) for t in (q, k, v)))


def test_every_way_to_attention_refuses_different_lengths():
    q, k, v = (torch.randn(2, 4, n, 8) for n in (5, 6, 7))
    message = "key and value must have the same length"
    calls = {
        "drop-in": lambda: F.scaled_dot_product_attention(q, k, v),
        "vmap": lambda: torch.vmap(F.scaled_dot_product_attention)(q, k, v),
        "dropout": lambda: F.scaled_dot_product_attention(q, k, v, dropout_p=0.1),
        "grouped": lambda: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
        "meta": lambda: F.scaled_dot_product_attention(*(t.to("meta") for t in (q, k, v))),
    }
    for call in calls.values():
        with pytest.raises(RuntimeError, match=message):
            call()
    torch.nn.attention.activate_flash_attention_impl("fastgpt")
    try:
        with pytest.raises(RuntimeError, match=message):
            T.scaled_dot_product_attention(q, k, v)
    finally:
        torch.nn.attention.restore_flash_attention_impl()
    layer = nn.MultiheadAttention(8, 2, batch_first=True)
    fastgpt.accelerate(layer)
    with pytest.raises((RuntimeError, AssertionError)):
        layer(q[0], k[0], v[0], need_weights=False)
