"""Linear + GELU in the epilogue of cuBLASLt's product, which on the CPU is that of simt/cublasLt.h.

What its kernels take (GELU by tanh, 16 bits, rows at multiples of 16 bytes) launches none of ours in the forward; the
rest is a product and a pass.
"""

import pytest
import torch

from fastgpt import ops
from fastgpt.testing import check_error_rule
from tests.ops.test_linear_gelu import inputs, ours_and_pytorch
from tests.simt import emulator
from tests.support.contract import check_opcheck, registered
from tests.support.cuda_kernels import launches

pytestmark = pytest.mark.usefixtures("cuda")
SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def passes(arguments, approximate="tanh"):
    """Of ours over the activation; of a forward without gradients and one with."""

    def call():
        ops.linear_gelu(*arguments, approximate=approximate)

    with torch.no_grad():
        without = launches(call)
    return without, launches(call)


@pytest.mark.parametrize("dtype", SIXTEEN_BITS)
@pytest.mark.parametrize("bias", [False, True])
def test_activation_in_the_epilogue_obeys_the_error_rule(dtype, bias):
    for batch, size, width in [((), 8, 8), ((9,), 16, 40), ((2, 33), 72, 24)]:
        arguments = inputs(batch, size, width, dtype, bias, scale=2.0)
        assert passes(arguments) == (0, 0)
        check_error_rule(*ours_and_pytorch("tanh"), arguments)


def test_the_weight_may_lie_by_columns():
    x, weight, bias = inputs((6,), 16, 24, torch.bfloat16)
    turned = weight.detach().T.contiguous().T.requires_grad_()
    assert turned.stride() == (1, 24)
    assert passes((x, turned, bias)) == (0, 0)
    check_error_rule(*ours_and_pytorch("tanh"), [x, turned, bias])


def test_rows_may_lie_apart():
    x, weight, bias = inputs((6,), 16, 24, torch.bfloat16)
    wide = [torch.nn.functional.pad(t.detach(), (0, 8))[:, :16].requires_grad_() for t in (x, weight)]
    assert wide[0].stride() == (24, 1)
    assert passes([*wide, bias.detach().contiguous()]) == (0, 0)
    check_error_rule(*ours_and_pytorch("tanh"), [*wide, bias])


def test_what_cublaslt_does_not_take_goes_by_a_pass():
    def of(size=16, width=24, dtype=torch.bfloat16):
        return inputs((6,), size, width, dtype)

    x, weight, bias = of()
    shifted = torch.cat([x.detach().flatten(), x.detach()[0]])[1:97].view(6, 16)
    apart = torch.nn.functional.pad(x.detach(), (0, 4))[:, :16]
    assert passes((x, weight, bias)) == (0, 0)
    assert passes((x, weight, bias), "none") == (1, 1)
    for arguments in (
        of(dtype=torch.float32),
        of(size=12),
        of(width=20),
        (shifted, weight, bias),
        (apart, weight, bias),
        (x, torch.nn.functional.pad(weight.detach().T, (0, 4)).T[:24], bias),
        (x, weight, bias.detach().repeat_interleave(2)[::2]),
        (x, weight, torch.cat([bias.detach()] * 2)[1:25]),
    ):
        assert passes(arguments) == (1, 1)
        check_error_rule(*ours_and_pytorch("tanh"), [t.detach().requires_grad_() for t in arguments])


@pytest.mark.emulated
def test_without_a_kernel_for_the_shape_it_goes_by_a_pass():
    arguments = inputs((5,), 32, 56, torch.bfloat16)  # of its own: what was found once is kept
    emulator.library().simt_set_has_products(False)
    try:
        assert passes(arguments) == (1, 1)
    finally:
        emulator.library().simt_set_has_products(True)
    check_error_rule(*ours_and_pytorch("tanh"), arguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_opcheck(dtype):
    x, weight, bias = (t.detach() for t in inputs((5,), 16, 8, dtype))
    bias = bias.contiguous()
    check_opcheck(
        registered("linear_gelu_fwd", "cuda"),
        *((x, weight, bias, True, True), (x, weight, None, True, False)),
        *((x, weight, bias, False, False), (x[:0], weight, None, True, True)),
    )
