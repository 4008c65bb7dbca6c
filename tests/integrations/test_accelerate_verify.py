"""`accelerate(model).verify(batch)`: the calls of one step, and nothing changed by it."""

import pytest
import torch
from torch import nn

import fastgpt
from tests.integrations.test_accelerate_recognized import build
from tests.support.client_models import batch, loss_and_gradients


def counted(verification):
    return {calls.name: calls.count for calls in verification.ours}


def test_a_step_of_llama_is_counted_call_by_call():
    model, inputs = build("Llama"), batch("Llama")
    layers = model.config.num_hidden_layers
    found = fastgpt.accelerate(model).verify(inputs)
    assert counted(found) == {
        **{f"{op}_{way}": layers for op in ("attention", "rope", "swiglu") for way in ("fwd", "bwd")},
        **{f"rms_norm_{way}": 2 * layers + 1 for way in ("fwd", "bwd")},
        "linear_cross_entropy_fwd": 1,  # which makes the gradients, too
    }
    assert {calls.backend for calls in found.ours} == {"cpp"}
    assert found.uncalled == ()
    assert "aten::mm" in {calls.name for calls in found.pytorch}
    assert sum(calls.share for calls in (*found.ours, *found.pytorch)) == pytest.approx(1.0)


def test_what_was_replaced_and_not_called_is_named():
    model, inputs = build("Llama").eval(), batch("Llama")
    report = fastgpt.accelerate(model)
    found = report.verify({"input_ids": inputs["input_ids"]})
    assert found.uncalled == ("linear_cross_entropy",)
    assert "replaced, but not called in this step: linear_cross_entropy" in str(found)
    with torch.no_grad():
        assert all(
            name.endswith("_fwd") for name in counted(report.verify({"input_ids": inputs["input_ids"]}))
        )


def test_packed_documents_count_as_attention():
    model, inputs = build("Llama"), batch("Llama")
    inputs = {name: value[:1] for name, value in inputs.items()}
    inputs["position_ids"] = (torch.arange(inputs["input_ids"].shape[1]) % 7)[None]
    found = fastgpt.accelerate(model).verify(inputs)
    assert "attention_varlen_fwd" in counted(found) and found.uncalled == ()


def test_a_backend_that_was_chosen_is_the_one_named():
    model = nn.Sequential(nn.LayerNorm(8), nn.GELU())
    report = fastgpt.accelerate(model)
    with fastgpt.use_backend("reference"):
        found = report.verify(torch.randn(3, 8))
    assert {(calls.name, calls.backend) for calls in found.ours} == {
        (f"{op}_{way}", "reference") for op in ("add_layer_norm", "gelu") for way in ("fwd", "bwd")
    }


class Noisy(nn.Module):
    """A model with a buffer that counts calls, random numbers, and any arguments."""

    def __init__(self):
        super().__init__()
        self.linear, self.gelu = nn.Linear(4, 4), nn.GELU()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, *inputs, fail=False):
        self.calls += 1
        if fail:
            raise KeyError("no such thing")
        hidden = torch.nn.functional.dropout(self.gelu(self.linear(inputs[0])), 0.5)
        return {"hidden": hidden, "others": [len(inputs), hidden.detach().argmax()]}


@pytest.mark.parametrize("given", [torch.ones(2, 4), (torch.ones(2, 4), 1), [torch.ones(2, 4)]], ids=type)
def test_a_step_leaves_no_trace(given):
    model = Noisy()
    report = fastgpt.accelerate(model)
    model.linear.weight.grad = gradient = torch.full((4, 4), 2.0)
    state = torch.random.get_rng_state()
    assert counted(report.verify(given)) == {"gelu_fwd": 1, "gelu_bwd": 1}
    with pytest.raises(KeyError, match="no such thing"):
        report.verify({"fail": True})
    assert model.linear.weight.grad is gradient and gradient.eq(2).all() and model.linear.bias.grad is None
    assert model.calls == 0 and torch.equal(torch.random.get_rng_state(), state) and model.training


def test_training_goes_on_as_without_it():
    model, inputs = build("Llama"), batch("Llama")
    report = fastgpt.accelerate(model)
    before = loss_and_gradients(model, inputs)
    report.verify(inputs)
    after = loss_and_gradients(model, inputs)
    assert torch.equal(before[0], after[0])
    assert all(torch.equal(before[1][name], after[1][name]) for name in before[1])
