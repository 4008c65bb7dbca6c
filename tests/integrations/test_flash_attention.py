"""fastgpt as PyTorch's flash attention: PyTorch's results, only while it is active, and PyTorch's kernels back."""

import contextlib
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as T
from torch.nn import attention as registry
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt
import fastgpt.flash_attention  # makes the name known
from fastgpt.testing import LAYOUTS, ErrorRule, poisoned_memory, strided

OPERATORS = [f"aten::{name}" for names in fastgpt.flash_attention.IMPLEMENTATIONS.values() for name in names]
OURS = "registered at " + fastgpt.flash_attention.__file__


@contextlib.contextmanager
def active():
    registry.activate_flash_attention_impl("fastgpt")
    try:
        yield
    finally:
        registry.restore_flash_attention_impl()


def dispatched():
    """What PyTorch's dispatcher holds for every operator."""
    return [torch._C._dispatch_dump(name) for name in OPERATORS]


@pytest.fixture(autouse=True)
def _pytorch_is_as_it_was():
    if torch.get_default_device().type == "cuda":
        pytest.skip("these are the operators of CPUs")
    before = dispatched()
    assert not any(OURS in table for table in before)
    yield
    assert dispatched() == before
    assert registry.current_flash_attention_impl() is None


def leaf(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).requires_grad_()


def flash(**options):
    """scaled_dot_product_attention, which may take flash attention and nothing else."""

    def call(*tensors):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return T.scaled_dot_product_attention(*tensors, **options)

    return call


def check(inputs, rounding=None, **options):
    """Results and gradients by the error rule; shape, dtype and strides exactly."""
    function = flash(**options)
    rule = ErrorRule(function, inputs, rounding=rounding)
    with torch.no_grad():
        theirs = function(*inputs)
    with active():
        rule.check(function)
        with torch.no_grad():
            assert function(*inputs).stride() == theirs.stride()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [False, True])
def test_results_and_gradients(backend, dtype, causal):
    q, k, v = (leaf(2, 3, n, 16, dtype=dtype) for n in (37, 41, 41))
    check((q, k, v), is_causal=causal)


@pytest.mark.parametrize("scale", [None, 0.3])
def test_grouped_queries_and_scale(backend, scale):
    q, k, v = leaf(2, 4, 9, 8), leaf(2, 2, 9, 8), leaf(2, 2, 9, 8)
    check((q, k, v), enable_gqa=True, is_causal=True, scale=scale)


def test_float64():
    check([leaf(1, 2, 9, 8, dtype=torch.float64) for _ in range(3)], is_causal=True)


@pytest.mark.parametrize("layout", [layout for layout in LAYOUTS if layout != "transposed"])
def test_strided_views(backend, layout):
    """Transposed ones are no business of flash attention: it takes contiguous rows."""
    check([strided((2, 3, 13, 8), torch.float32, layout) for _ in range(3)], is_causal=True)


def test_views_of_one_projection(backend):
    """As GPT-2 makes them: the result is laid out so that the heads join without a copy."""
    qkv = torch.randn(2, 11, 3, 4, 8, requires_grad=True)
    check([t.transpose(1, 2).detach().requires_grad_() for t in qkv.unbind(2)], is_causal=True)


@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 9), (2, 1, 7, 9), (1, 3, 1, 9)])
def test_masks(backend, mask_dtype, shape):
    """Rows that see nothing among them."""
    mask = torch.rand(shape) > 0.4
    mask[..., 0, :] = False
    if mask_dtype != torch.bool:
        mask = torch.where(mask, torch.randn(shape), -torch.inf).to(mask_dtype)
    dtype = torch.bfloat16 if mask_dtype == torch.bfloat16 else torch.float32
    q, k, v = (leaf(2, 3, n, 8, dtype=dtype) for n in (7, 9, 9))
    whole = {"attn_mask": mask.float() if mask_dtype == torch.bfloat16 else mask}
    rule = ErrorRule(
        flash(attn_mask=mask), (q, k, v), exact=lambda *t: flash(**whole)(*(x.float() for x in t))
    )
    with active():
        rule.check(flash(attn_mask=mask))


@pytest.mark.parametrize("swap", ["forward", "backward"])
@pytest.mark.parametrize("masked", [False, True])
def test_forward_of_one_and_backward_of_the_other(swap, masked):
    """Who switches between the two gets the same gradients, also of rows that see nothing."""
    mask = torch.rand(9, 9) > 0.4 if masked else None
    if masked:
        mask[3] = False
    q, k, v = inputs = [leaf(2, 3, 9, 8) for _ in range(3)]
    grad = torch.randn(2, 3, 9, 8)
    expected = torch.autograd.grad(flash(attn_mask=mask)(q, k, v), inputs, grad)
    with active() if swap == "forward" else contextlib.nullcontext():
        out = flash(attn_mask=mask)(q, k, v)
    with active() if swap == "backward" else contextlib.nullcontext():
        found = torch.autograd.grad(out, inputs, grad)
    torch.testing.assert_close(found, expected)


