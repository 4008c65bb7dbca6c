"""MLP of the model: one op, and modules or hooks on its layers still run."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.utils.prune
from torch import Tensor

from fastgpt import explain
from fastgpt.gpt_config import ACTIVATIONS
from tests.model.test_model import tiny


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_mlp_is_one_op_without_gate_or_relu(activation: str):
    mlp = tiny(activation=activation).h[0].mlp
    decisions = explain(mlp, torch.randn(2, 3, 32)).decisions
    between = {
        "relu": [],
        "relu2": ["relu_squared"],
        "swiglu": ["linear", "swiglu"],
        "geglu": ["linear", "geglu"],
    }
    expected = ["linear", *between[activation], "linear"] if activation in between else ["mlp"]
    assert [d.op for d in decisions] == expected


class Adapter(torch.nn.Module):
    """Layer with a weight, like nn.Linear, that computes more."""

    def __init__(self, base: torch.nn.Linear, seen: list[Tensor]) -> None:
        super().__init__()
        self.base, self.weight, self.bias, self.seen = base, base.weight, base.bias, seen

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append(x)
        return self.base(x)


@pytest.mark.parametrize("layer", ["c_fc", "c_proj"])
@pytest.mark.parametrize(
    "how", ["adapter", "forward", "pre_hook", "hook", "backward_pre_hook", "backward_hook"]
)
def test_what_is_put_on_a_layer_of_the_mlp_is_called(how: str, layer: str):
    mlp, x, seen = tiny().h[0].mlp, torch.randn(2, 3, 32, requires_grad=True), []
    plain, expected = getattr(mlp, layer), mlp(x)
    if how == "adapter":
        setattr(mlp, layer, Adapter(plain, seen))
    elif how == "forward":
        plain.forward = Adapter(copy.deepcopy(plain), seen).forward
    else:
        register = {
            "pre_hook": plain.register_forward_pre_hook,
            "hook": plain.register_forward_hook,
            "backward_pre_hook": plain.register_full_backward_pre_hook,
            "backward_hook": plain.register_full_backward_hook,
        }[how]
        register(lambda *given: seen.append(given))
    got = mlp(x)
    torch.testing.assert_close(got, expected)
    got.sum().backward()
    assert len(seen) == 1


@pytest.mark.parametrize("layer", ["c_fc", "c_proj"])
def test_a_layer_of_the_mlp_may_be_pruned(layer: str):
    """A hook recomputes the weight before each call."""
    model = tiny()
    pruned = getattr(model.h[0].mlp, layer)
    torch.nn.utils.prune.random_unstructured(pruned, "weight", 0.5)
    optimizer, idx = (
        torch.optim.SGD(model.parameters(), lr=0.1),
        torch.randint(model.config.vocab_size, (2, 8)),
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(idx, idx)[1].backward()
        optimizer.step()
    assert (pruned.weight == 0).float().mean() == pytest.approx(0.5)
