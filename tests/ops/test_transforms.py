"""Transforms of torch.func, forward mode and differentiated backwards, in eager mode and under torch.compile."""

import pytest
import torch
import torch.nn.functional as T
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt
from fastgpt import functional as F
from tests.support import every_op
from tests.support.dropin import NAMES, classes

TARGET, CLASSES, VECTORS = torch.tensor([0, 3, 1, -100]), 6, torch.randn(6, 5).double()


def of_one_tensor(module, name):
    """A drop-in function of a matrix (4, 5), the other arguments fixed.

    layer_norm has no weights: with them Dynamo cannot trace the forward mode of PyTorch's own.
    """
    options = {
        "gelu": {"approximate": "tanh"},
        "layer_norm": {"normalized_shape": [5]},
        "rms_norm": {"normalized_shape": [5], "eps": 1e-3},
        "cross_entropy": {"target": TARGET, "label_smoothing": 0.2, "reduction": "none"},
        "linear_cross_entropy": {"linear_weight": VECTORS, "target": TARGET, "reduction": "sum"},
        "scaled_dot_product_attention": {"is_causal": True},
    }[name]
    function = getattr(module, name)
    if name == "scaled_dot_product_attention":
        return lambda x: function(x.cos(), x, 2 * x, **options)
    return lambda x: function(x, **options)


def summed(function):
    return lambda x: function(x).sum()


def tangent(function):
    def of_duals(x):
        with forward_ad.dual_level():
            return forward_ad.unpack_dual(function(forward_ad.make_dual(x, x.cos()))).tangent

    return of_duals


TRANSFORMS = {
    "jvp": lambda f: lambda x: torch.func.jvp(f, (x,), (x.cos(),)),
    "vjp": lambda f: lambda x: torch.func.vjp(f, x)[1](f(x).cos())[0],
    "per-sample": lambda f: lambda x: torch.vmap(torch.func.grad(summed(f)))(torch.stack([x, x.cos()])),
    "jacrev": torch.func.jacrev,
    "jacfwd": torch.func.jacfwd,
    "hessian": lambda f: torch.func.hessian(summed(f)),
    "vmap of vmap": lambda f: lambda x: torch.vmap(torch.vmap(lambda a, b: f(a * x + b), (0, None)), (None, 0))(
        torch.arange(2.0), torch.arange(3.0)
    ),
    "dual": tangent,
}  # fmt: skip


def results(function, x, backward=True):
    """What a function returns and, with `backward`, the gradient of its square."""
    leaf = x.clone().requires_grad_(backward)
    with sdpa_kernel(SDPBackend.MATH):  # the only one of PyTorch's that has every derivative
        found = function(leaf)
        found = found if isinstance(found, tuple) else (found,)
        if not backward:
            return found
        differentiable = [t for t in found if t.requires_grad]
        assert differentiable
        gradient = torch.autograd.grad(sum(t.square().sum() for t in differentiable), leaf)
    return [t.detach() for t in (*found, *gradient)]


# Left to the slow tier: what takes longest to trace.
TRACED_LONG = ("jacfwd", "hessian", "vmap of vmap")


