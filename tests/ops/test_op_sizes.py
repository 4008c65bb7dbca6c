"""Every registered op refuses a tensor that does not fit the others, or gives the right result.

`torch.ops.fastgpt.X_fwd_b` can be called without `fastgpt.ops` and its checks. Valid arguments are recorded while the
public functions run; then one tensor at a time is made wrong, in ways that need no knowledge of the op. Each tensor
lies within a larger buffer: what surrounds it must not be written, and the result must not depend on it.
"""

import functools
import re

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastgpt import ops, use_backend
from tests.support import every_op
from tests.support.contract import GPU_BACKENDS

NAMES = sorted(
    name.removeprefix("fastgpt::").removesuffix("_reference")
    for name in torch._C._dispatch_get_all_op_names()
    if name.startswith("fastgpt::") and name.endswith("_reference")
)
ANY_RANK = {"alibi_slopes"}  # (H,) or (B, H)
BROADCAST = {"attn_mask"}  # each size may be 1
# Elements on each side of a tensor, and what they hold by kind of dtype: numbers that are valid wherever they are read.
PADDING = 1024
POISONS = [{"f": 3.0, "i": 1, "b": True}, {"f": -5.0, "i": 3, "b": False}]
SURROUNDINGS = [(POISONS[0], PADDING), (POISONS[1], PADDING), (POISONS[0], 0)]  # 0: for AddressSanitizer
OTHER_DTYPES = {
    torch.float32: (torch.float64, torch.bfloat16, torch.int64),
    torch.bfloat16: (torch.float32, torch.float64, torch.int64),
    torch.float64: (torch.float32, torch.int64),
    torch.int64: (torch.int32, torch.float32),
    torch.bool: (torch.uint8, torch.float32, torch.int64),
}


# ---- valid calls ----


def _calls(dtype, rows):
    """Runs ops so that each registered one is called, with every optional tensor. What differs has different sizes."""
    for name in every_op.NAMES:
        if not name.startswith("attention"):
            ours, _, inputs = every_op.case(name, dtype, rows, size=7)
            _run(ours, *inputs)

    def leaf(*shape):
        return torch.randn(shape).to(dtype).requires_grad_()

    target, weight = torch.arange(rows) % 11, torch.rand(11)
    for inplace in (False, True):
        losses = functools.partial(
            ops.cross_entropy, weight=weight, return_lse=True, inplace_backward=inplace
        )
        _run(lambda x, f=losses: f(x * 1.0, target, label_smoothing=0.1), leaf(rows, 11))
    torch.ops.fastgpt.cross_entropy_with_grad_inplace_reference(
        leaf(rows, 11).detach(), target, weight, -100, 0.1, 0.0, 0.0, 1.0, 0
    )
    for reduction in ("mean", "none"):
        loss = functools.partial(ops.linear_cross_entropy, class_weight=weight, reduction=reduction)
        _run(lambda h, w, b, f=loss: f(h, w, target, bias=b), leaf(rows, 7), leaf(11, 7), leaf(11))

    dropout = {"dropout_p": 0.25, "seed": 3, "return_lse": True}
    masks = (torch.randn(3, 4, rows, 6).to(dtype), torch.rand(3, 4, rows, 6) < 0.7)
    for extras in ({}, *({"attn_mask": m, "alibi_slopes": torch.rand(3, 4), **dropout} for m in masks)):
        of_batch = (leaf(3, 4, rows, 8), leaf(3, 2, 6, 8), leaf(3, 2, 6, 9))
        _run(functools.partial(ops.attention, **extras), *of_batch)
    bounds = {"cu_seqlens_q": torch.tensor([0, 2, rows]), "cu_seqlens_k": torch.tensor([0, 4, 10])}
    bounds |= {"max_seqlen_q": rows, "max_seqlen_k": 6}
    for extras in ({}, {"alibi_slopes": torch.rand(2, 4), **dropout}):
        packed = (leaf(rows, 4, 8), leaf(11, 2, 8), leaf(11, 2, 9))
        _run(functools.partial(ops.attention_varlen, **bounds, **extras), *packed)


def _run(function, *inputs):
    found = function(*inputs)
    results = [found] if isinstance(found, torch.Tensor) else list(found)
    torch.autograd.backward(results, [torch.randn_like(x) for x in results])


