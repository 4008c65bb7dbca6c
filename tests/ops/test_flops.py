"""Floating-point operations, as PyTorch's FlopCounterMode counts them."""

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import fastgpt
from fastgpt import ops
from fastgpt.backends import BACKENDS, OPS
from fastgpt.ops._flops import FORMULAS
from tests.support import every_op

WITHOUT_PRODUCTS = (
    *("gelu", "bias_gelu", "geglu", "swiglu", "relu_squared"),
    *("add_layer_norm", "add_rms_norm", "rms_norm", "rope", "cross_entropy"),
)


def flops(function, *inputs):
    """Of a forward and its backward, and of the forward alone."""
    from torch.utils.flop_counter import FlopCounterMode  # imports Triton, which conftest.py chooses first

    with FlopCounterMode(display=False) as forward:
        found = function(*inputs)
        results = found if isinstance(found, tuple) else (found,)
    with FlopCounterMode(display=False) as backward:
        torch.autograd.backward(results, [torch.ones_like(r) for r in results])
    return forward.get_total_flops(), backward.get_total_flops()


@pytest.mark.parametrize("name", every_op.NAMES)
def test_op_counts_as_pytorchs_products_do(backend, name):
    ours, theirs, inputs = every_op.case(name, torch.float32, rows=6, size=8)
    counted = sum(flops(ours, *inputs))
    with sdpa_kernel(SDPBackend.MATH):
        expected = sum(flops(theirs, *inputs))
    if name.startswith("attention"):
        expected = expected // 6 * 7  # which computes the scores again in the backward
    elif name.endswith("row by row"):
        expected = expected // 3 * 4  # so does this with the logits
    assert counted == expected
    assert (counted > 0) == (name not in WITHOUT_PRODUCTS)


def test_attention_counts_as_pytorchs_flash_attention_does():
    from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

    shapes = (2, 4, 5, 8), (2, 2, 7, 8), (2, 2, 7, 12)
    q, k, v = (torch.randn(shape, requires_grad=True) for shape in shapes)
    for causal in ("none", "lower_right"):  # which makes no difference there
        counted = flops(lambda *qkv, c=causal: ops.attention(*qkv, causal=c), q, k, v)
        assert counted == (sdpa_flop_count(*shapes), sdpa_backward_flop_count((2, 4, 5, 12), *shapes))


def test_documents_count_by_themselves():
    bounds_q, bounds_k = torch.tensor([0, 2, 2, 7]), torch.tensor([0, 3, 4, 9])
    q, k, v = (torch.randn(n, 2, 8, requires_grad=True) for n in (7, 9, 9))
    pairs = 2 * 3 + 0 * 1 + 5 * 5
    counted = flops(lambda *qkv: ops.attention_varlen(*qkv, bounds_q, bounds_k, 5, 5), q, k, v)
    assert counted == (2 * 2 * pairs * 16, 2 * 2 * pairs * 40)


def test_gradients_that_nobody_needs_do_not_count():
    x, weight = torch.randn(3, 4), torch.randn(5, 4, requires_grad=True)
    assert flops(ops.linear, x, weight) == (120, 120)
    assert flops(ops.linear, x.requires_grad_(), weight) == (120, 240)


def test_every_registered_op_has_a_count():
    import torch.utils.flop_counter as counter

    for op in OPS:
        for direction in ("fwd", "bwd"):
            for backend in BACKENDS:
                packet = getattr(torch.ops.fastgpt, f"{op}_{direction}_{backend}", None)
                assert packet is None or packet in counter.flop_registry
    assert all(hasattr(torch.ops.fastgpt, f"{name}_cpp") for name in FORMULAS)


def test_counter_is_not_imported_and_may_come_first():
    """It imports Triton, before whose import tests, and users, choose its interpreter."""
    lines = (
        "import sys, fastgpt; assert 'torch.utils.flop_counter' not in sys.modules and 'triton' not in sys.modules",
        "import torch.utils.flop_counter, fastgpt",
    )
    count = (
        "import torch; from torch.utils.flop_counter import FlopCounterMode as M; m = M(display=False); m.__enter__(); "
        "fastgpt.ops.linear(torch.ones(2, 3), torch.ones(5, 3)); assert m.get_total_flops() == 60"
    )
    for line in lines:
        subprocess.run([sys.executable, "-c", f"{line}; {count}"], check=True)


def test_accelerated_model_counts_as_before():
    layer = torch.nn.TransformerEncoderLayer(8, 2, 16, 0.0, "gelu", batch_first=True)
    x = torch.randn(2, 5, 8, requires_grad=True)
    with sdpa_kernel(SDPBackend.MATH):
        before = sum(flops(layer, x))
    fastgpt.accelerate(layer)
    scores_again = 2 * (2 * 2 * 5 * 5 * 4)
    assert sum(flops(layer, x)) == before + scores_again
