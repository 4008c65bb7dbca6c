"""Accelerated models in what people train with: Trainer, Lightning, Accelerate, DDP, FSDP2, compile, export."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import fastgpt
from tests.support.client_models import VOCAB, assert_same, batch, build, loss_and_gradients

FAMILIES = ["GPT2LMHeadModel", "BertForMaskedLM", "ElectraForMaskedLM", "ElectraForPreTraining"]


def twins(name, **options):
    """A model, and a copy of it that is accelerated."""
    model = build(name, **options)
    twin = copy.deepcopy(model)
    fastgpt.accelerate(twin)
    return model, twin


class Texts(torch.utils.data.Dataset):
    def __init__(self, count):
        self.rows = torch.randint(0, VOCAB, (count, 16), generator=torch.Generator().manual_seed(0))

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        row = self.rows[i]
        return {"input_ids": row, "labels": row.masked_fill(torch.arange(16) < i % 9, -100)}


def trained(model, folder, **options):
    """The losses that transformers' Trainer logs, and the weights it ends with."""
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=4, learning_rate=1e-2, logging_steps=1, save_strategy="no", use_cpu=True,
        report_to=[], disable_tqdm=True, seed=3, data_seed=3, max_grad_norm=0.0, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=Texts(32), eval_dataset=Texts(4))
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return losses, trainer.evaluate()["eval_loss"], model.state_dict()


@pytest.mark.parametrize(
    "options",
    [
        {"per_device_train_batch_size": 8},
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
        pytest.param(
            {"per_device_train_batch_size": 8, "label_smoothing_factor": 0.1}, marks=pytest.mark.slow
        ),
        pytest.param({"per_device_train_batch_size": 8, "bf16": True}, marks=pytest.mark.slow),
        pytest.param(
            {"per_device_train_batch_size": 8, "gradient_checkpointing": True}, marks=pytest.mark.slow
        ),
    ],
    ids=["plain", "accumulated", "smoothed", "bf16", "checkpointed"],
)
def test_trainer_gives_the_same_losses(options, tmp_path):
    pytest.importorskip("accelerate")
    model, twin = twins("GPT2LMHeadModel")
    expected = trained(model, tmp_path, **options)
    found = trained(twin, tmp_path, **options)
    rounding = 2e-2 if "bf16" in options else 1e-4
    assert found[0] == pytest.approx(expected[0], rel=rounding)
    assert found[1] == pytest.approx(expected[1], rel=rounding)


def test_accumulated_gradients_are_those_of_the_big_batch(tmp_path):
    """The targets that count are spread unevenly over the micro-batches: their number is the big batch's."""
    pytest.importorskip("accelerate")
    model = build("GPT2LMHeadModel")
    fastgpt.accelerate(model)
    # By SGD, which leaves gradients as large as they are: Adam makes steps of the rounding errors of nought.
    options = [
        {"per_device_train_batch_size": 8 // n, "gradient_accumulation_steps": n, "optim": "sgd"}
        for n in (1, 4)
    ]
    results = [trained(copy.deepcopy(model), tmp_path, **option) for option in options]
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-4)
    moved = 0.0
    for name, weight in results[0][2].items():
        torch.testing.assert_close(results[1][2][name], weight, rtol=1e-4, atol=1e-5)
        moved = max(moved, float((weight - model.state_dict()[name]).abs().max()))
    assert moved > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_compiled_model_is_one_graph_that_serves_every_length(name):
    model, twin = twins(name)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(twin, fullgraph=True, dynamic=True, backend=counter)
    first = 0
    for length in (24, 19, 11, 6):
        inputs = {key: value[:, :length].clone() for key, value in batch(name).items()}
        after = loss_and_gradients(compiled, inputs)
        names = {key.removeprefix("_orig_mod."): value for key, value in after[1].items()}
        assert_same(loss_and_gradients(model, inputs), (after[0], names))
        first = first or counter.frame_count
    assert 0 < counter.frame_count == first


def test_compiled_causal_attention_builds_no_mask(monkeypatch):
    """Though transformers would, as its older versions do when they are compiled."""
    _, twin = twins("GPT2LMHeadModel")
    built = lambda q_length, kv_length, **_: torch.ones(q_length, kv_length, dtype=torch.bool).tril()  # noqa: E731
    monkeypatch.setattr("fastgpt.integrations.masks.sdpa_mask", built)
    graphs = []

    def keep(graph, _):
        graphs.append(str(graph.graph))
        return graph

    torch._dynamo.reset()
    torch.compile(twin, fullgraph=True, backend=keep)(**batch("GPT2LMHeadModel"))
    assert "tril" not in graphs[0]


