"""Gradients that are differentiated again, of every op, where one argument is made of another, as tied weights are."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from tests.support import every_op


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("name", every_op.NAMES)
@sdpa_kernel(SDPBackend.MATH)
def test_arguments_made_of_each_other(name, order):
    ours, theirs, leaves = every_op.case(name, torch.float64, rows=5, size=9)
    directions = [torch.randn_like(leaf) for leaf in leaves]
    found = []
    for function in (ours, theirs):
        first, *others = leaves[::order]
        # Each is made of the one before it, so that a gradient may reach it in two ways.
        arguments = [first]
        for other in others:
            arguments.append(other + arguments[-1].mean() + 0.1 * first.sin().sum())
        results = function(*arguments[::order])
        total = sum((r * r).sum() for r in (results if isinstance(results, tuple) else (results,)))
        grads = torch.autograd.grad(total, leaves, create_graph=True)
        again = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
        found.append((*grads, *torch.autograd.grad(again, leaves)))
    for mine, pytorchs in zip(*found, strict=True):
        torch.testing.assert_close(
            mine, pytorchs, rtol=1e-9, atol=1e-9 * float(pytorchs.detach().abs().max())
        )