def test_every_slot_is_written():
    q, k, v = (leaf(2, 3, 13, 8) for _ in range(3))
    with active(), poisoned_memory():
        out = flash(is_causal=True)(q, k, v)
        assert all(t.isfinite().all() for t in (out, *torch.autograd.grad(out.sum(), (q, k, v))))


def test_autocast(backend):
    def call(*tensors):
        with torch.autocast("cpu", torch.bfloat16):
            return T.scaled_dot_product_attention(*tensors, is_causal=True)

    inputs = [leaf(2, 3, 13, 8) for _ in range(3)]
    rule = ErrorRule(call, inputs, rounding=torch.bfloat16)
    with active():
        rule.check(call)


def kernels_run(function):
    """The operators of fastgpt that a call runs, as the profiler sees them."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        function()
    return {event.name for event in profile.events() if event.name.startswith("fastgpt::")}


@pytest.mark.skipif(
    not fastgpt.available_backends("attention")["cpp"], reason="the C++ kernels are not built"
)
def test_our_kernels_run_forward_and_backward():
    q, k, v = (leaf(1, 2, 5, 8) for _ in range(3))

    def step():
        T.scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()

    assert kernels_run(step) == set()
    with active():
        assert kernels_run(step) == {"fastgpt::attention_fwd_cpp", "fastgpt::attention_bwd_cpp"}
        with fastgpt.use_backend("reference"):
            assert kernels_run(step) == {
                "fastgpt::attention_fwd_reference",
                "fastgpt::attention_bwd_reference",
            }
    assert kernels_run(step) == set()


def test_multihead_attention_runs_on_ours():
    layer = torch.nn.MultiheadAttention(16, 2, batch_first=True)
    x = torch.randn(2, 5, 16)
    expected = layer(x, x, x, need_weights=False)[0]
    with active():
        explained = fastgpt.explain(layer, x, x, x, need_weights=False)
        assert [d.op for d in explained.decisions] == ["attention"]
        torch.testing.assert_close(layer(x, x, x, need_weights=False)[0], expected)


def test_import_registers_the_name_and_changes_nothing():
    script = (
        "import torch\n"
        "from torch.nn.attention import list_flash_attention_impls as known\n"
        f"dump = lambda: [torch._C._dispatch_dump(name) for name in {OPERATORS}]\n"
        "before = dump()\n"
        "import fastgpt\n"
        "import fastgpt.model, fastgpt.training.trainer\n"
        "assert 'fastgpt' not in known()\n"
        "import fastgpt.flash_attention\n"
        "assert 'fastgpt' in known()\n"
        "assert dump() == before\n"
        "torch.nn.attention.activate_flash_attention_impl('fastgpt')\n"
        "assert dump() != before\n"
    )
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env
    )
    assert done.returncode == 0, done.stderr
    assert "Overrid" not in done.stderr  # PyTorch warns of it once a process


def test_activated_twice_it_is_restored_at_once():
    before = dispatched()
    registry.activate_flash_attention_impl("fastgpt")
    once = dispatched()
    registry.activate_flash_attention_impl("fastgpt")
    assert registry.current_flash_attention_impl() == "fastgpt"
    assert dispatched() == once != before
    registry.restore_flash_attention_impl()
    assert dispatched() == before


def test_another_implementation_takes_its_place():
    """PyTorch's registry puts the old one back before it asks the new one."""

    class Other:
        seen = None

        def remove(self):
            pass

    def register():
        Other.seen = dispatched()
        return Other()

    before = dispatched()
    registry.register_flash_attention_impl("other", register_fn=register)
    try:
        registry.activate_flash_attention_impl("fastgpt")
        registry.activate_flash_attention_impl("other")
        assert Other.seen == before
        registry.activate_flash_attention_impl("fastgpt")
        assert OURS in torch._C._dispatch_dump(OPERATORS[0])
        registry.restore_flash_attention_impl()
    finally:
        registry._registry._FLASH_ATTENTION_IMPLS.pop("other")


def test_restored_results_are_pytorchs_bits():
    q, k, v = (leaf(2, 3, 37, 16) for _ in range(3))
    expected = flash(is_causal=True)(q, k, v)
    with active():
        flash(is_causal=True)(q, k, v)
    assert torch.equal(flash(is_causal=True)(q, k, v), expected)


operator = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
operator_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default


@pytest.mark.parametrize("layout", ["contiguous", "rows first"])
def test_shapes_dtypes_and_strides_are_those_of_pytorch(backend, layout):
    shape = (2, 3, 5, 8) if layout == "contiguous" else (2, 5, 3, 8)
    q, k, v = (torch.randn(shape).bfloat16() for _ in range(3))
    if layout == "rows first":
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))

    def described():
        out, lse = operator(q, k, v, 0.0, True)
        gradients = operator_backward(torch.ones_like(out), q, k, v, out, lse, 0.0, True)
        return [(t.shape, t.dtype, t.stride()) for t in (out, lse, *gradients)]

    expected = described()
    with active():
        assert described() == expected