class _Recording(TorchDispatchMode):
    """The arguments of each registered op that is called, by its name without the backend."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, op, types, arguments=(), keywords=None):
        if op.namespace == "fastgpt":
            name = op._opname.removesuffix("_reference")
            copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in arguments]
            given = tuple(_kind(a) for a in copies)
            self.calls.setdefault(name, {}).setdefault(given, copies)
        return op(*arguments, **(keywords or {}))


def _kind(argument):
    """Key of a call that is worth trying: which tensors are given, with which dtypes."""
    return argument.dtype if isinstance(argument, torch.Tensor) else None


@functools.cache
def recorded(dtype, rows):
    torch.manual_seed(0)
    with use_backend("reference"), _Recording() as recording:
        _calls(dtype, rows)
    return {name: list(calls.values()) for name, calls in recording.calls.items()}


# ---- wrong tensors ----


def sizes_that_differ(t):
    """(what is wrong, the dimension or None, the tensor)"""
    for d in range(t.dim()):
        yield f"one shorter in dimension {d}", d, t.narrow(d, 0, t.shape[d] - 1)
        yield f"one longer in dimension {d}", d, torch.cat([t, t.narrow(d, 0, 1)], d)
        yield f"empty in dimension {d}", d, t.narrow(d, 0, 0)
        if t.shape[d] > 2:
            yield f"of size 1 in dimension {d}", d, t.narrow(d, 0, 1)
    yield "of one dimension more", None, t.unsqueeze(0)
    if t.dim():
        yield "of one dimension less", None, t.select(0, 0)


def strides_that_differ(t):
    """(what is wrong, the tensor in a buffer of its own), of the same sizes; the values of the second differ."""
    if t.dim():
        yield "strided", t.repeat_interleave(2, dim=-1)[..., ::2]
        yield "expanded", t.narrow(0, 0, 1).expand_as(t)
    if t.dim() > 1:
        yield "transposed", t.transpose(0, -1).contiguous().transpose(0, -1)


def is_free(arguments, position, d):
    """Whether a size of an argument is no other argument's; 1 and 2 are often constants. None: all but the last."""
    shape = arguments[position].shape
    if d is None:
        return all(is_free(arguments, position, i) for i in range(len(shape) - 1))
    others = [
        n for i, a in enumerate(arguments) if isinstance(a, torch.Tensor) and i != position for n in a.shape
    ]
    return shape[d] > 2 and shape[d] not in others


# ---- calls ----


def surrounded(t, poison, padding):
    """The tensor's values at the same strides within a larger buffer, and that buffer."""
    extent = 1 + sum((n - 1) * s for n, s in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
    kind = "b" if t.dtype == torch.bool else "f" if t.is_floating_point() else "i"
    buffer = torch.full((extent + 2 * padding,), poison[kind], dtype=t.dtype)
    inside = buffer[padding : padding + extent].as_strided(t.shape, t.stride(), padding)
    if 0 in t.stride():
        inside = inside[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())]
        inside.copy_(t[tuple(slice(0, 1) if s == 0 else slice(None) for s in t.stride())])
        return inside.expand(t.shape), buffer
    return inside.copy_(t), buffer


def call(op, arguments, poison, padding):
    """Results and written arguments of a call, which may write nothing else."""
    args, buffers = list(arguments), {}
    for i, a in enumerate(arguments):
        if isinstance(a, torch.Tensor) and a.device.type != "meta":
            args[i], buffers[i] = surrounded(a, poison, padding)
    before = {i: buffer.clone() for i, buffer in buffers.items()}
    results = []
    try:
        found = op(*args)
        results = [] if found is None else [found] if isinstance(found, torch.Tensor) else list(found)
        for i, argument in enumerate(op._schema.arguments):
            if i in buffers and argument.alias_info is not None and argument.alias_info.is_write:
                results.append(args[i].clone())
                args[i].copy_(arguments[i])
    finally:
        for i, buffer in buffers.items():
            assert torch.equal(buffer, before[i]), f"memory of {op._schema.arguments[i].name} was written"
    return results


