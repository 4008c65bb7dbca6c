"""Training options: batches, optimizers, schedules, losses, initialization and early stopping."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoints import native as checkpoint
from fastgpt.data import Batch, DatasetWriter
from fastgpt.distributed import DistributedContext
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt.training.config import TrainConfig, read_toml, trained_with
from fastgpt.training.initialize import config_from
from fastgpt.training.optimizers import learning_rate, make_optimizers
from fastgpt.training.trainer import Trainer, train

DOCUMENTS = [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 5) for i in range(80)]


@pytest.fixture
def options(tmp_path: Path) -> dict:
    folder = tmp_path / "text"
    folder.mkdir()
    for i, text in enumerate(DOCUMENTS):
        (folder / f"{i}.py").write_text(text)
    return {
        **{"data": str(folder), "out": str(tmp_path / "out"), "dtype": "float32"},
        **{"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 64, "batch_size": 4},
        **{
            "max_steps": 20,
            "warmup_steps": 2,
            "lr": 1e-2,
            "eval_every": 10,
            "eval_batches": 2,
            "save_every": 10,
        },
        **{"log_every": 1, "sample_tokens": 4},
    }


def run(options: dict, **others: object) -> tuple[list[float], str]:
    """Train, and return the training losses and the output directory."""
    options = options | others
    train(config_from(options))
    records = map(json.loads, (Path(options["out"]) / "log.jsonl").read_text().splitlines())
    return [record["train_loss"] for record in records if "train_loss" in record], options["out"]


def test_a_prepared_dataset_is_packed_and_its_text_is_learned(options: dict, tmp_path: Path):
    with DatasetWriter(tmp_path / "set", ByteTokenizer(), seed=0) as writer:
        for i, text in enumerate(DOCUMENTS):
            writer.add("val" if i % 8 == 0 else "train", ByteTokenizer().encode(text))
        writer.finish({})
    found, out = run(options, data=str(tmp_path / "set"), max_steps=60)
    assert found[-1] < found[0] - 1.5
    assert trained_with(checkpoint.open_checkpoint(out)).packing == "auto"
    shard = tmp_path / "set" / "train-00000.npy"
    raw = bytearray(shard.read_bytes())
    raw[-3] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(ValueError, match=r"train-00000\.npy"):
        run(options, data=str(tmp_path / "set"), out=str(tmp_path / "other"))


def test_the_tokens_of_a_dataset_must_be_those_of_the_model(options: dict, tmp_path: Path):
    with DatasetWriter(tmp_path / "set", ByteTokenizer(), seed=0) as writer:
        for split in ("train", "val"):
            writer.add(split, ByteTokenizer().encode(DOCUMENTS[4]))
        writer.finish({})
    _, out = run(options, tokenizer="bpe", vocab_size=300)
    with pytest.raises(ValueError, match="prepared with another tokenizer"):
        run(options, data=str(tmp_path / "set"), init_from=out, out=str(tmp_path / "other"))


def test_packed_documents_and_the_stream_learn_from_other_batches(options: dict, tmp_path: Path, capfd):
    packed, _ = run(options, packing="documents")
    stream, _ = run(options, packing="stream", out=str(tmp_path / "stream"))
    printed = capfd.readouterr().out
    assert packed != stream
    assert (
        f"{options['data']}, packed documents; " in printed and f"{options['data']}, one stream; " in printed
    )


@pytest.mark.parametrize("optimizer", ["adamw", "adam", "muon"])
def test_each_optimizer_learns_and_resumes_exactly(options: dict, tmp_path: Path, optimizer: str):
    whole, _ = run(options, optimizer=optimizer, dropout=0.1)
    assert whole[-1] < whole[0] - 0.5
    part = options | {"out": str(tmp_path / "part")}
    run(part, optimizer=optimizer, dropout=0.1, max_minutes=1e-9)
    again, _ = run({"out": part["out"], "resume": True, "max_minutes": 9.0})
    assert again == whole


def test_decay_is_decoupled_in_adamw_and_part_of_the_gradient_in_adam():
    """Without gradients AdamW shrinks a weight by lr * decay; Adam takes a full step along the decay term."""
    found = {}
    for name in ("adamw", "adam", "muon"):
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=16, block_size=4, n_layer=1, n_head=1, n_embd=8))
        weight = model.h[0].mlp.c_fc.weight
        before = weight.detach().clone()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for optimizer in make_optimizers(model, TrainConfig(optimizer=name, lr=0.01, weight_decay=0.5)):
            optimizer.step()
        found[name] = weight.detach() - before
    torch.testing.assert_close(found["adamw"], -0.005 * before)
    torch.testing.assert_close(found["muon"], -0.005 * before)
    torch.testing.assert_close(found["adam"], -0.01 * before.sign(), rtol=1e-3, atol=1e-5)


def test_muon_has_the_matrices_of_the_blocks_and_adamw_the_rest():
    model = GPT(GPTConfig(vocab_size=16, block_size=4, n_layer=2, n_head=1, n_embd=8))
    muon, rest = make_optimizers(model, TrainConfig(optimizer="muon"))
    owned = [{id(p) for group in o.param_groups for p in group["params"]} for o in (muon, rest)]
    for name, parameter in model.named_parameters():
        matrix = name.startswith("h.") and parameter.dim() == 2
        assert [id(parameter) in part for part in owned] == [matrix, not matrix], name


def test_schedules():
    config = TrainConfig(lr=1.0, min_lr=0.2, warmup_steps=10, max_steps=110, decay_steps=20)
    linear = config.override({"schedule": "linear"})
    assert [learning_rate(step, linear) for step in (4, 10, 60, 110)] == pytest.approx([0.5, 1.0, 0.6, 0.2])
    wsd = config.override({"schedule": "wsd"})
    assert [learning_rate(step, wsd) for step in (4, 10, 60, 90)] == pytest.approx([0.5, 1.0, 1.0, 1.0])
    assert [learning_rate(step, wsd) for step in (100, 110, 500)] == pytest.approx([0.6, 0.2, 0.2])
    short = config.override({"schedule": "wsd", "decay_steps": 1000})  # the decay begins after the warm-up
    assert [learning_rate(step, short) for step in (10, 60)] == pytest.approx([1.0, 0.6])


@pytest.mark.parametrize("terms", [{"label_smoothing": 0.2}, {"z_loss": 0.1}])
def test_terms_of_the_training_loss_are_not_in_the_validation_loss(
    options: dict, tmp_path: Path, terms: dict
):
    plain, a = run(options, max_steps=1)
    other, b = run(options, max_steps=1, out=str(tmp_path / "other"), **terms)
    assert other[0] > plain[0] + 0.05 or "label_smoothing" in terms
    assert other[0] != pytest.approx(plain[0], rel=1e-4)
    first = [json.loads((Path(out) / "log.jsonl").read_text().splitlines()[0]) for out in (a, b)]
    assert first[0] == first[1] and "val_loss" in first[0]


def test_checkpointed_activations_change_no_bit(options: dict, tmp_path: Path):
    options |= {"dropout": 0.1, "packing": "documents"}
    kept, _ = run(options)
    again, _ = run(options, checkpoint_activations=True, out=str(tmp_path / "again"))
    assert kept == again


def test_checkpointed_activations_take_less_memory():
    model = GPT(GPTConfig(vocab_size=64, block_size=256, n_layer=4, n_head=2, n_embd=64))
    idx = torch.randint(64, (2, 256))

    def kept() -> int:
        sizes: dict[int, int] = {}
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                sizes[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = model(idx, idx)[1]
        assert loss.isfinite()
        return sum(sizes.values())

    everything = kept()
    model.checkpoint_activations = True
    assert kept() < everything / 3


def test_float16_scales_the_loss_and_resumes_with_its_scale(options: dict, tmp_path: Path):
    options |= {"dtype": "float16", "max_steps": 4, "save_every": 2, "block_size": 16}
    whole, out = run(options)
    scaler = checkpoint.open_checkpoint(out).extra["scaler"]
    assert scaler["scale"] > 1 and scaler["_growth_tracker"] >= 0
    in_float32, _ = run(options, dtype="float32", out=str(tmp_path / "float32"))
    assert whole == pytest.approx(in_float32, abs=0.02)
    part = options | {"out": str(tmp_path / "part")}
    run(part, max_minutes=1e-9)
    again, _ = run({"out": part["out"], "resume": True, "max_minutes": 9.0})
    assert again == whole


def test_patience_ends_a_run_without_progress_and_keeps_its_best(options: dict, capfd, monkeypatch):
    from fastgpt.training import trainer as module

    worse = iter([5.0, 4.0, 3.0, 3.5, 3.6, 3.7, 3.8])
    monkeypatch.setattr(module.ValidationHistory, "add", _with_losses(module.ValidationHistory.add, worse))
    result = train(TrainConfig().override(options | {"eval_every": 2, "patience": 3, "save_every": 3}))
    printed = capfd.readouterr().out
    assert result.finished and result.step == 10
    best = Path(options["out"]) / "step-00000004"
    assert (
        f"stopped early at step 10: no better validation loss in 3 evaluations; the best, 3.0000, is {best}"
        in printed
    )
    assert checkpoint.open_checkpoint(best).step == 4
    assert checkpoint.open_checkpoint(options["out"]).step == 10
    assert len(list(Path(options["out"]).glob("step-*"))) == 3


def _with_losses(add, losses):
    return lambda self, step, loss: add(self, step, next(losses))


def test_a_run_starts_from_the_weights_of_another(options: dict, tmp_path: Path, capfd):
    _, out = run(options, position="rotary", max_steps=40)
    trained = json.loads((Path(out) / "log.jsonl").read_text().splitlines()[-1])["val_loss"]
    start = {"init_from": out, "data": options["data"], "out": str(tmp_path / "second"), "dtype": "float32"}
    rest = {"block_size": 64, "eval_batches": 2, "batch_size": 4, "max_steps": 1, "sample_tokens": 0}
    train(config_from(start | rest))
    records = list(map(json.loads, (tmp_path / "second" / "log.jsonl").read_text().splitlines()))
    assert records[0] == {"step": 0, "val_loss": trained}
    with pytest.raises(ValueError, match="n_layer is 1 in the model to start from, not 2"):
        train(config_from(start | {"n_layer": 2, "out": str(tmp_path / "third")}))
    longer = checkpoint.open_checkpoint(tmp_path / "second").load_model()
    assert longer.config.position == "rotary" and longer.config.n_embd == 32


@pytest.mark.parametrize("kind", ["bytes", pytest.param("bpe", marks=pytest.mark.slow)])
def test_the_tokenizer_of_the_model_to_start_from_is_the_only_one(options: dict, tmp_path: Path, kind: str):
    options |= {"max_steps": 1, "sample_tokens": 0}
    _, out = run(options, tokenizer=kind, vocab_size=300)
    own, other = tmp_path / "own", tmp_path / "other"
    for folder, tokenizer in (
        (own, checkpoint.open_checkpoint(out).load_tokenizer()),
        (other, BPETokenizer.train(["another text " * 20], 300)),
    ):
        folder.mkdir()
        tokenizer.save(folder)
    start = options | {"init_from": out}
    same = ["auto", str(own), str(own / "tokenizer.json"), *(["bytes"] if kind == "bytes" else [])]
    for number, name in enumerate(same):
        _, second = run(start, tokenizer=name, out=str(tmp_path / f"second-{number}"))
        run({"out": second, "resume": True, "max_steps": 2, "tokenizer": same[-1]})  # not another one either
    written = read_toml(tmp_path / "second-0" / "config.toml")
    run(written | {"out": str(tmp_path / "again")})
    for name in ("bpe", str(other), *(["bytes"] if kind == "bpe" else [])):
        with pytest.raises(ValueError, match=f"--tokenizer {name} differs from the tokenizer of .*. Omit"):
            run(start, tokenizer=name, out=str(tmp_path / "third"))
        with pytest.raises(checkpoint.CheckpointError, match="cannot change the model: tokenizer is"):
            run({"out": str(tmp_path / "second-0"), "resume": True, "tokenizer": name})
    assert not (tmp_path / "third").exists()


def test_a_tokenizer_beside_a_prepared_dataset_must_be_its_own(options: dict, tmp_path: Path):
    options |= {"max_steps": 1, "sample_tokens": 0}
    for tokenizer in (ByteTokenizer(), BPETokenizer.train(DOCUMENTS, 300)):
        folder = str(tmp_path / f"set-{tokenizer.name}")
        with DatasetWriter(folder, tokenizer, seed=0) as writer:
            for split in ("train", "val"):
                writer.add(split, tokenizer.encode(DOCUMENTS[4]))
            writer.finish({})
        for number, name in enumerate((tokenizer.name, folder)):
            run(options, data=folder, tokenizer=name, out=f"{folder}-out-{number}")
        (other,) = {"bytes", "bpe"} - {tokenizer.name}
        with pytest.raises(
            ValueError, match=rf"--tokenizer {other} is not the one that .* was prepared with"
        ):
            run(options, data=folder, tokenizer=other)


def test_a_run_starts_from_a_gpt2_of_hugging_face(options: dict, tmp_path: Path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=300, block_size=48, n_layer=2, n_head=2, n_embd=32))
    model.save_pretrained(tmp_path / "gpt2", ByteTokenizer())
    start = {"init_from": str(tmp_path / "gpt2"), "data": options["data"], "out": options["out"]}
    rest = {
        "batch_size": 4,
        "max_steps": 2,
        "save_every": 1,
        "eval_batches": 1,
        "warmup_steps": 1,
        "sample_tokens": 0,
    }
    train(config_from(start | rest | {"block_size": 32, "max_minutes": 1e-9}))
    train(config_from({"out": options["out"], "resume": True, "max_minutes": 9.0}))
    opened = checkpoint.open_checkpoint(options["out"])
    assert opened.step == 2 and trained_with(opened).block_size == 32
    assert (opened.model.block_size, opened.model.vocab_size, opened.model.n_layer) == (48, 300, 2)
    with pytest.raises(ValueError, match="block_size=64 is too long: the model has 48 learned positions"):
        train(config_from(start | rest | {"block_size": 64, "out": str(tmp_path / "third")}))


def test_the_files_of_a_run_explain_it(options: dict, tmp_path: Path):
    losses, out = run(options, label_smoothing=0.1, max_steps=4)
    written = tomllib.loads((Path(out) / "config.toml").read_text())
    assert written["label_smoothing"] == 0.1 and "resume" not in written
    (started,) = map(json.loads, (Path(out) / "environment.json").read_text().splitlines())
    assert started["torch"] == torch.__version__ and started["cpu_threads"] == 1
    assert (Path(out) / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (Path(out) / "sample.txt").read_text().startswith("\n")
    again, _ = run(written | {"out": str(tmp_path / "again")})  # config.toml is a run's description
    assert again == losses


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"patience": 0}, "patience must be at least 1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\)"),
        ({"z_loss": -1.0}, "z_loss must not be negative"),
        ({"seed": 1 << 63}, "seed must be at most"),
        ({"optimizer": "sgd"}, "optimizer must be one of adamw, adam, muon"),
        ({"schedule": "step"}, "schedule must be one of cosine, linear, wsd"),
    ],
)
def test_options_that_make_no_run_are_refused(wrong: dict, message: str):
    with pytest.raises(ValueError, match=message):
        TrainConfig().override(wrong)


def test_batches_know_how_many_targets_count():
    targets = torch.tensor([[1, -100, 3], [-100, -100, 0]])
    assert Batch(targets, targets).num_targets == 3


def test_the_state_of_another_optimizer_is_refused(options: dict):
    options |= {"max_steps": 2}
    run(options, optimizer="muon")
    with pytest.raises(checkpoint.CheckpointError, match=r"--resume cannot change the optimizer: .* of muon"):
        run({"out": options["out"], "resume": True, "optimizer": "adamw"})
    adam, _ = run(options, out=f"{options['out']}2", optimizer="adam")
    again, _ = run({"out": f"{options['out']}2", "resume": True, "optimizer": "adamw", "max_steps": 4})
    assert again[:2] == adam and len(again) == 4


def test_a_run_that_patience_ended_does_not_go_on(options: dict, capfd, monkeypatch):
    """The loss increases from the start: the initial weights are the best, and are kept."""
    from fastgpt.training import trainer as module

    monkeypatch.setattr(
        module.ValidationHistory,
        "add",
        _with_losses(module.ValidationHistory.add, iter([1.0, 2.0, 3.0, 4.0])),
    )
    assert (
        train(TrainConfig().override(options | {"eval_every": 2, "patience": 2, "save_every": 1})).step == 4
    )
    best = Path(options["out"]) / "step-00000000"
    assert f"the best, 1.0000, is {best}" in capfd.readouterr().out
    opened = checkpoint.open_checkpoint(best)
    assert opened.step == 0 and opened.load_model().config.n_layer == 1
    assert train(config_from({"out": options["out"], "resume": True})).step == 4
    assert f"the best, 1.0000, is {best}" in capfd.readouterr().out
    assert checkpoint.open_checkpoint(options["out"]).step == 4


def test_no_optimizer_takes_a_step_in_which_float16_overflowed(options: dict):
    """AdamW's gradients become finite before Muon's; a checkpoint without any step can be resumed."""
    options |= {"dtype": "float16", "optimizer": "muon", "block_size": 16, "sample_tokens": 0}
    whole = Trainer(config_from(options), DistributedContext())
    whole.scaler = torch.amp.GradScaler("cpu", init_scale=1e9)
    changed = []
    for _ in range(16):
        before = {name: tensor.clone() for name, tensor in whole.model.state_dict().items()}
        loss = whole.optimizer_step()
        whole.step += 1
        if whole.step == 1:
            whole.save_checkpoint(loss)
        after = whole.model.state_dict()
        changed.append({name: not torch.equal(before[name], after[name]) for name in before})
    whole.close()
    assert not any(changed[0].values()) and all(changed[-1].values())
    assert all(all(step.values()) or not any(step.values()) for step in changed)
    again, _ = run({"out": options["out"], "resume": True, "max_steps": 3})
    assert len(again) == 2


def test_the_options_of_a_run_can_be_read_whatever_its_name(options: dict, tmp_path: Path):
    options |= {"out": str(tmp_path / "\U0001f600 \x7f \u00e9"), "max_steps": 1, "sample_tokens": 0}
    run(options)
    assert TrainConfig().override(read_toml(Path(options["out"]) / "config.toml")) == config_from(options)