def test_exported_model_computes_the_same():
    model, twin = twins("GPT2LMHeadModel")
    tokens = torch.randint(0, VOCAB, (2, 12))
    length = torch.export.Dim("length", min=2, max=32)
    with torch.no_grad():
        program = torch.export.export(
            twin.eval(), (), {"input_ids": tokens, "use_cache": False},
            dynamic_shapes={"input_ids": {1: length}, "use_cache": None},
        )  # fmt: skip
        assert any("fastgpt" in str(node.target) for node in program.graph.nodes)
        for n in (12, 7):
            found = program.module()(input_ids=tokens[:, :n], use_cache=False).logits
            torch.testing.assert_close(found, model.eval()(tokens[:, :n]).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_activation_checkpointing_gives_the_same(name):
    model, twin = twins(name)
    inputs = batch(name, "right")
    before = loss_and_gradients(model, inputs)
    twin.gradient_checkpointing_enable()
    assert_same(before, loss_and_gradients(twin, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_with_a_gradient_scaler(dtype):
    """By the error rule, against float32: at most twice the error of the model as it was, both the largest of three."""
    model, twin = twins("GPT2LMHeadModel")
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)

    def gradients(of, inputs):
        of.zero_grad()
        with torch.autocast("cpu", dtype):
            loss = of(**inputs).loss
        assert loss.dtype == torch.float32
        scaler.scale(loss).backward()
        return {name: p.grad / scaler.get_scale() for name, p in of.named_parameters()}

    errors = {model: {}, twin: {}}
    for _ in range(3):
        inputs = batch("GPT2LMHeadModel")
        exact = loss_and_gradients(model, inputs)[1]
        for of, largest in errors.items():
            for name, gradient in gradients(of, inputs).items():
                error = float((gradient - exact[name]).abs().max())
                largest[name] = max(error, largest.get(name, 0.0))
    for name, allowed in errors[model].items():
        assert errors[twin][name] <= 2 * allowed + 1e-5, name


def test_lightning_module_trains(tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model, self.losses = model, []

        def training_step(self, batch, _):
            loss = self.model(**batch).loss
            self.losses.append(float(loss.detach()))
            return loss

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    losses = []
    for model in twins("GPT2LMHeadModel"):
        module = Module(model)
        lightning.Trainer(
            max_steps=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
            enable_model_summary=False, default_root_dir=tmp_path,
        ).fit(module, torch.utils.data.DataLoader(Texts(32), batch_size=8))  # fmt: skip
        losses.append(module.losses)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "fsdp untied", "accelerate"])
def test_two_processes_learn_what_one_does(how, tmp_path):
    """torchrun with gloo: the losses of every step equal those of one process on the whole batch."""
    if how == "accelerate":
        pytest.importorskip("accelerate")
    script = Path(__file__).parents[1] / "support" / "train_in_processes.py"
    env = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(script.parents[2]),
    }

    how, *untied = how.split()

    def losses(processes, how):
        out = tmp_path / f"{how}.json"
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={processes}",
        ]
        done = subprocess.run(
            [*command, script, how, out, *untied],
            env=env,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(out.read_text())

    one = losses(1, "one")
    two = losses(2, how)
    assert two["ops"] == one["ops"]
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-5)
    assert one["losses"][-1] < one["losses"][0]


@pytest.mark.parametrize("name", FAMILIES)
def test_fake_tensors_pass_through(name):
    """So that tools can weigh a model's memory without running it."""
    with torch._subclasses.FakeTensorMode():
        model = build(name)
        fastgpt.accelerate(model)
        decisions = fastgpt.explain(model, **batch(name)).decisions
        loss, gradients = loss_and_gradients(model, batch(name))
    assert {d.backend for d in decisions} == {"cpp"}
    assert loss.shape == ()
    shapes = {key: weight.shape for key, weight in model.named_parameters()}
    assert {key: gradient.shape for key, gradient in gradients.items()} == {k: shapes[k] for k in gradients}
