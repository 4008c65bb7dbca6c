"""The drop-in as a whole: names, fallbacks, transforms, autocast, compilation; options are in test_functional_*.py."""

from functools import partial

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as T
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt
from fastgpt import functional as F
from fastgpt.testing import run_with_gradients
from tests.support.contract import GPU_BACKENDS, check_compiles_once
from tests.support.dropin import NAMES, check_same, check_same_error, classes, example, leaf

EACH = pytest.mark.parametrize("name", NAMES)


def test_every_other_name_is_pytorchs_own_object():
    public = [name for name in dir(T) if not name.startswith("_")]
    assert len(public) > 100
    assert [name for name in public if getattr(F, name) is not getattr(T, name)] == sorted(NAMES)


def test_dir_lists_every_name_and_an_unknown_one_is_an_attribute_error():
    assert set(dir(T)) <= set(dir(F))
    with pytest.raises(AttributeError, match="no_such_function"):
        F.no_such_function


@EACH
def test_kernels_serve_the_ordinary_call(name):
    """Or everything below would compare PyTorch with itself."""
    if not fastgpt.available_backends("gelu")["cpp"]:
        pytest.skip("the C++ kernels are not built")
    arguments, options = example(name)
    assert fastgpt.explain(getattr(F, name), *arguments, **options).backend == "cpp"


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_ordinary_call_is_pytorchs_on_every_backend(backend, dtype, name):
    arguments, options = example(name, dtype)
    check_same(name, *arguments, **options)


@EACH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_autocast_gives_pytorchs_dtypes_and_gradients(backend, dtype, name):
    arguments, options = example(name, dtype)
    if name == "linear_cross_entropy":  # large: bf16's error of a single number is a matter of luck
        arguments = (leaf(100, 32, dtype=dtype), leaf(64, 32, dtype=dtype), classes(100, below=64))
        options = {"linear_bias": leaf(64, dtype=dtype), "reduction": "none"}
    check_same(name, *arguments, autocast=True, **options)


@EACH
def test_autocast_leaves_float64_alone(name):
    arguments, options = example(name, torch.float64)
    check_same(name, *arguments, autocast=True, **options)
    with torch.autocast("cpu", torch.bfloat16):
        result = getattr(F, name)(*arguments, **options)
    assert result.dtype == torch.float64


def test_autocast_with_mixed_dtypes_behaves_as_in_pytorch():
    q, k, wide = (
        leaf(1, 2, 3, 4),
        leaf(1, 2, 3, 4, dtype=torch.bfloat16),
        leaf(1, 2, 3, 4, dtype=torch.float64),
    )
    check_same("scaled_dot_product_attention", q, k, k, autocast=True)
    hidden, weight, y = leaf(100, 32), leaf(64, 32, dtype=torch.bfloat16), classes(100, below=64)
    check_same("linear_cross_entropy", hidden, weight, y, autocast=True, reduction="none")
    with torch.autocast("cpu", torch.bfloat16):
        check_same_error(RuntimeError, "scaled_dot_product_attention", q, k, wide)
        check_same_error(RuntimeError, "scaled_dot_product_attention", wide, wide, wide, torch.zeros(3, 3))
        check_same_error(RuntimeError, "linear_cross_entropy", hidden, weight.double(), y)


@EACH
def test_missing_or_wrong_tensors_are_pytorchs_error(name):
    (first, *rest), options = example(name)
    error = AttributeError if name == "linear_cross_entropy" else TypeError
    for wrong in (None, 3.0, [1.0], "x"):
        check_same_error(error, name, wrong, *rest, **options)
    if name in ("cross_entropy", "scaled_dot_product_attention"):
        check_same_error(TypeError, name, first, None, *rest[1:], **options)


