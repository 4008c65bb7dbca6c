"""`fastgpt.flash_attn_interface`: FlashAttention's layouts and arguments, against attention written out in float64."""

import inspect
import itertools
import math

import pytest
import torch

from fastgpt import flash_attn_interface as flash_attn
from fastgpt import ops, use_backend

BACKENDS = ("reference", "cpp", "triton")


def attention(q, k, v, *, scale=None, causal=False, window=(-1, -1), softcap=0.0, slopes=None):
    """(L, H, D), (Lk, Hk, D), (Lk, Hk, Dv) of one sequence: (L, H, Dv) and (H, L), in float64."""
    q, k, v = q.double(), k.double(), v.double()
    place = torch.arange(len(q))[:, None] + len(k) - len(q)
    away = torch.arange(len(k)) - place
    seen = torch.ones_like(away, dtype=torch.bool)
    seen &= (away <= 0) if causal else seen
    seen &= (away >= -window[0]) if window[0] >= 0 else seen
    seen &= (away <= window[1]) if window[1] >= 0 else seen
    outs, sums = [], []
    for head in range(q.shape[1]):
        shared = head // (q.shape[1] // k.shape[1])
        scores = q[:, head] @ k[:, shared].T * (q.shape[-1] ** -0.5 if scale is None else scale)
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if slopes is not None:
            scores = scores - slopes[head] * away.abs()
        scores = scores.masked_fill(~seen, -math.inf)
        outs.append(scores.softmax(-1).nan_to_num(0.0) @ v[:, shared])
        sums.append(scores.logsumexp(-1))
    return torch.stack(outs, 1), torch.stack(sums)


def tensors(*shapes, dtype=torch.float32):
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


OPTIONS = [
    {},
    {"causal": True},
    {"window_size": (3, 2)},
    {"causal": True, "window_size": (4, 0)},
    {"causal": True, "window_size": (-1, 5)},
    {"softcap": 2.0, "softmax_scale": 0.5},
]


def plain(options):
    names = {"softmax_scale": "scale", "window_size": "window"}
    return {names.get(key, key): value for key, value in options.items()}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_flash_attn_func_is_attention_with_the_sequence_first(backend, options):
    q, k, v = tensors((2, 7, 4, 16), (2, 11, 2, 16), (2, 11, 2, 16))
    with use_backend(backend):
        out, lse = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True, **options)
        assert torch.equal(flash_attn.flash_attn_func(q, k, v, **options), out)
    assert out.shape == (2, 7, 4, 16) and lse.shape == (2, 4, 7) and lse.dtype == torch.float32
    for row in range(2):
        expected = attention(q[row], k[row], v[row], **plain(options))
        torch.testing.assert_close(out[row].double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[row].double(), expected[1], rtol=1e-4, atol=1e-5)


def test_slopes_dropout_and_determinism_are_passed_on():
    q, k, v = tensors((1, 9, 2, 16), (1, 9, 2, 16), (1, 9, 2, 16))
    slopes = torch.tensor([0.5, 0.1])
    out = flash_attn.flash_attn_func(q, k, v, causal=True, alibi_slopes=slopes, deterministic=True)
    expected = attention(q[0], k[0], v[0], causal=True, slopes=slopes)[0]
    torch.testing.assert_close(out[0].double(), expected, rtol=1e-4, atol=1e-5)
    torch.manual_seed(0)
    dropped = flash_attn.flash_attn_func(q, k, v, dropout_p=0.5)
    assert not torch.allclose(dropped, flash_attn.flash_attn_func(q, k, v))