@pytest.mark.parametrize(
    ("shapes", "options", "reason"),
    [
        ([(1, 2, 5, 300)] * 3, {}, "head_dim is 300"),
        ([(1, 2, 5, 8)] * 3, {"is_causal": True, "attn_mask": torch.zeros(5, 5)}, "both given"),
    ],
    ids=["wide heads", "mask and causal"],
)  # fmt: skip
def test_what_is_not_covered_is_pytorchs(shapes, options, reason):
    tensors = [torch.randn(shape) for shape in shapes]
    expected = operator(*tensors, **options)
    with active():
        explained = fastgpt.explain(operator, *tensors, **options)
        assert explained.backend == "pytorch"
        assert reason in explained.reasons["cpp"]
        found = operator(*tensors, **options)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_gradients_of_what_is_not_covered_are_pytorchs():
    q, k, v = inputs = [leaf(1, 2, 5, 300) for _ in range(3)]
    expected = torch.autograd.grad(flash()(q, k, v).sum(), inputs)
    with active():
        found = torch.autograd.grad(flash()(q, k, v).sum(), inputs)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def test_dropout_is_pytorchs():
    """It takes another way than flash attention on a CPU, and draws the same masks as before."""
    q, k, v = (torch.randn(1, 2, 5, 8) for _ in range(3))
    torch.manual_seed(3)
    expected = T.scaled_dot_product_attention(q, k, v, dropout_p=0.5)
    with active():
        torch.manual_seed(3)
        assert torch.equal(T.scaled_dot_product_attention(q, k, v, dropout_p=0.5), expected)


@pytest.mark.parametrize(
    ("shapes", "options"),
    [
        ([(1, 2, 5, 8), (1, 2, 5, 4), (1, 2, 5, 8)], {}),
        ([(1, 2, 5, 8), (2, 2, 5, 8), (2, 2, 5, 8)], {}),
        ([(5, 8)] * 3, {}),
        ([(1, 2, 5, 8)] * 3, {"dropout_p": 0.5}),
        ([(1, 2, 5, 8)] * 3, {"attn_mask": torch.zeros(2, 5, 5)}),
        ([(1, 2, 5, 8)] * 3, {"attn_mask": torch.zeros(5, 5, dtype=torch.float64)}),
    ],
    ids=["sizes", "batches", "dimensions", "dropout", "mask shape", "mask dtype"],
)
def test_bad_input_has_pytorchs_error(shapes, options):
    """Or PyTorch's result, where it has one."""

    def outcome():
        try:
            return None, operator(*tensors, **options)
        except Exception as error:
            return (type(error), str(error)), ()

    tensors = [torch.randn(shape) for shape in shapes]
    expected, results = outcome()
    with active():
        found, ours = outcome()
    assert found == expected
    assert len(ours) == len(results)


def test_bad_input_of_sdpa_has_pytorchs_error():
    q, k = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8, dtype=torch.float16)
    with active(), pytest.raises(RuntimeError, match="same dtype"):
        T.scaled_dot_product_attention(q, k, k)


def test_backend_asked_for_by_name_says_why_it_cannot():
    x = torch.randn(1, 2, 5, 300)
    with active(), fastgpt.use_backend("cpp"), pytest.raises(RuntimeError, match="head_dim is 300"):
        T.scaled_dot_product_attention(x, x, x)


def test_deterministic_bits():
    q, k, v = inputs = [leaf(1, 2, 33, 8) for _ in range(3)]
    torch.use_deterministic_algorithms(True)
    with active():
        runs = [torch.autograd.grad(flash(is_causal=True)(q, k, v).sum(), inputs) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("engine", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("view", [False, True])
def test_it_compiles_and_the_compiled_code_calls_ours(engine, view):
    """Inductor checks the strides that the operators promise."""
    shape = (2, 9, 3, 8) if view else (2, 3, 9, 8)
    leaves = [leaf(*shape) for _ in range(3)]

    def function(q, k, v):
        if view:
            q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        out = T.scaled_dot_product_attention(2 * q, k, v, is_causal=True)
        return (out.transpose(1, 2) if view else out).sin().sum()

    expected = torch.autograd.grad(function(*leaves), leaves)
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend=engine)
    found = []
    with active():
        ran = kernels_run(lambda: found.extend(torch.autograd.grad(compiled(*leaves), leaves)))
    torch.testing.assert_close(tuple(found), expected)
    if fastgpt.available_backends("attention")["cpp"]:
        assert ran == {"fastgpt::attention_fwd_cpp", "fastgpt::attention_bwd_cpp"}
    found = torch.autograd.grad(compiled(*leaves), leaves)  # the same code after restoring
    torch.testing.assert_close(found, expected)