@EACH
def test_tensor_subclass_has_its_own_say(name):
    """A subclass that overrides functions is asked, and one that does not keeps its type, as in PyTorch."""

    class Loud(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            asked.append(function)
            return super().__torch_function__(function, types, args, kwargs or {})

    (first, *rest), options = example(name)
    asked = []
    result = getattr(F, name)(first.detach().as_subclass(Loud), *rest, **options)
    assert type(result) is Loud
    assert getattr(T, name) in asked
    with fastgpt.use_backend("reference"), pytest.raises(fastgpt.BackendUnavailable, match="is a Loud"):
        getattr(F, name)(first.detach().as_subclass(Loud), *rest, **options)


def test_parameters_are_served_by_the_kernels():
    x, w = leaf(3, 5), torch.nn.Parameter(torch.randn(5))
    answer = fastgpt.explain(F.layer_norm, x, [5], w)
    assert answer.backend != "pytorch"
    check_same("layer_norm", x, [5], w)
    check_same("gelu", torch.nn.Parameter(torch.randn(3)))


@EACH
@sdpa_kernel(SDPBackend.MATH)  # PyTorch's fused attention on the CPU knows no higher derivatives
def test_torch_func_transforms_fall_back(name):
    arguments, options = example(name)
    first, rest = arguments[0].detach(), arguments[1:]
    results = []
    for module in (F, T):
        function = lambda x, m=module: getattr(m, name)(x, *rest, **options).sum()  # noqa: E731
        grad = torch.func.grad(function)(first)
        value, tangent = torch.func.jvp(function, (first,), (torch.ones_like(first),))
        hessian = torch.func.hessian(function)(first)
        results.append((grad, value, tangent, hessian))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_vmap_falls_back():
    x, y = torch.randn(3, 4, 5), classes(3, 4)
    torch.testing.assert_close(torch.func.vmap(F.gelu)(x), T.gelu(x))
    torch.testing.assert_close(torch.func.vmap(F.cross_entropy)(x, y), torch.func.vmap(T.cross_entropy)(x, y))
    per_sample = [torch.func.vmap(torch.func.grad(m.cross_entropy))(x, y) for m in (F, T)]
    torch.testing.assert_close(*per_sample)
    with (
        fastgpt.use_backend("reference"),
        pytest.raises(fastgpt.BackendUnavailable, match="transform is active"),
    ):
        torch.func.vmap(F.gelu)(x)


@EACH
@sdpa_kernel(SDPBackend.MATH)
def test_forward_mode_differentiation_falls_back(name):
    (first, *rest), options = example(name)
    direction, tangents = torch.randn_like(first), []
    for module in (F, T):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(first.detach(), direction)
            tangents.append(forward_ad.unpack_dual(getattr(module, name)(dual, *rest, **options)).tangent)
    torch.testing.assert_close(*tangents)


@pytest.mark.once
@EACH
@sdpa_kernel(SDPBackend.MATH)
def test_double_backward_is_pytorchs(backend, name):
    arguments, options = example(name, torch.float32 if backend in GPU_BACKENDS else torch.float64)
    tensors = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
    found = []
    for module in (F, T):
        result = getattr(module, name)(*arguments, **options)
        grads = torch.autograd.grad((result * result).sum(), tensors, create_graph=True)
        found.append(torch.autograd.grad(sum((g * g).sum() for g in grads), tensors))
    tolerance = 1e-4 if backend in GPU_BACKENDS else 1e-10
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@EACH
def test_batched_gradients_are_pytorchs(name):
    """`is_grads_batched` runs the backward under vmap, as the Jacobian of torch.autograd does."""
    arguments, options = example(name)
    results = [getattr(module, name)(*arguments, **options) for module in (F, T)]
    batch = torch.randn(3, *results[0].shape)
    ours, theirs = (torch.autograd.grad(r, arguments[0], batch, is_grads_batched=True)[0] for r in results)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.once
def test_all_compile_without_a_graph_break(backend):
    width = 8
    w, b, head, bias = leaf(width), leaf(width), leaf(11, width), leaf(11)

    def function(x):
        h = F.layer_norm(F.rms_norm(x, [width], w), [width], w, b)
        h = F.scaled_dot_product_attention(h, h, h, is_causal=True)
        h = F.gelu(h, "tanh").flatten(0, 1)
        y = torch.arange(h.shape[0]) % 11
        return F.linear_cross_entropy(h, head, y, linear_bias=bias) + F.cross_entropy(h @ head.T, y)

    check_compiles_once(function, [[leaf(2, n, width)] for n in (4, 5, 9)])


@EACH
def test_meta_tensors_give_pytorchs_shapes(name):
    arguments, options = example(name)
    to_meta = lambda t: t.detach().to("meta") if isinstance(t, torch.Tensor) else t  # noqa: E731
    arguments = [to_meta(t) for t in arguments]
    options = {key: to_meta(value) for key, value in options.items()}
    ours, theirs = (getattr(module, name)(*arguments, **options) for module in (F, T))
    assert ours.device.type == "meta"
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)


@EACH
def test_callers_tensors_are_not_written(backend, name):
    arguments, options = example(name)
    tensors = [t for t in (*arguments, *options.values()) if isinstance(t, torch.Tensor)]
    before = [t.detach().clone() for t in tensors]
    versions = [t._version for t in tensors]
    result = getattr(F, name)(*arguments, **options)
    upstream = torch.randn_like(result)
    kept = upstream.clone()
    result.backward(upstream)
    assert torch.equal(upstream, kept), "the upstream gradient"
    for tensor, copy, version in zip(tensors, before, versions, strict=True):
        assert torch.equal(tensor.detach(), copy)
        assert tensor._version == version


