"""Rotary position embedding: every backend against PyTorch by the error rule, and the contract's corners."""

import pytest
import torch
from hypothesis import strategies as st

import fastgpt
from fastgpt import backends, ops
from fastgpt.testing import LAYOUTS, check_error_rule, strided
from tests.support.contract import (
    PROVED_ONCE,
    any_of,
    check_compiles_once,
    check_every_slot_is_written,
    check_opcheck,
    check_same_bits_for_any_thread_count,
    registered,
)

PAIRINGS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])
# (B, H, Hk, T, D, R): whole vectors, a partial rotation, less than a vector, odd sizes, nothing rotated, no elements.
SIZES = [
    (2, 3, 1, 5, 64, 64),
    (2, 4, 2, 3, 96, 32),
    (1, 2, 2, 7, 7, 6),
    (3, 5, 1, 2, 34, 34),
    (1, 17, 2, 1, 10, 2),
    (1, 1, 1, 3, 5, 0),
    (2, 2, 1, 0, 8, 8),
    (0, 2, 1, 3, 8, 4),
    (1, 0, 1, 3, 8, 4),
    (2, 1, 1, 1, 1, 0),
]


def angles(shape, dtype=torch.float32):
    """cos and sin of random angles."""
    angle = 10 * torch.randn(shape)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def inputs_of(sizes, dtype, layout="contiguous", *, per_row=False, angle_dtype=None):
    """q, k, cos and sin."""
    batch, heads, kv_heads, length, size, turned = sizes
    shape = (batch, length, turned // 2) if per_row else (length, turned // 2)
    q, k = (strided((batch, n, length, size), dtype, layout) for n in (heads, kv_heads))
    return q, k, *angles(shape, angle_dtype or dtype)


def pytorch(interleaved):
    def rope(q, k, cos, sin):
        if cos.dim() == 3:
            cos, sin = cos[:, None], sin[:, None]
        return tuple(rotate(x, cos, sin) for x in (q, k))

    def rotate(x, cos, sin):
        turned = 2 * cos.shape[-1]
        first, rest = x[..., :turned], x[..., turned:]
        if interleaved:
            a, b = first[..., ::2], first[..., 1::2]
            y = torch.stack((a * cos - b * sin, b * cos + a * sin), dim=-1).flatten(-2)
        else:
            a, b = first.chunk(2, dim=-1)
            y = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
        return torch.cat((y.to(x.dtype), rest), dim=-1)

    return rope


def ours(interleaved):
    return lambda q, k, cos, sin: ops.rope(q, k, cos, sin, interleaved=interleaved)


@PAIRINGS
@pytest.mark.parametrize("sizes", SIZES)
def test_obeys_the_error_rule(backend, dtype, sizes, interleaved):
    check_error_rule(ours(interleaved), pytorch(interleaved), inputs_of(sizes, dtype))


@PAIRINGS
@pytest.mark.parametrize("layout", LAYOUTS[1:])
@pytest.mark.parametrize("per_row", [False, True], ids=["shared", "per_row"])
def test_any_layout_and_angles_of_each_row(backend, dtype, layout, per_row, interleaved):
    inputs = inputs_of((3, 4, 2, 5, 24, 16), dtype, layout, per_row=per_row)
    check_error_rule(ours(interleaved), pytorch(interleaved), inputs)


@PAIRINGS
def test_heads_of_one_projection(backend, dtype, interleaved):
    """As where one product gives queries, keys and values: nothing is copied, and the gradient reaches the product."""
    cos, sin = angles((6, 16), dtype)

    def of(function):
        def heads(h):
            q, k, _ = h.view(2, 6, 7, 32).transpose(1, 2).split((3, 2, 2), dim=1)
            return function(q, k, cos.to(h.dtype), sin.to(h.dtype))

        return heads

    h = strided((2, 6, 7 * 32), dtype, "contiguous")
    check_error_rule(of(ours(interleaved)), of(pytorch(interleaved)), [h])


@any_of(
    counts=st.tuples(*[st.integers(0, 5)] * 4),
    size=st.integers(0, 70),
    part=st.floats(0, 1),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    angle_dtype=st.sampled_from([torch.float32, None]),
    per_row=st.booleans(),
    interleaved=st.booleans(),
)
def test_any_sizes(backend, counts, size, part, layout, dtype, angle_dtype, per_row, interleaved):
    sizes = (*counts, size, 2 * int(part * (size // 2)))
    inputs = inputs_of(sizes, dtype, layout, per_row=per_row, angle_dtype=angle_dtype)
    check_error_rule(ours(interleaved), pytorch(interleaved), inputs)


@PAIRINGS
@pytest.mark.parametrize(
    "angle_dtype",
    [torch.float32, torch.bfloat16, torch.float16, torch.float64],
    ids=["cos_fp32", "cos_bf16", "cos_fp16", "cos_fp64"],
)
def test_angles_of_another_dtype(backend, dtype, angle_dtype, interleaved):
    """They are not rounded to q's dtype, and the result has q's dtype."""
    q, k, cos, sin = inputs_of((2, 3, 2, 4, 32, 32), dtype, angle_dtype=angle_dtype)
    exact = pytorch(interleaved)(q.double(), k.double(), cos.double(), sin.double())
    for y, x in zip(ops.rope(q, k, cos, sin, interleaved=interleaved), exact, strict=True):
        assert y.dtype == dtype
        eps = torch.finfo(dtype if dtype != torch.float64 else torch.float64).eps
        assert ((y.double() - x).abs() <= 0.5 * eps * x.abs() + 1e-6 * (dtype != torch.float64)).all()


@PAIRINGS
def test_expanded_and_shifted_inputs(backend, interleaved):
    """One key head for all, the same angles for the batch, and rows that begin at odd addresses."""
    q = torch.randn(1 + 2 * 3 * 4 * 16)[1:].view(2, 3, 4, 16).requires_grad_()
    k = torch.randn(2, 1, 4, 16).expand(2, 3, 4, 16).requires_grad_()
    cos, sin = (t.expand(2, 4, 8) for t in angles((4, 8)))
    check_error_rule(ours(interleaved), pytorch(interleaved), [q, k, cos, sin])
    upstream = [torch.randn(1 + 2 * 3 * 4 * 16)[1:].view(2, 3, 4, 16)] * 2
    got = torch.autograd.grad(ops.rope(q, k, cos, sin, interleaved=interleaved), (q, k), upstream)
    expected = torch.autograd.grad(pytorch(interleaved)(q, k, cos, sin), (q, k), upstream)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("sizes", SIZES)
def test_results_are_laid_out_by_position(backend, sizes):
    q, k, cos, sin = inputs_of(sizes, torch.float32, "transposed")
    results = ops.rope(q, k, cos, sin)
    gradients = torch.autograd.grad(results, (q, k), [torch.randn(y.shape) for y in results])
    for x, *found in zip((q, k), results, gradients, strict=True):
        batch, heads, length, size = x.shape
        like = torch.empty(batch, length, heads, size).transpose(1, 2)
        assert [y.stride() for y in found] == [like.stride()] * 2


@PAIRINGS
def test_angle_0_changes_nothing_and_angles_add_up(backend, interleaved):
    q, k, cos, sin = inputs_of((2, 3, 1, 4, 16, 12), torch.float32)
    same = ops.rope(q, k, torch.ones_like(cos), torch.zeros_like(sin), interleaved=interleaved)
    assert torch.equal(same[0], q) and torch.equal(same[1], k)
    back = ops.rope(*ops.rope(q, k, cos, sin, interleaved=interleaved), cos, -sin, interleaved=interleaved)
    torch.testing.assert_close(back, (q, k))


def test_scores_depend_on_the_distance_alone(backend):
    q, k = torch.randn(1, 1, 1, 32).expand(1, 1, 9, 32), torch.randn(1, 1, 1, 32).expand(1, 1, 9, 32)
    angle = torch.arange(9)[:, None] * 10.0 ** -torch.linspace(0, 4, 16)
    a, b = ops.rope(q, k, angle.cos(), angle.sin())
    scores = a[0, 0] @ b[0, 0].T
    for distance in range(-8, 9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-4)


@PAIRINGS
def test_not_finite_values_stay_in_their_pair(backend, dtype, interleaved):
    q, k, cos, sin = inputs_of((1, 2, 1, 3, 20, 16), dtype)
    with torch.no_grad():
        q[0, 1, 2, 4], k[0, 0, 0, 18] = torch.inf, torch.nan
    exact = pytorch(interleaved)(*(t.double() for t in (q, k, cos, sin)))
    found = ops.rope(q, k, cos, sin, interleaved=interleaved)
    torch.testing.assert_close(found, tuple(y.to(dtype) for y in exact), equal_nan=True)
    assert (~found[0].isfinite()).sum() == 2 and (~found[1].isfinite()).sum() == 1


def test_only_the_gradient_asked_for(backend):
    q, k, cos, sin = inputs_of((2, 3, 1, 4, 8, 6), torch.float32)
    upstream = [torch.randn(x.shape) for x in (q, k)]
    both = torch.autograd.grad(ops.rope(q, k, cos, sin), (q, k), upstream)
    of_q = torch.autograd.grad(ops.rope(q, k.detach(), cos, sin)[0], q, upstream[0])
    of_k = torch.autograd.grad(ops.rope(q, k, cos, sin)[1], k, upstream[1])
    assert torch.equal(of_q[0], both[0]) and torch.equal(of_k[0], both[1])
    unused = torch.autograd.grad(ops.rope(q, k, cos, sin)[0].sum(), k, allow_unused=True)
    assert unused == (None,)


def test_only_the_angles_are_kept_and_nothing_is_written_into(backend):
    inputs = inputs_of((2, 3, 1, 4, 8, 6), torch.float32)
    before, kept = [x.detach().clone() for x in inputs], []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        results = ops.rope(*inputs)
    assert sorted(kept) == sorted(t.data_ptr() for t in inputs[2:])
    torch.autograd.backward(results, [torch.ones_like(y) for y in results])
    assert all(map(torch.equal, inputs, before))


def test_angles_that_require_a_gradient_get_it_from_the_reference():
    q, k, *fixed = inputs_of((2, 3, 1, 4, 8, 6), torch.float64)
    cos, sin = (t.requires_grad_() for t in fixed)
    assert torch.autograd.gradcheck(ops.rope, (q, k, cos, sin))
    found = ops.rope(q, k, cos, sin)
    assert found[0].transpose(1, 2).is_contiguous()
    with torch.no_grad(), fastgpt.use_backend(PROVED_ONCE):
        torch.testing.assert_close(ops.rope(q, k, cos, sin), tuple(y.detach() for y in found))


@pytest.mark.only("cpp", "triton", "cuda")
def test_backend_by_name_refuses_angles_that_require_a_gradient(backend):
    q, k, cos, sin = inputs_of((2, 3, 1, 4, 8, 6), torch.float32)
    with pytest.raises(backends.BackendUnavailable, match="cos or sin requires a gradient"):
        ops.rope(q, k, cos.requires_grad_(), sin)


def test_autocast_changes_nothing(backend):
    q, k, cos, sin = inputs_of((2, 3, 1, 4, 8, 6), torch.float32)
    plain = ops.rope(q, k, cos, sin)
    with torch.autocast(q.device.type, torch.bfloat16):
        found = ops.rope(q, k, cos, sin)
    assert all(map(torch.equal, found, plain)) and found[0].dtype == torch.float32


@PAIRINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("turned", [64, 32])
def test_large_results_have_the_bits_of_small_ones(dtype, turned, interleaved):
    """From 16 MiB on the C++ kernels use streaming stores of whole lines."""
    length = 2**24 // dtype.itemsize // (5 * 64) + 3
    q, k, cos, sin = inputs_of((1, 4, 1, length, 64, turned), dtype)
    with fastgpt.use_backend("cpp" if PROVED_ONCE == "cpp" else "reference"):
        found = ops.rope(q, k, cos, sin, interleaved=interleaved)
        for rows in (slice(0, 100), slice(length - 100, length)):
            few = ops.rope(q[:, :, rows], k[:, :, rows], cos[rows], sin[rows], interleaved=interleaved)
            assert all(torch.equal(y[:, :, rows], x) for y, x in zip(found, few, strict=True))


@PAIRINGS
def test_every_slot_is_written(backend, interleaved):
    check_every_slot_is_written(ours(interleaved), inputs_of((2, 3, 1, 5, 33, 26), torch.float32))


@PAIRINGS
def test_same_bits_for_any_thread_count(interleaved):
    with fastgpt.use_backend("cpp"):
        inputs = inputs_of((3, 5, 2, 99, 34, 30), torch.bfloat16)
        check_same_bits_for_any_thread_count(ours(interleaved), inputs)


@pytest.mark.once
@PAIRINGS
def test_opcheck(backend, interleaved):
    for per_row in (False, True):
        q, k, cos, sin = inputs_of((2, 3, 1, 4, 8, 6), torch.float32, "transposed", per_row=per_row)
        q, k = (t.detach().contiguous() for t in (q, k))
        cases = (q, k, cos, sin, interleaved), (q.bfloat16(), k.bfloat16(), cos, sin, interleaved)
        check_opcheck(registered("rope_fwd", backend), *cases)
        check_opcheck(registered("rope_bwd", backend), *cases)


@pytest.mark.once
def test_compiles_once_for_all_shapes(backend):
    batches = [inputs_of((n + 1, 6, 2, n, 8, 6), torch.float32) for n in (4, 6, 12)]
    check_compiles_once(lambda q, k, cos, sin: ops.rope(*ops.rope(q, k, cos, sin), cos, sin), batches)


@pytest.mark.once
def test_compiles_with_one_tensor_for_both(backend):
    q, _, cos, _ = inputs_of((2, 3, 1, 4, 8, 6), torch.float32)
    check_compiles_once(lambda x, c: ops.rope(x, x, c, c), [[q, cos]])


@PAIRINGS
def test_gradcheck_in_float64(interleaved):
    q, k, cos, sin = inputs_of((2, 2, 1, 3, 5, 4), torch.float64)
    with fastgpt.use_backend("cpp"):
        assert torch.autograd.gradcheck(lambda q, k: ours(interleaved)(q, k, cos, sin), (q, k))


@PAIRINGS
@pytest.mark.parametrize("backend", [PROVED_ONCE], indirect=True)
def test_second_derivatives(backend, interleaved):
    q, k, cos, sin = inputs_of((1, 2, 1, 2, 5, 4), torch.float64)
    square = lambda q, k: [y.square() for y in ours(interleaved)(q, k, cos, sin)]  # noqa: E731
    assert torch.autograd.gradgradcheck(square, (q, k))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"k": 3.0}, TypeError, "k must be a torch.Tensor, got float"),
        (
            {"q": lambda q: q.long(), "k": lambda k: k.long()},
            TypeError,
            "q must be float32.* got torch.int64",
        ),
        (
            {"k": lambda k: k.half()},
            TypeError,
            "the dtypes must be equal, got q torch.float32, k torch.float16",
        ),
        ({"sin": lambda t: t.half()}, TypeError, "the dtypes must be equal, got cos torch.float32, sin"),
        ({"cos": lambda t: t.long(), "sin": lambda t: t.long()}, TypeError, "cos must be float32"),
        ({"q": lambda q: q[0]}, ValueError, r"q and k must be \(batch, heads, length, head_dim\)"),
        ({"k": lambda k: k[:1]}, ValueError, "q and k must agree in batch and length"),
        ({"k": lambda k: k[:, :, 1:]}, ValueError, "q and k must agree in batch and length"),
        ({"k": lambda k: k[..., 1:]}, ValueError, "q and k must have one head_dim, got 8 and 7"),
        ({"cos": lambda t: t[1:]}, ValueError, r"cos must be \(4, R/2\) or \(2, 4, R/2\), got \(3, 4\)"),
        ({"cos": lambda t: t[None]}, ValueError, r"cos must be \(4, R/2\) or \(2, 4, R/2\), got \(1, 4, 4\)"),
        ({"sin": lambda t: t[:, 1:]}, ValueError, r"sin must have cos's shape \(4, 4\), got \(4, 3\)"),
        (
            {"cos": lambda t: torch.cat((t, t), 1), "sin": lambda t: torch.cat((t, t), 1)},
            ValueError,
            "cos has 8 columns, one for each pair of rotated channels; a head_dim of 8 has at most 4",
        ),
        (
            {"q": lambda q: q[..., :7], "k": lambda k: k[..., :7]},
            ValueError,
            "cos has 4 columns, .* a head_dim of 7 has at most 3",
        ),
        ({"k": lambda k: k.to_sparse()}, ValueError, "k must be a dense tensor"),
        ({"cos": lambda t: t.to("meta")}, ValueError, "cos is on meta"),
    ],
)
def test_wrong_input_is_named(change, error, message):
    given = {"q": torch.ones(2, 3, 4, 8), "k": torch.ones(2, 1, 4, 8)} | dict(
        zip(("cos", "sin"), angles((4, 4)), strict=True)
    )
    for name, how in change.items():
        given[name] = how(given[name]) if callable(how) else how
    with pytest.raises(error, match=f"^rope: {message}"):
        ops.rope(**given)


def test_meta_tensors_give_shapes():
    q, k, cos, sin = (t.to("meta") for t in inputs_of((2, 3, 1, 4, 8, 6), torch.bfloat16))
    found = ops.rope(q, k, cos, sin)
    assert [tuple(y.shape) for y in found] == [(2, 3, 4, 8), (2, 1, 4, 8)]
    assert all(y.is_meta and y.dtype == torch.bfloat16 and y.transpose(1, 2).is_contiguous() for y in found)