def test_gradients_flow_to_packed_and_separate_tensors():
    (qkv,) = tensors((2, 8, 3, 4, 16))
    grad = torch.randn(2, 8, 4, 16)
    parts = [part.clone().requires_grad_() for part in qkv.unbind(2)]
    flash_attn.flash_attn_func(*parts, causal=True).backward(grad)
    whole = qkv.clone().requires_grad_()
    flash_attn.flash_attn_qkvpacked_func(whole, causal=True).backward(grad)
    torch.testing.assert_close(whole.grad, torch.stack([p.grad for p in parts], 2))
    (grouped,) = tensors((2, 8, 4 + 2 * 2, 16))
    q, k, v = grouped.split([4, 2, 2], dim=2)
    found = flash_attn.flash_attn_qkvpacked_func(grouped, num_heads_q=4, window_size=(2, 2))
    assert torch.equal(found, flash_attn.flash_attn_func(q, k, v, window_size=(2, 2)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_sequences_are_what_they_are_alone(backend):
    q, k, v = tensors((12, 4, 16), (17, 2, 16), (17, 2, 16))
    starts_q, starts_k = [0, 5, 5, 12], [0, 6, 8, 17]
    lengths = torch.tensor(starts_q, dtype=torch.int32), torch.tensor(starts_k, dtype=torch.int32), 7, 9
    with use_backend(backend):
        out, lse = flash_attn.flash_attn_varlen_func(q, k, v, *lengths, causal=True, return_attn_probs=True)
    assert lse.shape == (4, 12)
    for (a, b), (c, d) in zip(itertools.pairwise(starts_q), itertools.pairwise(starts_k), strict=True):
        expected = (
            attention(q[a:b], k[c:d], v[c:d], causal=True)
            if b > a
            else (q[a:b].double(), lse[:, a:b].double())
        )
        torch.testing.assert_close(out[a:b].double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[:, a:b].double(), expected[1], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"causal": True, "window_size": (3, 0)}, {}, {"window_size": (2, 1)}],
    ids=str,
)
@pytest.mark.parametrize("lengths", [5, [5, 5, 5], [0, 9, 4]], ids=str)
@pytest.mark.parametrize("new", [1, 3])
def test_a_cache_is_extended_in_place_and_attended_to(options, lengths, new):
    q, k, v, keys, values = tensors(
        (3, new, 4, 16), (3, new, 2, 16), (3, new, 2, 16), (3, 14, 2, 16), (3, 14, 2, 16)
    )
    keys_before, values_before = keys.clone(), values.clone()
    given = torch.tensor(lengths, dtype=torch.int32) if isinstance(lengths, list) else lengths
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, keys, values, k, v, cache_seqlens=given, return_softmax_lse=True, **options
    )
    for row, length in enumerate(lengths if isinstance(lengths, list) else [lengths] * 3):
        all_keys = torch.cat((keys_before[row, :length], k[row]))
        all_values = torch.cat((values_before[row, :length], v[row]))
        assert torch.equal(keys[row, : length + new], all_keys) and torch.equal(
            values[row, : length + new], all_values
        )
        assert torch.equal(keys[row, length + new :], keys_before[row, length + new :])
        expected = attention(q[row], all_keys, all_values, **plain(options))
        torch.testing.assert_close(out[row].double(), expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse[row].double(), expected[1], rtol=1e-4, atol=1e-5)