@EACH
def test_upstream_gradients_of_any_stride(backend, name):
    """Expanded, transposed and gapped upstream gradients, as the layers around hand them down."""
    arguments, options = example(name)
    if name.endswith("cross_entropy"):
        options["reduction"] = "none"
    results = [getattr(module, name)(*arguments, **options) for module in (F, T)]
    shape = results[0].shape
    strided = (
        torch.randn(*shape[:-2], *shape[:-3:-1]).transpose(-1, -2)
        if len(shape) > 1
        else torch.randn(2 * shape[0])[::2]
    )
    for upstream in (torch.randn(()).expand(shape), strided, torch.randn(*shape, 2)[..., 1]):
        tensors = [t for t in arguments if isinstance(t, torch.Tensor) and t.requires_grad]
        ours, theirs = (torch.autograd.grad(r, tensors, upstream, retain_graph=True) for r in results)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@EACH
def test_non_contiguous_inputs(backend, name):
    arguments, options = example(name)

    def gapped(tensor):
        if not isinstance(tensor, torch.Tensor):
            return tensor
        wide = torch.full((*tensor.shape, 2), 3, dtype=tensor.dtype)
        wide[..., 0] = tensor.detach()
        return wide[..., 0].requires_grad_(tensor.requires_grad)

    arguments = [gapped(t) for t in arguments]
    assert not arguments[0].is_contiguous()
    check_same(name, *arguments, **{key: gapped(value) for key, value in options.items()})


@pytest.mark.parametrize(
    "view",
    [
        lambda: torch.randn(3, 4).t(),
        lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        lambda: torch.randn(6, 4, 5)[::2, :, 1:].permute(2, 0, 1),
        lambda: torch.randn(1, 4, 1).expand(3, 4, 2),
    ],
)
def test_gelu_keeps_the_order_of_dimensions_in_memory(backend, view):
    x = view().requires_grad_()
    ours, theirs = F.gelu(x), T.gelu(x)
    assert ours.stride() == theirs.stride()
    check_same("gelu", x)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    torch.testing.assert_close(grad, torch.autograd.grad(theirs.sum(), x)[0])


@EACH
def test_results_have_no_graph_without_need(name):
    arguments, options = example(name)
    with torch.no_grad():
        assert not getattr(F, name)(*arguments, **options).requires_grad
    detached = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
    options = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    assert not getattr(F, name)(*detached, **options).requires_grad


@EACH
def test_backward_can_run_twice_on_a_retained_graph(backend, name):
    arguments, options = example(name)
    result = getattr(F, name)(*arguments, **options)
    first = torch.autograd.grad(result.sum(), arguments[0], retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(result.sum(), arguments[0])[0])


@EACH
def test_only_the_gradients_asked_for_exist(name):
    """A tensor that requires no gradient gets none, whichever it is."""
    arguments, options = example(name)
    floats = [i for i, t in enumerate(arguments) if isinstance(t, torch.Tensor) and t.is_floating_point()]
    for alone in floats:
        some = [t.detach().requires_grad_(i == alone) if i in floats else t for i, t in enumerate(arguments)]
        fixed = {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
        results = [
            run_with_gradients(partial(getattr(module, name), **fixed), some, None) for module in (F, T)
        ]
        for a, b in zip(results[0][1], results[1][1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("call", "reason"),
    [
        (lambda: F.gelu(torch.ones(3, dtype=torch.int64)), "the dtype is torch.int64"),
        (lambda: F.gelu(torch.eye(3).to_sparse()), "sparse, nested or quantized"),
        (lambda: F.gelu(torch.ones(3), approximate="fast"), "approximate is neither"),
        (lambda: F.layer_norm(leaf(3, 4), [3]), "shapes do not match"),
        (lambda: F.cross_entropy(leaf(2, 3), torch.rand(2, 3)), "class probabilities"),
        (lambda: F.cross_entropy(leaf(2, 3), classes(2, below=3), size_average=True), "deprecated"),
        (lambda: F.linear_cross_entropy(leaf(2, 3), leaf(5, 3), classes(2), options=object()), "options"),
        (lambda: F.scaled_dot_product_attention(*[leaf(2, 2, 1, 3, 4)] * 3), "5, 5 and 5 dimensions"),
        (lambda: F.gelu(torch.ones(3, device="meta")), "on meta"),
    ],
)
def test_backend_asked_for_by_name_refuses_with_the_reason(call, reason):
    """Never a silent fallback to PyTorch."""
    with fastgpt.use_backend("cpp"), pytest.raises(fastgpt.BackendUnavailable, match=reason) as raised:
        call()
    assert isinstance(raised.value, RuntimeError)
    assert "cpp" in str(raised.value)


def test_float64_is_refused_by_triton():
    for name in NAMES:
        arguments, options = example(name, torch.float64)
        with fastgpt.use_backend("triton"), pytest.raises(fastgpt.BackendUnavailable, match="float64"):
            getattr(F, name)(*arguments, **options)
