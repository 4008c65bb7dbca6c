"""`--preset` and the options of the architecture: from the command line and TOML, into checkpoints and on from them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastgpt.checkpoints import native
from fastgpt.checkpoints.load import open_model
from fastgpt.cli import main
from fastgpt.gpt_config import PRESET_FIELDS, PRESETS, GPTConfig
from fastgpt.model import GPT
from fastgpt.training.config import TrainConfig, read_toml
from fastgpt.training.initialize import config_from
from fastgpt.training.trainer import train

TEXT = "def f(x):\n    return x + 1\n\nfor i in range(10):\n    print(f(i))\n" * 60


@pytest.fixture
def options(tmp_path: Path) -> dict:
    (tmp_path / "data.txt").write_text(TEXT)
    return {
        **{
            "data": str(tmp_path / "data.txt"),
            "out": str(tmp_path / "out"),
            "device": "cpu",
            "dtype": "float32",
        },
        **{"n_layer": 2, "n_head": 4, "n_embd": 32, "block_size": 32, "batch_size": 4, "max_steps": 4},
        **{"eval_batches": 1, "sample_tokens": 8},
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_default_of_the_options_it_chooses(preset: str):
    config = TrainConfig().override({"preset": preset, "n_head": 4, "n_embd": 32})
    model = config.model(256)
    expected = GPTConfig.preset(preset, n_head=4, n_embd=32)
    assert {name: getattr(model, name) for name in PRESET_FIELDS} == {
        name: getattr(expected, name) for name in PRESET_FIELDS
    }
    other = config.override({"bias": True, "n_kv_head": 2})
    assert (other.bias, other.n_kv_head, other.norm) == (True, 2, config.norm)
    assert TrainConfig().override(config.as_dict()) == config


@pytest.mark.parametrize("preset", ["llama", "nanochat"])
def test_a_run_of_a_preset_resumes_generates_and_is_a_start(
    options: dict, tmp_path: Path, preset: str, capfd
):
    train(config_from(options | {"preset": preset, "window": (8, 0)}))
    model = native.open_checkpoint(options["out"]).load_model()
    assert model.config == GPTConfig.preset(
        preset, vocab_size=256, block_size=32, n_layer=2, n_head=4, n_embd=32, window=(8, 0)
    )
    resumed = config_from({"resume": True, "out": options["out"], "max_steps": 6})
    assert (resumed.preset, resumed.window, resumed.norm) == (preset, (8, 0), "rms")
    train(resumed)
    assert native.open_checkpoint(options["out"]).step == 6
    with pytest.raises(native.CheckpointError, match="cannot change the model"):
        train(config_from({"resume": True, "out": options["out"], "preset": "gpt2"}))
    assert (
        main(["generate", "--checkpoint", options["out"], "--prompt", "for", "--max-new-tokens", "40"]) == 0
    )
    started = options | {"init_from": options["out"], "out": str(tmp_path / "second")}
    sizes = {name: started.pop(name) for name in ("n_layer", "n_head", "n_embd", "block_size")}
    config = config_from(started)
    assert (config.norm, config.window, config.n_head) == ("rms", (8, 0), sizes["n_head"])
    train(config)
    with pytest.raises(ValueError, match="in the model to start from"):
        train(config_from(started | {"preset": "gpt2", "out": str(tmp_path / "third")}))


def test_a_llama_is_exported_and_fine_tuned(options: dict, tmp_path: Path, capfd):
    train(config_from(options | {"preset": "llama"}))
    assert main(["export", "--checkpoint", options["out"], "--out", str(tmp_path / "llama")]) == 0
    assert "Llama's layout" in capfd.readouterr().out
    model, tokenizer = open_model(tmp_path / "llama")
    assert model.config.kv_heads == 1 and tokenizer.vocab_size == 256
    started = {
        name: value for name, value in options.items() if not name.startswith("n_") and name != "block_size"
    }
    train(config_from(started | {"init_from": str(tmp_path / "llama"), "out": str(tmp_path / "tuned")}))
    assert isinstance(native.open_checkpoint(tmp_path / "tuned").load_model(), GPT)


def test_windows_are_written_in_toml_and_on_the_command_line(tmp_path: Path, monkeypatch, capsys):
    seen: list[TrainConfig] = []
    monkeypatch.setattr("fastgpt.training.trainer.train", lambda config, **_: seen.append(config))
    for text in ('preset = "nanochat"\nwindow = [64, 0]', 'preset = "nanochat"\nwindow = 64', "softcap = 30"):
        (tmp_path / "run.toml").write_text(text)
        seen.append(config_from(read_toml(tmp_path / "run.toml")))
    assert [(c.window, c.softcap, c.norm) for c in seen] == [
        *(((64, 0), 15.0, "rms"), ((64,), 15.0, "rms"), (None, 30.0, "layer"))
    ]
    assert main(["train", "--preset", "llama", "--window", "128,0", "--n-head", "8", "--n-embd", "64"]) == 0
    assert (seen[-1].window, seen[-1].n_kv_head) == ((128, 0), 2)
    with pytest.raises(SystemExit):
        main(["train", "--window", "wide"])
    assert "'wide' is no list of whole numbers" in capsys.readouterr().err
    with pytest.raises(ValueError, match="window must be one or more whole numbers"):
        TrainConfig().override({"window": [1.5]})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "llama", "--n-kv-head", "4"], "n_head=6 is not divisible by n_kv_head=4"),
        (["--rope-theta", "1e6"], "rope_theta=1000000.0 needs position='rotary'"),
        (["--preset", "llama", "--n-head", "128"], "need an even n_embd / n_head, not 3"),
        (["--preset", "bert"], "invalid choice: 'bert'"),
    ],
)
def test_contradicting_options_are_named_before_anything_is_made(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    try:
        assert main(["train", *arguments]) != 0
    except SystemExit as stop:
        assert stop.code
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
