"""Few rows and many columns, as in decoding: Triton's forward in parts of the columns, joined by a second kernel."""

import pytest
import torch

import fastgpt
from fastgpt import ops
from fastgpt.reference import dropout_keep
from fastgpt.testing import check_error_rule
from tests.ops.test_attention import inputs
from tests.support.plain_attention import composed

attention = pytest.importorskip("fastgpt.kernels.attention")

SPLIT_CASES = {
    "full": {},
    "causal": {"causal": "lower_right"},
    "window, and parts that see nothing": {"causal": "lower_right", "window": 40},
    "upper left, and parts that see nothing": {"causal": "upper_left"},
    "softcap": {"softcap": 1.5},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "dropout": {"dropout_p": 0.3, "seed": 2**40 + 17},
    "dropout, causal": {"dropout_p": 0.4, "seed": 3, "causal": "lower_right"},
}


@pytest.mark.parametrize("case", SPLIT_CASES)
@pytest.mark.parametrize(
    ("rows", "columns", "dtype"),
    [
        pytest.param(1, 150, torch.float32, marks=pytest.mark.slow),
        (3, 140, torch.bfloat16),
        *[
            pytest.param(16, 131, d, marks=pytest.mark.slow)
            for d in (torch.float32, torch.bfloat16, torch.float16)
        ],
        *[pytest.param(1, 150, d, marks=pytest.mark.slow) for d in (torch.bfloat16, torch.float16)],
        *[
            pytest.param(3, 257, d, marks=pytest.mark.slow)
            for d in (torch.float32, torch.bfloat16, torch.float16)
        ],
    ],
)
def test_few_rows_split_their_columns(dtype, case, rows, columns, monkeypatch):
    joined = []
    kernel = attention._attention_combine_fwd
    grid = (rows, 4, 1)
    counting = {grid: lambda *a, **k: joined.append(a) or kernel[grid](*a, **k)}
    monkeypatch.setattr(attention, "_attention_combine_fwd", counting)
    options = SPLIT_CASES[case]
    mask = torch.rand(rows, columns) > 0.3 if case == "full" else None
    with fastgpt.use_backend("triton"):
        check_error_rule(
            lambda q, k, v: ops.attention(q, k, v, attn_mask=mask, **options),
            lambda q, k, v: composed(q, k, v, attn_mask=mask, **options),
            inputs(dtype, batch=1, kv_heads=2, rows=rows, columns=columns),
        )
    assert joined


def test_log_sum_exp_of_split_columns(backend):
    """Also of rows that see nothing, in one part or in all."""
    q, k, v = inputs(torch.float32, rows=3, columns=200)
    mask = torch.rand(3, 200) > 0.5
    mask[1] = False
    mask[2, 30:] = False
    out, lse = ops.attention(q, k, v, attn_mask=mask, return_lse=True)
    s = (q @ k.transpose(-1, -2) * 0.25).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(lse, torch.logsumexp(s, -1))
    assert torch.equal(out[:, :, 1], torch.zeros_like(out[:, :, 1]))
    assert all(g.isfinite().all() for g in torch.autograd.grad(out.sum(), (q, k, v)))


def test_dropout_mask_of_split_columns_is_the_references():
    q, k, _ = inputs(torch.float32, rows=2, columns=128)
    v = torch.eye(128).expand(2, 4, 128, 128)
    seed = torch.tensor([-(2**62) + 12345])
    with fastgpt.use_backend("triton"):
        out = ops.attention(q, k, v, dropout_p=0.25, seed=seed)
    assert torch.equal(out != 0, dropout_keep(seed, 0.25, (2, 4, 2, 128)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_more_parts_than_are_joined_at_once(dtype, monkeypatch):
    """One head on a GPU of many multiprocessors: 41 parts, joined 32 at a time."""
    parts = []
    split = attention._split
    monkeypatch.setattr(attention, "multiprocessors", lambda _: 32)
    monkeypatch.setattr(attention, "_split", lambda *a: parts.append(split(*a)[0]) or split(*a))
    with fastgpt.use_backend("triton"):
        check_error_rule(
            ops.attention,
            composed,
            [torch.randn(1, 1, n, 16).to(dtype) for n in (2, 2600, 2600)],
        )
    assert set(parts) == {41}
