"""Accelerated models under hooks and threads, in calls within calls, and with odd dtypes: all stays the same."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

import fastgpt
from tests.support.client_models import assert_same, batch, build, loss_and_gradients


def _around(module):
    """Another forward, put on the module itself."""
    inner = module.forward
    module.forward = lambda *args: 0.5 * inner(*args)


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "BertForMaskedLM", "ElectraForPreTraining"])
@pytest.mark.parametrize("which", ["layer", "activation", "head"])
@pytest.mark.parametrize(
    "watch",
    [
        lambda module: module.register_forward_hook(lambda m, args, out: 0.5 * out),
        lambda module: module.register_full_backward_hook(lambda m, grads, _: tuple(0.5 * g for g in grads)),
        lambda module: module.register_full_backward_pre_hook(lambda m, grads: tuple(0.5 * g for g in grads)),
        _around,
    ],
    ids=["forward", "backward", "backward before", "another forward"],
)
def test_what_changes_a_module_by_itself_still_does(name, which, watch):
    model, inputs = build(name), batch(name)
    inner = getattr(model, model.base_model_prefix)
    block = inner.h[1].mlp if which != "head" and name.startswith("GPT2") else None
    if which == "head":
        module = (
            model.get_output_embeddings()
            if name != "ElectraForPreTraining"
            else model.discriminator_predictions
        )
    elif block is not None:
        module = block.c_fc if which == "layer" else block.act
    else:
        between = inner.encoder.layer[1].intermediate
        module = between.dense if which == "layer" else between.intermediate_act_fn
    plain = copy.deepcopy(model), copy.deepcopy(model)
    path = next(path for path, found in model.named_modules() if found is module)
    before = []
    for twin in plain:
        watched = twin.get_submodule(path)
        if twin is plain[0]:
            watch(watched)
        before.append(loss_and_gradients(twin, inputs))
    assert any(not torch.allclose(before[0][1][key], before[1][1][key]) for key in before[0][1])
    fastgpt.accelerate(model)
    watch(module)
    assert_same(before[0], loss_and_gradients(model, inputs))


def test_threads_and_calls_within_calls_get_their_own_loss():
    model = build("GPT2LMHeadModel")
    inputs = [batch("GPT2LMHeadModel") for _ in range(2)]
    expected = [float(model(**given).loss.detach()) for given in inputs]
    fastgpt.accelerate(model)

    def losses(given):
        return [float(model(**given).loss.detach()) for _ in range(40)]

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(losses, inputs))
    for one, right in zip(found, expected, strict=True):
        assert one == pytest.approx([right] * 40, rel=1e-5)

    nested = []

    def call_again(module, args, output):
        if not nested:
            nested.append(None)
            nested[0] = float(model(**inputs[1]).loss.detach())

    model.transformer.register_forward_hook(call_again)
    assert float(model(**inputs[0]).loss.detach()) == pytest.approx(expected[0], rel=1e-5)
    assert nested == pytest.approx([expected[1]], rel=1e-5)


def test_head_called_before_the_model_does_is_an_error():
    model = build("GPT2LMHeadModel")
    fastgpt.accelerate(model)
    model.transformer.register_forward_hook(
        lambda m, args, out: model.lm_head(out.last_hidden_state) and None
    )
    with pytest.raises(RuntimeError, match="cross_entropy=False"):
        model(**batch("GPT2LMHeadModel"))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", ["BertForMaskedLM", "GPT2LMHeadModel"])
def test_labels_and_losses_of_other_dtypes_are_as_before(name, training):
    inputs = batch(name)
    inputs["labels"] = inputs["labels"].clamp(min=0)
    model = build(name).double().train(training)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    after = loss_and_gradients(model, inputs)
    assert after[0].dtype == before[0].dtype
    assert_same(before, after)
    if name == "BertForMaskedLM":  # PyTorch takes uint8, and the model passes them on
        bytes_ = inputs | {"labels": inputs["labels"].to(torch.uint8)}
        assert_same(before, loss_and_gradients(model, bytes_))


def test_nothing_is_left_on_modules_after_training():
    model = build("GPT2LMHeadModel")
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    fastgpt.accelerate(model)
    loss_and_gradients(model, batch("GPT2LMHeadModel"))
    torch.compile(model, backend="eager")(**batch("GPT2LMHeadModel"))
    fastgpt.restore(model)
    left = {name: set(vars(module)) for name, module in model.named_modules()}
    left[""].discard("_is_torch_compile")  # torch.compile's own, from PyTorch 2.12 on
    assert left == attributes
