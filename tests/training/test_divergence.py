"""Divergence: nonfinite losses or weights end a run with a message, and good checkpoints are kept."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.load import open_model
from fastgpt.cli import main
from fastgpt.evaluation.perplexity import evaluate
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.text import continue_texts
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer
from fastgpt.training.config import TrainConfig
from fastgpt.training.datasets import open_training_data
from fastgpt.training.initialize import config_from
from fastgpt.training.optimizers import make_optimizers
from fastgpt.training.trainer import Trainer, train

SMALL = {"block_size": 32, "n_layer": 1, "n_head": 2, "n_embd": 32}


@pytest.fixture
def options(tmp_path: Path) -> dict:
    (tmp_path / "text.txt").write_text("".join(f"line {i} of a text\n" for i in range(300)))
    return {
        **{"data": str(tmp_path / "text.txt"), "out": str(tmp_path / "out"), **SMALL, "batch_size": 4},
        **{"max_steps": 6, "eval_batches": 1, "eval_every": 100, "save_every": 2, "sample_tokens": 0},
        **{"warmup_steps": 1, "log_every": 100},
    }


def poison(monkeypatch: pytest.MonkeyPatch, at: int, what: str) -> None:
    """Change the weights or the optimizer's state after step `at`, whose own loss is finite."""
    update = Trainer.optimizer_step

    def updated(self: Trainer) -> torch.Tensor:
        loss = update(self)
        if self.step + 1 == at:
            with torch.no_grad():
                if what == "one weight":
                    self.model.wpe.weight[-1, 0] = math.nan
                elif what == "infinity":
                    self.model.h[0].mlp.c_fc.bias[3] = math.inf
                elif what == "huge weights":
                    for parameter in self.model.parameters():
                        parameter.copy_(torch.randn_like(parameter) * 1e30)
                else:
                    state = next(iter(self.optimizers[0].state.values()))
                    state["exp_avg"][0] = math.nan
        return loss

    monkeypatch.setattr(Trainer, "optimizer_step", updated)


@pytest.mark.parametrize("what", ["one weight", "infinity", "huge weights", "moment"])
def test_weights_that_are_no_numbers_are_not_saved(options: dict, what: str, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, 4, what)
    good = checkpoint.step_path(Path(options["out"]), 2)
    with pytest.raises(FloatingPointError, match=r"try a lower --lr; --resume goes on from .*step-00000002"):
        train(TrainConfig().override(options))
    assert checkpoint.steps(Path(options["out"])) == [good]
    monkeypatch.undo()
    assert train(config_from({"out": options["out"], "resume": True, "lr": 1e-4})).step == 6


