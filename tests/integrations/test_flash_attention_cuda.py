"""The operators of PyTorch's flash attention on a GPU, on ours: what can be proved of them without one.

A build of PyTorch for CPUs has the operators, but no implementation of them. So ours are registered for CPU tensors,
where PyTorch's autograd takes them as it would on a GPU; the kernels below run as in every other test.
"""

import inspect

import pytest
import torch
from torch.nn import attention as registry

import fastgpt
from fastgpt import flash_attention
from fastgpt.testing import ErrorRule

OURS = flash_attention.IMPLEMENTATIONS["CUDA"]
NAMES = [name for names in flash_attention.IMPLEMENTATIONS.values() for name in names]
aten = torch.ops.aten


class Original:
    """What stands for PyTorch's implementation: it remembers what it is called with."""

    def __init__(self):
        self.calls = []

    def call_boxed(self, keys, *args, **kwargs):
        self.calls.append((args, kwargs))
        raise NotImplementedError("the original implementation")


@pytest.fixture
def original():
    """The CUDA operators on CPU tensors, and behind them an original that only remembers; on a GPU, as activated."""
    if torch.get_default_device().type == "cuda":
        registry.activate_flash_attention_impl("fastgpt")
        yield None
        registry.restore_flash_attention_impl()
        return
    if any(torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CPU") for name in OURS):
        pytest.skip("this PyTorch has them for CPUs")
    original = Original()
    library = torch.library.Library("aten", "IMPL")
    for name, function in OURS.items():
        library.impl(name, flash_attention._before(function, original), "CPU", with_keyset=True)
    yield original
    library._destroy()


def leaf(*shape, dtype=torch.float16):
    return torch.randn(shape).to(dtype).requires_grad_()


def sdpa(q, k, v, **options):
    return aten._scaled_dot_product_flash_attention(q, k, v, 0.0, **options)[0]


def plain(q, k, v, is_causal=False, scale=None, window=(-1, -1)):
    """What the operators compute, of (B, H, L, D); the diagonal ends in the lower right corner."""
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * (scale or q.shape[-1] ** -0.5)
    place = torch.arange(k.shape[2]) - torch.arange(q.shape[2])[:, None] - (k.shape[2] - q.shape[2])
    left, right = window[0], 0 if is_causal else window[1]
    seen = ((place >= -left) | (left < 0)) & ((place <= right) | (right < 0))
    p = scores.masked_fill(~seen, -torch.inf).softmax(-1).masked_fill(~seen, 0)
    return p @ v.repeat_interleave(q.shape[1] // v.shape[1], 1)


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_those_of_the_schema(name):
    """PyTorch leaves out arguments that have their default, and passes those behind the star by name."""
    function = {**flash_attention.IMPLEMENTATIONS["CPU"], **OURS}[name]
    parameters = list(inspect.signature(function).parameters.values())
    arguments = getattr(aten, name).default._schema.arguments
    assert [p.name for p in parameters] == [a.name for a in arguments]
    assert [p.kind is p.KEYWORD_ONLY for p in parameters] == [a.kwarg_only for a in arguments]
    for parameter, argument in zip(parameters, arguments, strict=True):
        has = argument.has_default_value()
        assert parameter.default == (argument.default_value if has else inspect.Parameter.empty), (
            argument.name
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"is_causal": True, "scale": 0.3}], ids=str)
def test_results_and_gradients(original, backend, dtype, options):
    inputs = leaf(2, 4, 19, 16, dtype=dtype), *(leaf(2, 2, 19, 16, dtype=dtype) for _ in range(2))
    ErrorRule(lambda *t: plain(*t, **options), inputs).check(lambda *t: sdpa(*t, **options))


def test_causal_rows_that_see_nothing(original):
    """More rows than columns: the first ones are 0, and so are their gradients."""
    q, k, v = inputs = leaf(1, 2, 7, 8), leaf(1, 2, 4, 8), leaf(1, 2, 4, 8)
    ErrorRule(lambda *t: plain(*t, is_causal=True), inputs).check(lambda *t: sdpa(*t, is_causal=True))
    out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)[:2]
    assert (out[:, :, :3] == 0).all()
    assert (lse[:, :, :3] == torch.inf).all()  # FlashAttention's: exp(anything - inf) is 0
    assert lse[:, :, 3:].isfinite().all()


def described(results):
    return [(t.shape, t.dtype, t.stride()) if isinstance(t, torch.Tensor) else t for t in results]


@pytest.mark.parametrize("layout", ["heads first", "rows first", "one projection"])
def test_shapes_dtypes_and_strides_are_those_that_pytorch_traces_with(original, layout):
    if layout == "heads first":
        q, k, v = (leaf(2, 3, 5, 8) for _ in range(3))
    elif layout == "rows first":
        q, k, v = (leaf(2, 5, 3, 8).transpose(1, 2) for _ in range(3))
    else:
        q, k, v = (t.transpose(1, 2) for t in leaf(2, 5, 3, 3, 8).unbind(2))

    def run(q, k, v):
        found = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, True)
        gradients = aten._scaled_dot_product_flash_attention_backward(
            torch.ones_like(found[0]), q, k, v, *found[:6], 0.0, True, *found[6:8]
        )
        rows = [t.transpose(1, 2) for t in (q, k, v)]
        dense = aten._flash_attention_forward(*rows, None, None, 5, 5, 0.0, True, False)
        return described([*found, *gradients, *dense])

    with torch.no_grad():
        assert run(q, k, v) == run(*(t.detach().to("meta") for t in (q, k, v)))