@pytest.mark.parametrize(
    "transform", [pytest.param(t, marks=[pytest.mark.slow] * (t in TRACED_LONG)) for t in TRANSFORMS]
)
@pytest.mark.parametrize("name", NAMES)
def test_compiled_transform_is_pytorchs(name, transform):
    x = torch.randn(4, 5, dtype=torch.float64)
    make, backward = TRANSFORMS[transform], transform != "dual"  # which not every loss of PyTorch's can do
    expected = results(make(of_one_tensor(T, name)), x, backward)
    torch._dynamo.reset()
    compiled = torch.compile(make(of_one_tensor(F, name)), backend="aot_eager", fullgraph=True)
    for ours, theirs in zip(results(compiled, x, backward), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_transform_compiled_by_inductor_is_pytorchs(name):
    x = torch.randn(4, 5, dtype=torch.float64)
    for transform in ("jvp", "per-sample"):
        expected = results(TRANSFORMS[transform](of_one_tensor(T, name)), x)
        torch._dynamo.reset()
        compiled = torch.compile(TRANSFORMS[transform](of_one_tensor(F, name)), fullgraph=True)
        for ours, theirs in zip(results(compiled, x), expected, strict=True):
            torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_transform_around_a_compiled_function_is_pytorchs(name):
    x, found = torch.randn(4, 5, dtype=torch.float64), []
    for module in (F, T):
        torch._dynamo.reset()
        compiled = torch.compile(of_one_tensor(module, name), backend="aot_eager")
        with sdpa_kernel(SDPBackend.MATH):
            found.append(
                (
                    torch.func.grad(summed(compiled))(x),
                    torch.func.jvp(compiled, (x,), (x.cos(),))[1],
                    torch.vmap(compiled)(torch.stack([x, x.sin()])),
                )
            )
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_gradient_of_a_traced_gradient_is_pytorchs(name):
    """Dynamo can trace torch.autograd.grad(create_graph=True): then the whole call is PyTorch's."""

    def gradient(function):
        return lambda x: torch.autograd.grad(function(x).sum(), x, create_graph=True)[0]

    x = torch.randn(4, 5, dtype=torch.float64)
    expected = results(gradient(of_one_tensor(T, name)), x)
    torch._dynamo.reset()
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        compiled = torch.compile(gradient(of_one_tensor(F, name)), backend="aot_eager", fullgraph=True)
        found = results(compiled, x)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_backend_named_refuses_a_compiled_transform():
    torch._dynamo.reset()
    compiled = torch.compile(torch.vmap(F.gelu), backend="eager", fullgraph=True)
    with (
        fastgpt.use_backend("reference"),
        pytest.raises(Exception, match=r"torch\.func transform is active"),
    ):
        compiled(torch.randn(2, 3))


def test_other_thread_is_not_in_a_transform_of_this_one():
    """What is active is a thread's own, and a call that PyTorch served leaves nothing behind."""
    torch.vmap(F.gelu)(torch.randn(2, 3))
    assert fastgpt.explain(F.gelu, torch.randn(3)).backend != "pytorch"


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", every_op.NAMES)
def test_op_under_a_transform_names_the_remedy(name, compiled):
    ours, _, leaves = every_op.case(name, torch.float32, rows=4, size=8)
    inputs = [leaf.detach() for leaf in leaves]

    def total(first, *rest):
        result = ours(first, *rest)
        return (result[0] if isinstance(result, tuple) else result).sum()

    def run(function):
        torch._dynamo.reset()
        return torch.compile(function, backend="eager", fullgraph=True) if compiled else function

    transformed = {
        "grad": lambda: torch.func.grad(total)(*inputs),
        "jvp": lambda: torch.func.jvp(total, tuple(inputs), tuple(inputs)),
        "vmap": lambda: torch.vmap(lambda a: total(a * inputs[0], *inputs[1:]))(torch.ones(2)),
        "dual": lambda: tangent(lambda x: total(x, *inputs[1:]))(inputs[0]),
    }
    for call in transformed.values():
        with pytest.raises(RuntimeError, match=r"fastgpt\.ops\.\w+ has no rule .* call fastgpt\.\w+\.\w+"):
            run(call)()
    with forward_ad.dual_level():  # nothing has a tangent
        torch.testing.assert_close(run(total)(*inputs), total(*inputs))


def test_explain_says_which_transform_an_op_refused():
    answer = fastgpt.explain(torch.vmap(fastgpt.ops.gelu), torch.randn(2, 3))
    assert answer.backend is None
    assert "torch.func" in answer.reasons["cpp"]


@pytest.mark.parametrize("name", every_op.NAMES)
@sdpa_kernel(SDPBackend.MATH)
def test_tangent_of_an_upstream_gradient_is_carried_on(name):
    """Forward over reverse: the graph is older than the dual level."""
    ours, theirs, leaves = every_op.case(name, torch.float64, rows=5, size=9)
    found = []
    upstream = None
    for function in (ours, theirs):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = upstream or [(torch.randn_like(o), torch.randn_like(o)) for o in outputs]
        pairs = tuple(zip(*upstream, strict=True))

        def pull(*grads, outputs=outputs):
            return torch.autograd.grad(outputs, leaves, grads, retain_graph=True)

        with forward_ad.dual_level():
            duals = map(forward_ad.unpack_dual, pull(*map(forward_ad.make_dual, *pairs)))
            tangents = [t.clone() for dual in duals for t in dual]
        assert not any(t.requires_grad for t in tangents)
        of_func = torch.func.jvp(pull, *pairs)[1]
        batches = tuple(torch.stack([a, b, a + b]) for a, b in upstream)
        of_batches = torch.func.jvp(torch.vmap(pull), batches, tuple(b.cos() for b in batches))
        found.append([*tangents, *of_func, *of_batches[0], *of_batches[1], *pull(*pairs[0])])
    for mine, pytorchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, pytorchs)


@pytest.mark.parametrize("name", every_op.NAMES)
@sdpa_kernel(SDPBackend.MATH)
def test_tangent_of_a_gradient_is_differentiable(name):
    ours, theirs, leaves = every_op.case(name, torch.float64, rows=5, size=9)
    upstream, found = None, []
    for function in (ours, theirs):
        outputs = function(*leaves)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        upstream = upstream or [(torch.randn_like(o), torch.randn_like(o)) for o in outputs]
        with forward_ad.dual_level():
            grads = [forward_ad.make_dual(*pair) for pair in upstream]
            gradients = torch.autograd.grad(outputs, leaves, grads, create_graph=True)
            tangents = [forward_ad.unpack_dual(g).tangent for g in gradients]
            total = sum(t.square().sum() for t in tangents)
            again = torch.autograd.grad(total, leaves, allow_unused=True) if total.requires_grad else ()
            found.append([t.detach().clone() for t in (*tangents, *again) if t is not None])
    for mine, pytorchs in zip(*found, strict=True):
        torch.testing.assert_close(mine, pytorchs)


def test_backward_under_compiled_autograd_is_the_same():
    x = torch.randn(4, 5, requires_grad=True)
    expected = torch.autograd.grad(F.gelu(x).sum(), x)[0]
    torch._dynamo.reset()
    with torch._dynamo.compiled_autograd._enable(torch.compile(backend="aot_eager")):
        F.gelu(x).sum().backward()
    torch.testing.assert_close(x.grad, expected)


def test_accelerated_layer_has_per_sample_gradients_compiled():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
    x, y = torch.randn(3, 4, 8), classes(3, 4, below=8)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters, x, y):
        return F.cross_entropy(torch.func.functional_call(layer, parameters, (x[None],))[0], y)

    per_sample = torch.vmap(torch.func.grad(loss), (None, 0, 0))
    with sdpa_kernel(SDPBackend.MATH):
        expected = per_sample(parameters, x, y)
        fastgpt.accelerate(layer)
        torch._dynamo.reset()
        found = torch.compile(per_sample, backend="aot_eager")(parameters, x, y)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient)
