"""Every language model of transformers, by its registry: accelerated, it computes the same.

A class that a new version of transformers brings, or breaks, is one test with its name.
"""

import pytest
import torch

import fastgpt
from tests.support import zoo
from tests.support.client_models import assert_same, loss_and_gradients


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_accelerated_it_computes_the_same(name):
    """Loss and gradients without and with padding on either side, greedy generation, state dict; and back again."""
    if name in zoo.UNBUILT:
        pytest.skip("no small model of it is made by rule")
    model = zoo.build(name)
    batches = {padding: zoo.batch(padding) for padding in (None, "left", "right")}
    before = {padding: step(model, inputs) for padding, inputs in batches.items()}
    keys, parameters = (
        list(model.state_dict()),
        {key: p.detach().clone() for key, p in model.named_parameters()},
    )
    written = generated(model, batches["left"])
    report = fastgpt.accelerate(model)
    assert report.replaced, "nothing of it is replaced"
    for padding, inputs in batches.items():
        assert_same(before[padding], step(model, inputs))
    assert generated(model, batches["left"]) == written
    assert list(model.state_dict()) == keys
    assert all(torch.equal(parameter, parameters[key]) for key, parameter in model.named_parameters())
    assert report.verify(batches[None]).ours, "no op of fastgpt ran"
    fastgpt.restore(model)
    assert_same(before["right"], step(model, batches["right"]), rtol=1e-6)


def step(model, inputs):
    """The loss and gradients, with the same random numbers for the noise of a router."""
    torch.manual_seed(0)
    return loss_and_gradients(model, inputs)


def generated(model, inputs):
    """The tokens that a model writes by greedy choice; None if it writes none."""
    if not model.can_generate():
        return None
    model.eval()
    prompt = {name: inputs[name][:, :8] for name in ("input_ids", "attention_mask")}
    found = model.generate(**prompt, max_new_tokens=4, do_sample=False)
    model.train()
    return found.tolist()