def packed(lengths, heads=2, size=8):
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    return leaf(int(starts[-1]), heads, size), starts


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [(-1, -1), (2, 1), (0, -1)])
def test_packed_documents(original, backend, causal, window):
    """What `torch.nn.attention.varlen` calls; (total, H, D), each document for itself."""
    q, cu_q = packed((5, 1, 9), heads=4)
    k, cu_k = packed((7, 3, 9))
    v, _ = packed((7, 3, 9))
    options = {"window_size_left": window[0], "window_size_right": window[1]}
    inputs, longest = (q, k, v), (9, 9)

    def theirs(q, k, v):
        parts = zip(
            *(t.split(cu.diff().tolist()) for t, cu in ((q, cu_q), (k, cu_k), (v, cu_k))), strict=True
        )
        documents = [[t.transpose(0, 1)[None] for t in part] for part in parts]
        return torch.cat([plain(*d, is_causal=causal, window=window)[0].transpose(0, 1) for d in documents])

    arguments = (cu_q, cu_k, *longest, 0.0, causal)
    ErrorRule(theirs, inputs).check(lambda *t: Packed.apply(*t, arguments, options))
    found = aten._flash_attention_forward(*inputs, *arguments, False, **options)
    meta = aten._flash_attention_forward(*(t.to("meta") for t in inputs), *arguments, False, **options)
    assert described(found) == described(meta)


class Packed(torch.autograd.Function):
    """Forward and backward of packed documents, as `torch.nn.attention.varlen` joins them."""

    @staticmethod
    def forward(ctx, q, k, v, arguments, options):
        out, lse, *state, _ = aten._flash_attention_forward(q, k, v, *arguments, False, **options)
        ctx.save_for_backward(q, k, v, out, lse, *state)
        ctx.arguments, ctx.options = arguments, options
        return out

    @staticmethod
    def backward(ctx, grad):
        *tensors, rng_state, unused = ctx.saved_tensors
        found = aten._flash_attention_backward(
            grad, *tensors, *ctx.arguments, rng_state, unused, **ctx.options
        )
        return *found, None, None


def dense(**options):
    """A call of `_flash_attention_forward` with the options, of (B, L, H, D)."""
    size, dtype = options.pop("size", 8), options.pop("dtype", torch.float16)
    x = torch.randn(1, 5, 2, size).to(dtype)
    arguments = [x, x, x, None, None, 5, 5, options.pop("dropout_p", 0.0), True, options.pop("debug", False)]
    return lambda: aten._flash_attention_forward(*arguments, **options), arguments, options


@pytest.mark.parametrize(
    "options",
    [
        {"dropout_p": 0.5},
        {"debug": True},
        {"dtype": torch.float32},
        {"size": 264},
        {"alibi_slopes": torch.ones(2)},
        {"seqused_k": torch.ones(1, dtype=torch.int32)},
        {"block_table": torch.ones(1, 1, dtype=torch.int32)},
        {"num_splits": 2},
    ],
    ids=lambda options: next(iter(options)),
)
def test_what_is_not_covered_goes_on_untouched(original, options):
    call, arguments, keywords = dense(**options)
    with pytest.raises(NotImplementedError, match="the original"):
        call()
    ((args, kwargs),) = original.calls
    for given, passed in zip(arguments, args, strict=False):
        assert passed is given or passed == given
    assert all(kwargs[name] is value or kwargs[name] == value for name, value in keywords.items())


def test_gradients_of_dropout_go_on_untouched(original):
    x = torch.randn(1, 2, 5, 8).half()
    lse, state = torch.zeros(1, 2, 5), torch.zeros(2, dtype=torch.uint64)
    arguments = (x, x, x, x, x, lse, None, None, 5, 5, 0.5, False, state, state)
    with pytest.raises(NotImplementedError, match="the original"):
        aten._scaled_dot_product_flash_attention_backward(*arguments)
    assert original.calls


def test_covered_calls_never_reach_the_original(original):
    dense()[0]()
    assert not original.calls


def test_backend_asked_for_by_name_is_the_one(original):
    call = dense()[0]
    assert fastgpt.explain(call).backend == (
        "cpp" if fastgpt.available_backends("attention")["cpp"] else "reference"
    )
    with fastgpt.use_backend("reference"):
        assert fastgpt.explain(call).backend == "reference"


def test_activation_takes_the_operators_of_cuda_where_pytorch_has_them():
    """With implementations that stand for those of a build with CUDA."""
    if torch.backends.cuda.is_built():
        pytest.skip("this PyTorch has its own")
    flat = lambda: [torch._C._dispatch_dump(f"aten::{name}") for name in OURS]  # noqa: E731
    bare = flat()
    library = torch.library.Library("aten", "IMPL")
    for name in OURS:
        library.impl(name, lambda *args, **kwargs: None, "CUDA")
    before = flat()
    registry.activate_flash_attention_impl("fastgpt")
    try:
        assert all(f"CUDA: registered at {flash_attention.__file__}" in table for table in flat())
    finally:
        registry.restore_flash_attention_impl()
    assert flat() == before
    library._destroy()
    assert flat() == bare


def test_activation_leaves_alone_what_pytorch_has_no_implementation_of():
    if torch.backends.cuda.is_built():
        pytest.skip("this PyTorch has all")
    registry.activate_flash_attention_impl("fastgpt")
    try:
        assert not any(
            torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", "CUDA") for name in OURS
        )
    finally:
        registry.restore_flash_attention_impl()
