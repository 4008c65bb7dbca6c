"""The MLP's backward with GELU's derivative in the epilogue of cuBLASLt's product, as in test_linear_gelu_cuda."""

import pytest
import torch

from fastgpt import ops
from tests.ops.test_mlp import check, inputs
from tests.simt import emulator
from tests.support.contract import check_opcheck, registered
from tests.support.cuda_kernels import launches

pytestmark = pytest.mark.usefixtures("cuda")
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def passes(arguments, approximate="tanh", grad=None):
    """Of ours over activations and their gradients: in the forward, in the backward."""
    forward = launches(lambda: ops.mlp(*arguments, approximate))
    out = ops.mlp(*arguments, approximate)
    grad = torch.randn(out.shape, dtype=out.dtype) if grad is None else grad
    return forward, launches(lambda: out.backward(grad, retain_graph=True))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("biases", [(False, True), (True, False)])
def test_derivative_in_the_epilogue_obeys_the_error_rule(dtype, biases):
    for batch, size, width, channels in [((), 8, 8, 8), ((9,), 16, 40, 24), ((2, 33), 24, 72, 16)]:
        arguments = inputs(batch, size, width, channels, dtype, biases, scale=2.0)
        assert passes(arguments) == (0, 0)
        check(arguments, "tanh")


def test_weights_may_lie_by_columns():
    """As those of transformers' GPT-2 do, and with their rows apart."""
    x, weight1, bias1, weight2, bias2 = inputs((6,), 16, 24, 32, torch.bfloat16)
    turned = [w.detach().T.contiguous().T.requires_grad_() for w in (weight1, weight2)]
    apart = [torch.nn.functional.pad(t.detach(), (0, 8))[:, :-8].requires_grad_() for t in (weight1, weight2)]
    for first, second in (turned, apart, (apart[0], turned[1])):
        arguments = [x, first, bias1, second, bias2]
        assert passes(arguments) == (0, 0)
        check(arguments, "tanh")


def test_what_cublaslt_does_not_take_goes_by_a_pass():
    def of(size=16, width=24, channels=32, dtype=torch.bfloat16):
        return inputs((6,), size, width, channels, dtype)

    assert passes(of()) == (0, 0)
    assert passes(of(), "none") == (1, 1)
    assert passes(of(channels=20)) == (0, 1)
    assert passes(of(size=12)) == (1, 0)
    assert passes(of(width=20)) == passes(of(dtype=torch.float32)) == (1, 1)
    wide = torch.randn(6, 36).bfloat16()
    assert passes(of(), grad=wide[:, :32]) == passes(of(), grad=wide[:, 0:1].expand(6, 32)) == (0, 1)
    assert passes(of(), grad=torch.randn(6 * 32 + 1).bfloat16()[1:].view(6, 32)) == (0, 1)
    for arguments in (of(channels=20), of(size=12), of(width=20)):
        check(arguments, "tanh")


def test_pointers_less_aligned_than_before():
    """A kernel that was chosen for one alignment is not taken for another."""

    def at(offset, *shape):
        room = torch.zeros(shape[0] * (shape[1] if len(shape) > 1 else 1) + 256, dtype=torch.bfloat16)
        begin = -room.data_ptr() // 2 % 128 + offset
        return room[begin : begin + torch.Size(shape).numel()].view(shape).normal_().requires_grad_()

    for offset in (0, 8, 32, 0):
        for wide in (0, 8):
            arguments = [
                at(offset, 6, 16), at(wide, 24, 16), at(offset, 24), at(wide, 32, 24), at(offset, 32)
            ]  # fmt: skip
            assert passes(arguments, grad=at(offset, 6, 32).detach()) == (0, 0)
            check(arguments, "tanh")


@pytest.mark.emulated
def test_without_a_kernel_for_the_shape_it_goes_by_a_pass():
    arguments = inputs((5,), 32, 56, 40, torch.bfloat16)  # of its own: what was found once is kept
    emulator.library().simt_set_has_products(False)
    try:
        assert passes(arguments) == (1, 1)
    finally:
        emulator.library().simt_set_has_products(True)
    check(arguments, "tanh")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype):
    grad, z, weight = (torch.randn(shape).to(dtype) for shape in ((5, 8), (5, 16), (8, 16)))
    op = registered("mlp_bwd", "cuda")
    for tanh in (False, True):
        check_opcheck(op, (grad, z, weight, tanh, True), (grad, z, weight, tanh, False))
    check_opcheck(op, (grad[:0], z[:0], weight, True, True))