def test_a_validation_loss_that_is_no_number_ends_the_run(options: dict, monkeypatch: pytest.MonkeyPatch):
    poison(monkeypatch, 3, "huge weights")
    with pytest.raises(
        FloatingPointError, match=r"the validation loss is (nan|inf) at step 3: try a lower --lr"
    ):
        train(TrainConfig().override(options | {"eval_every": 3}))
    lines = (Path(options["out"]) / "log.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert records[-1] == {"step": 3, "val_loss": None}
    assert [path.name for path in checkpoint.steps(Path(options["out"]))] == ["step-00000002"]


def spoil(model: GPT, how: str) -> GPT:
    """Set weights to NaN, or to finite values with nonfinite outputs."""
    with torch.no_grad():
        if how == "nan":
            model.h[0].attn.c_proj.weight[1, 2] = math.nan
        else:
            for parameter in model.parameters():
                parameter.copy_(torch.randn_like(parameter) * 1e30)
    return model


@pytest.fixture(params=["nan", "huge"])
def spoiled(request: pytest.FixtureRequest, tmp_path: Path, options: dict) -> Path:
    """Save such a model in both formats: gpt2/, and run/ with an older checkpoint of good weights."""
    config = TrainConfig(out=str(tmp_path / "run"), **SMALL)
    digest = open_training_data(replace(config, data=options["data"])).digest
    model = GPT(config.model(256))
    for step in (1, 2):
        optimizers = make_optimizers(model, config)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    zero = torch.zeros_like(p)
                    optimizer.state[p] = {
                        "step": torch.tensor(1.0),
                        "exp_avg": zero,
                        "exp_avg_sq": zero.clone(),
                    }
        validation = {"step": step, "loss": 3.0, "best_step": step, "best_loss": 3.0, "since_best": 0}
        extra = {"data": digest, "validation": validation, "scaler": {}}
        checkpoint.save(Path(config.out), step, model, optimizers, ByteTokenizer(), config.as_dict(), extra)
        spoil(model, request.param)
    model.save_pretrained(tmp_path / "gpt2", ByteTokenizer())
    return tmp_path


COMMANDS = {
    "eval": ["eval", "--data", "TEXT"],
    "eval --json": ["eval", "--data", "TEXT", "--json"],
    "eval --in-context": ["eval", "--in-context"],
    "eval --task": ["eval", "--task", "code", "--data", "embedded", "--limit", "2"],
    "generate": ["generate", "--prompt", "line"],
    "generate --json": ["generate", "--prompt", "line", "--json"],
    "generate at temperature 0": ["generate", "--prompt", "line", "--temperature", "0"],
    "generate with top-p": ["generate", "--prompt", "line", "--top-p", "0.5", "--repetition-penalty", "1.1"],
    "generate of two lengths": ["generate", "--prompts", "PROMPTS"],
}


@pytest.mark.parametrize("kind", ["gpt2", "run"])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_model_whose_outputs_are_no_numbers_is_refused(
    spoiled: Path, name: str, kind: str, options: dict, capsys: pytest.CaptureFixture
):
    (spoiled / "prompts.txt").write_text("line\nlonger\n")
    words = {"TEXT": options["data"], "PROMPTS": str(spoiled / "prompts.txt")}
    command, *rest = [words.get(word, word) for word in COMMANDS[name]]
    assert main([command, "--checkpoint", str(spoiled / kind), *rest]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert "its training has diverged; use an older checkpoint" in err


def test_no_run_goes_on_from_such_a_model(spoiled: Path, options: dict):
    with pytest.raises((FloatingPointError, ValueError), match="gpt2 cannot be used"):
        train(config_from(options | {"init_from": str(spoiled / "gpt2")}))
    with pytest.raises(
        FloatingPointError, match=r"step-00000002 cannot be used: remove it, then --resume goes on from"
    ):
        train(config_from({"out": str(spoiled / "run"), "resume": True, "data": options["data"]}))
    assert len(checkpoint.steps(spoiled / "run")) == 2


def test_a_perplexity_too_large_for_a_number_is_infinite(
    tmp_path: Path, options: dict, capsys: pytest.CaptureFixture
):
    model = GPT(GPTConfig(256, **SMALL))
    with torch.no_grad():
        model.wte.weight.mul_(1e5)
    model.save_pretrained(tmp_path / "m", ByteTokenizer())
    found = evaluate(tmp_path / "m", options["data"])
    assert 709 < found.loss < math.inf and found.perplexity == math.inf
    assert json.loads(json.dumps(found.as_dict(), allow_nan=False))["perplexity"] is None
    assert "perplexity  inf" in found.table()
    assert main(["eval", "--checkpoint", str(tmp_path / "m"), "--data", options["data"], "--json"]) == 0
    assert json.loads(capsys.readouterr().out, parse_constant=pytest.fail)["perplexity"] is None


def test_options_that_are_no_numbers_are_refused():
    for name in ("lr", "min_lr", "dropout", "beta1", "z_loss", "max_minutes", "grad_clip"):
        for value in (math.nan, math.inf, -math.inf):
            with pytest.raises(ValueError, match=f"{name} must be a finite number, not {value}"):
                TrainConfig().override({name: value})


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPETokenizer.train(["some text " * 9], 270)])
def test_padding_of_a_vocabulary_is_never_chosen(tokenizer: Tokenizer, tmp_path: Path, options: dict):
    known = tokenizer.vocab_size
    model = GPT(GPTConfig(known + 64, **SMALL)).eval()
    with torch.no_grad():  # the likeliest tokens by far
        model.lm_head.weight[known:] = 50 * model.ln_f.weight
        model.ln_f.bias.fill_(1.0)
    idx = torch.zeros(1, 1, dtype=torch.long)
    for choice in ({"temperature": 0}, {"top_k": 300}, {"top_p": 0.9}, {"repetition_penalty": 1.3}):
        assert model.generate(idx, 20, seed=0, **choice).max() >= known
        assert model.generate(idx, 20, seed=0, num_tokens=known, **choice).max() < known
    texts = continue_texts(model, tokenizer, ["some"], 20, Sampling(), seed=0, num_samples=2)
    assert all(text.continuation for text in texts)
    model.save_pretrained(tmp_path / "m", tokenizer)
    run = {**options, "init_from": str(tmp_path / "m"), "max_steps": 1, "sample_tokens": 30}
    train(config_from(run))
    assert (tmp_path / "out" / "sample.txt").exists()
    assert open_model(tmp_path / "out")[0].config.vocab_size == known + 64


@pytest.mark.parametrize("tokenizer", [ByteTokenizer(), BPETokenizer.train(["some text " * 9], 270)])
def test_ids_outside_a_vocabulary_decode_to_no_text(tokenizer: Tokenizer):
    ids = tokenizer.encode("some").tolist()
    odd = [-1, *ids, tokenizer.vocab_size, 1 << 40, -(1 << 40)]
    assert tokenizer.decode(torch.tensor(odd)) == "some"