def outcome(op, arguments):
    """The results, or None where the op refuses; neither may depend on what lies beside the tensors."""
    found = []
    for poison, padding in SURROUNDINGS:
        try:
            found.append(call(op, arguments, poison, padding))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            assert len(str(error).split()) > 2 and "simt:" not in str(error), error
            found.append(None)
        assert (found[-1] is None) == (found[0] is None), (
            "what lies beside a tensor decides whether it is refused"
        )
        for a, b in zip(found[0] or (), found[-1] or (), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
        if len(found) == 2 and (found[0] is None or not op._opname.endswith("_cpp")):
            break
    return found[0]


def check_results(op, found, expected, tolerance):
    """Two lists of results have the same sizes and dtypes, and, with a tolerance, values."""
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        # Attention's statistics are two numbers, whose sum is the same on every backend.
        is_sum = op._opname.startswith(("attention_fwd", "attention_varlen_fwd")) and i == 1
        pair = [a.sum(-1), b.sum(-1)] if is_sum else [a, b]
        if tolerance is not None:
            torch.testing.assert_close(*pair, rtol=tolerance, atol=tolerance, equal_nan=True)


def check_call(op, arguments, position, wrong, *, free, like, with_values):
    """A call with one wrong tensor is refused, as it must be unless `free`, or gives what `like` gives."""
    given = [*arguments[:position], wrong, *arguments[position + 1 :]]
    found = outcome(op, given)
    if found is None:
        return
    assert free, "it is not refused"
    plain = [
        a.clone(memory_format=torch.contiguous_format) if isinstance(a, torch.Tensor) else a for a in given
    ]
    try:
        expected = call(like, plain, POISONS[0], 0)
    except (
        IndexError,
        ValueError,
    ) as error:  # what only the values can tell, the CUDA kernels do not ask for
        assert op._opname.endswith("_cuda") and re.search("out of bounds|must ascend", str(error)), error
        return
    low = any(isinstance(a, torch.Tensor) and a.dtype == torch.bfloat16 for a in given)
    check_results(op, found, expected, (2e-2 if low else 1e-4) if with_values else None)


def check_argument(op, reference, arguments, position):
    """Every way in which one tensor of a valid call can be wrong."""
    tensor, argument = arguments[position], op._schema.arguments[position].name
    # What the forward has saved for the backward belongs to the arguments as they were recorded.
    as_reference = {"like": reference, "with_values": "_bwd_" not in op._opname}
    cases = []
    for what, d, wrong in sizes_that_differ(tensor):
        free = is_free(arguments, position, d) or (d is None and argument in ANY_RANK)
        free = free or (d is not None and argument in BROADCAST and wrong.shape[d] == 1)
        cases.append((what, wrong, {"free": free, **as_reference}))
    cases += [
        (f"of {dtype}", tensor.to(dtype), {"free": True, **as_reference})
        for dtype in OTHER_DTYPES[tensor.dtype]
    ]
    as_itself = {"free": True, "like": op, "with_values": True}
    cases += [(what, wrong, as_itself) for what, wrong in strides_that_differ(tensor)]
    if sum(isinstance(a, torch.Tensor) for a in arguments) > 1:
        cases.append(("on another device", tensor.to("meta"), {"free": False, **as_reference}))
    for what, wrong, expectation in cases:
        try:
            check_call(op, arguments, position, wrong, **expectation)
        except AssertionError as error:
            sizes = [list(a.shape) if isinstance(a, torch.Tensor) else a for a in arguments]
            raise AssertionError(f"{op}, called with {sizes}, but {argument} {what}: {error}") from error


def check_op(backend, name, calls):
    key = "CUDA" if torch.get_default_device().type == "cuda" else "CPU"
    op, reference = (getattr(torch.ops.fastgpt, f"{name}_{b}").default for b in (backend, "reference"))
    if not any(op.has_kernel_for_dispatch_key(k) for k in (key, "CompositeExplicitAutograd")):
        pytest.skip(f"on {backend} {name} is made of other ops")
    for arguments in calls:
        for position, argument in enumerate(arguments):
            if isinstance(argument, torch.Tensor):
                check_argument(op, reference, arguments, position)


# Where kernels are interpreted or emulated, documents are slow here: attention has the same kernels.
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.costly] if "varlen" in n else []) for n in NAMES]
)
def test_wrong_tensors_are_refused_or_served_rightly(backend, name):
    calls = recorded(torch.float32, 5)[name]
    if backend in GPU_BACKENDS:
        calls = [max(calls, key=lambda call: sum(isinstance(a, torch.Tensor) for a in call))]
    if backend == "cpp" and name.startswith(
        "linear_"
    ):  # whose products in bfloat16 have kernels of their own
        calls = [*calls, *recorded(torch.bfloat16, 37)[name]]
    check_op(backend, name, calls)


@pytest.mark.slow
@pytest.mark.only(*GPU_BACKENDS)
@pytest.mark.parametrize("name", NAMES)
def test_wrong_tensors_beside_fewer_others(backend, name):
    check_op(backend, name, recorded(torch.float32, 5)[name])


@pytest.mark.parametrize("name", NAMES)
def test_every_tensor_of_every_op_is_tried(name):
    schema = getattr(torch.ops.fastgpt, f"{name}_reference").default._schema
    calls = recorded(torch.float32, 5).get(name, [])
    for i, argument in enumerate(schema.arguments):
        if "Tensor" in str(argument.type):
            assert any(isinstance(c[i], torch.Tensor) for c in calls), (
                f"no call of {name} has {argument.name}"
            )