def test_a_full_cache_without_new_tokens_is_attended_to():
    q, keys, values = tensors((2, 1, 4, 16), (2, 6, 2, 16), (2, 6, 2, 16))
    out = flash_attn.flash_attn_with_kvcache(q, keys, values)
    torch.testing.assert_close(out, flash_attn.flash_attn_func(q, keys, values), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_the_rotation_is_at_the_places_in_the_cache(interleaved, causal):
    q, k, v, keys, values = tensors(
        (2, 3, 4, 16), (2, 3, 2, 16), (2, 3, 2, 16), (2, 12, 2, 16), (2, 12, 2, 16)
    )
    angle = torch.randn(12, 4)
    cos, sin = angle.cos(), angle.sin()
    lengths, before = torch.tensor([2, 7]), keys.clone()
    out = flash_attn.flash_attn_with_kvcache(
        q, keys, values, k, v, rotary_cos=cos, rotary_sin=sin, cache_seqlens=lengths, causal=causal,
        rotary_interleaved=interleaved,
    )  # fmt: skip
    for row, length in enumerate(lengths.tolist()):
        places = slice(length, length + 3)
        of_queries = (cos[places], sin[places]) if causal else (cos[[length] * 3], sin[[length] * 3])
        turned = [
            ops.rope(
                x[row, None].transpose(1, 2), x[row, None].transpose(1, 2), *table, interleaved=interleaved
            )[0]
            for x, table in ((q, of_queries), (k, (cos[places], sin[places])))
        ]
        query, key = (x[0].transpose(0, 1) for x in turned)
        torch.testing.assert_close(keys[row, places], key)
        all_keys = torch.cat((before[row, :length], key))
        expected = attention(query, all_keys, values[row, : length + 3], causal=causal)[0]
        torch.testing.assert_close(out[row].double(), expected, rtol=1e-4, atol=1e-5)


def test_what_is_not_computed_is_named():
    q, k, v = tensors((1, 4, 2, 16), (1, 4, 2, 16), (1, 4, 2, 16))
    some = torch.ones(1)
    for name in ("qv", "q_descale", "k_descale", "v_descale"):
        with pytest.raises(ValueError, match=f"flash_attn_func: {name} is not computed"):
            flash_attn.flash_attn_func(q, k, v, **{name: some})
    with pytest.raises(ValueError, match="attention_chunk is not computed"):
        flash_attn.flash_attn_func(q, k, v, attention_chunk=2)
    cu = torch.tensor([0, 4], dtype=torch.int32)
    with pytest.raises(ValueError, match="seqused_k is not computed"):
        flash_attn.flash_attn_varlen_func(q[0], k[0], v[0], cu, cu, 4, 4, seqused_k=some)
    for name in ("page_table", "cache_batch_idx", "cache_leftpad", "cu_seqlens_q"):
        with pytest.raises(ValueError, match=f"{name} is not computed"):
            flash_attn.flash_attn_with_kvcache(q, k, v, **{name: some})
    with pytest.raises(ValueError, match="come in pairs"):
        flash_attn.flash_attn_with_kvcache(q, k, v, k)
    with pytest.raises(ValueError, match="rotary_cos needs k and v"):
        flash_attn.flash_attn_with_kvcache(q, k, v, rotary_cos=some, rotary_sin=some)
    for lengths in (2, torch.tensor([2]), -1):
        with pytest.raises(ValueError, match="do not fit into 4 of the cache"):
            flash_attn.flash_attn_with_kvcache(q, k, v, k[:, :3], v[:, :3], cache_seqlens=lengths)
    with pytest.raises(ValueError, match=r"qkv must be \(B, L, 3, H, D\)"):
        flash_attn.flash_attn_qkvpacked_func(q)
    with pytest.raises(ValueError, match="with num_heads_q=2"):
        flash_attn.flash_attn_qkvpacked_func(q, num_heads_q=2)
    with pytest.raises(TypeError):
        flash_attn.flash_attn_func(q, k.double(), v)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("flash_attn_func", "q k v softmax_scale causal qv q_descale k_descale v_descale"),
        ("flash_attn_qkvpacked_func", "qkv softmax_scale causal q_descale k_descale v_descale"),
        (
            "flash_attn_varlen_func",
            "q k v cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k seqused_q seqused_k softmax_scale causal qv "
            "q_descale k_descale v_descale",
        ),
    ],
)
def test_arguments_stand_where_flash_attention_3_has_them(name, arguments):
    found = " ".join(inspect.signature(getattr(flash_attn, name)).parameters)
    assert found.startswith(f"{arguments} window_size attention_chunk softcap ")


def test_empty_batches_and_sequences_are_results():
    for shape in ((0, 4, 2, 16), (2, 0, 2, 16)):
        q, k, v = tensors(shape, (shape[0], 3, 2, 16), (shape[0], 3, 2, 16))
        assert flash_attn.flash_attn_func(q, k, v, causal=True).shape == shape
