"""Names on the Hugging Face Hub, tokenizers of other libraries, and checkpoints that differ from a plain GPT-2."""

from __future__ import annotations

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from fastgpt.checkpoints.load import open_model
from fastgpt.cli import main
from fastgpt.console import Note
from fastgpt.data import PrepareConfig, open_dataset, prepare
from fastgpt.download import is_hub_name
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from fastgpt.training.config import TrainConfig
from fastgpt.training.initialize import config_from
from fastgpt.training.trainer import train

TEXT = "".join(f"line {i} of a text\n" for i in range(300))


@pytest.fixture
def tokenizer() -> BPETokenizer:
    return BPETokenizer.train([TEXT], 270)


@pytest.fixture
def model(tmp_path: Path, tokenizer: BPETokenizer) -> Path:
    GPT(GPTConfig(tokenizer.vocab_size, 32, n_layer=1, n_head=2, n_embd=32)).save_pretrained(
        tmp_path / "m", tokenizer
    )
    return tmp_path / "m"


@pytest.fixture
def hub(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fake a Hub with the model as "owner/tiny" and "tiny", in an empty working directory; record requests."""
    asked: list[str] = []

    def snapshot_download(name: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        asked.append(name if revision is None else f"{name} {revision}")
        if name not in ("tiny", "owner/tiny"):
            raise huggingface_hub.errors.HFValidationError(f"there is no repository {name}\nsee the manual")
        place = tmp_path / "cache" / name
        place.mkdir(parents=True, exist_ok=True)
        for file in model.iterdir():
            if any(fnmatch(file.name, pattern) for pattern in allow_patterns):
                shutil.copy(file, place)
        return str(place)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    return asked


@pytest.mark.parametrize("name", ["tiny", "owner/tiny"])
def test_a_name_on_the_hub_is_a_checkpoint_everywhere(
    hub: list[str], model: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture
):
    (tmp_path / "text.txt").write_text(TEXT)
    text, export = str(tmp_path / "text.txt"), tmp_path / "export"
    assert main(["generate", "--checkpoint", name, "--prompt", "line", "--max-new-tokens", "3"]) == 0
    assert capsys.readouterr().out.startswith("line")
    assert main(["eval", "--checkpoint", name, "--data", text]) == 0
    assert main(["export", "--checkpoint", name, "--out", str(export)]) == 0
    assert load_file(export / "model.safetensors").keys() == load_file(model / "model.safetensors").keys()
    run = config_from(
        {"init_from": name, "data": text, "out": str(tmp_path / "out"), "max_steps": 1, "sample_tokens": 0}
    )
    assert run.n_embd == 32 and train(run).finished
    assert open_model(tmp_path / "out")[1].serialized() == load_tokenizer(model).serialized()
    assert set(hub) == {name}


def test_a_name_on_the_hub_is_a_tokenizer_everywhere(hub: list[str], tokenizer: BPETokenizer, tmp_path: Path):
    (tmp_path / "text.txt").write_text(TEXT)
    text = str(tmp_path / "text.txt")
    assert load_tokenizer(Path("tiny")).serialized() == tokenizer.serialized()
    prepare([text], PrepareConfig(str(tmp_path / "set"), tokenizer="tiny", repetition="keep"))
    assert open_dataset(tmp_path / "set").tokenizer().serialized() == tokenizer.serialized()
    small = {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 8, "max_steps": 1, "sample_tokens": 0}
    options = {"tokenizer": "owner/tiny", "data": text, "out": str(tmp_path / "out"), **small}
    train(TrainConfig().override(options))
    assert open_model(tmp_path / "out")[1].serialized() == tokenizer.serialized()
    train(config_from(options | {"resume": True, "max_steps": 2}))
    assert set(hub) == {"tiny", "owner/tiny"}


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        (["generate", "--checkpoint", "unknown/model"], "directory"),
        (["export", "--checkpoint", "unknown/model", "--out", "x"], "directory"),
        (["train", "--init-from", "unknown/model"], "directory"),
        (["train", "--tokenizer", "unknown/model"], "tokenizer"),
        (["data", "stdlib", "--tokenizer", "unknown/model"], "tokenizer"),
    ],
)
def test_a_name_that_is_nowhere(
    hub: list[str], arguments: list[str], what: str, capsys: pytest.CaptureFixture
):
    assert main(arguments) == 2
    expected = f"there is no {what} unknown/model on disk, and the download from the Hub failed: there is no repository"
    error = capsys.readouterr().err
    assert error.startswith(f"fastgpt: error: {expected}") and error.count("\n") == 1


@pytest.mark.parametrize("name", ["tiny@main", "owner/tiny@607a30d783dfa663caf39e06633721c8d4cfcd7e"])
def test_a_name_may_have_a_revision(hub: list[str], model: Path, name: str):
    assert open_model(name)[0].config.n_embd == 32
    assert GPT.from_pretrained(name).config.n_embd == 32
    assert load_tokenizer(Path(name)).serialized() == load_tokenizer(model).serialized()
    assert set(hub) == {name.replace("@", " ")}
    for wrong in ("tiny@", "@main", "tiny@a/b", "tiny@a@b"):
        assert not is_hub_name(wrong), wrong


@pytest.mark.parametrize(
    "name", ["out/rum", "runs/tiny", "checkpoints/last", "models/gpt2", "data/set", "mine/step-00001000"]
)
def test_a_mistyped_path_asks_nobody_for_a_model(hub: list[str], name: str):
    """A correct path in a wrong working directory must not be looked up either."""
    assert not is_hub_name(name)
    with pytest.raises(FileNotFoundError, match=f"checkpoint directory {name} does not exist"):
        GPT.from_pretrained(name)
    assert hub == []


def test_paths_are_not_looked_up_on_the_hub(hub: list[str], tmp_path: Path, capsys: pytest.CaptureFixture):
    (tmp_path / "ckpt.pt").touch()
    Path("mine").mkdir()
    assert not is_hub_name("mine/tiny") and is_hub_name("owner/tiny") and is_hub_name("tiny")
    for name in (
        "./run",
        "../run",
        "/run",
        "out/a/b",
        "~/run",
        "tokenizer.json",
        "run/",
        "model.safetensors",
        "",
        "-x",
    ):
        assert not is_hub_name(name), name
    assert main(["generate", "--checkpoint", "./absent"]) == 2
    assert "checkpoint directory ./absent does not exist" in capsys.readouterr().err
    assert main(["generate", "--checkpoint", str(tmp_path / "ckpt.pt")]) == 2
    assert "ckpt.pt is a file, not a checkpoint directory; give a directory" in capsys.readouterr().err
    assert hub == []


def test_a_directory_goes_before_the_hub(hub: list[str], model: Path):
    shutil.copytree(model, "tiny")
    assert open_model("tiny")[0].config.n_embd == 32 and load_tokenizer(Path("tiny")).vocab_size > 256
    assert hub == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [("spiece.model", "SentencePiece"), ("a.spm", "SentencePiece"), ("cl100k_base.tiktoken", "tiktoken")],
)
def test_tokenizers_of_other_libraries_are_named(tmp_path: Path, name: str, kind: str):
    (tmp_path / name).write_bytes(b"\n\x0e\n\x05<unk>\x15\0\0\0\0")
    for path in (tmp_path / name, tmp_path):
        with pytest.raises(ValueError, match=f"{name} is .*{kind}.*; give --tokenizer .*save_pretrained"):
            load_tokenizer(path)
    ByteTokenizer().save(tmp_path)
    assert load_tokenizer(tmp_path).name == "bytes"


def test_what_is_no_tokenizer_is_answered_with_what_is(tmp_path: Path):
    (tmp_path / "a.json").write_text("text")
    for path in (tmp_path / "a.json", tmp_path, tmp_path / "absent.json"):
        with pytest.raises(
            (ValueError, FileNotFoundError), match=r"give --tokenizer bytes, bpe, a tokenizer\.json"
        ):
            load_tokenizer(path)


def changed(model: Path, options: dict, tensors: dict, rename: str = "{}") -> None:
    """Write the model with other options (None removes one), additional tensors and other names."""
    file, config = model / "model.safetensors", model / "config.json"
    named = {rename.format(name): tensor for name, tensor in load_file(file).items()}
    save_file(named | tensors, file)
    written = json.loads(config.read_text()) | options
    config.write_text(
        json.dumps({name: value for name, value in written.items() if value is not None}), "utf-8-sig"
    )


@pytest.mark.parametrize(
    ("options", "tensors", "rename", "notes"),
    [
        ({}, {"score.weight": torch.ones(2, 32)}, "{}", ["skipped score.weight, tensors of a head"]),
        ({}, {"v_head.summary.bias": torch.ones(1)}, "{}", ["skipped v_head.summary.bias"]),
        ({}, {f"a.{i}": torch.ones(1) for i in range(11)}, "{}", ["a.4, a.5, a.6 and 3 more, tensors"]),
        ({"model_type": None}, {}, "{}", ["lacks model_type; assuming gpt2"]),
        (
            {"model_type": None, "n_positions": None, "n_ctx": 32, "architectures": None},
            {},
            "{}",
            ["model_type"],
        ),
        ({}, {}, "module.{}", []),
        ({}, {}, "_orig_mod.module.{}", []),
    ],
)
def test_a_checkpoint_with_more_or_an_older_one_loads_with_a_note(
    model: Path, options: dict, tensors: dict, rename: str, notes: list[str], capsys: pytest.CaptureFixture
):
    expected = GPT.from_pretrained(model).state_dict()
    changed(model, options, tensors, rename)
    if notes:
        with pytest.warns(Note) as found:
            loaded = GPT.from_pretrained(model).state_dict()
        assert len(found) == len(notes) and all(
            note in str(w.message) for note, w in zip(notes, found, strict=True)
        )
    else:
        loaded = GPT.from_pretrained(model).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert main(["generate", "--checkpoint", str(model), "--max-new-tokens", "1"]) == 0
    printed = capsys.readouterr().err.splitlines()
    assert len(printed) == len(notes) and all(line.startswith("fastgpt: note: ") for line in printed)


@pytest.mark.parametrize(
    ("options", "tensors", "message"),
    [
        ({}, {"transformer.h.1.ln_1.weight": torch.ones(32)}, "has the tensor 'h.1.ln_1.weight'"),
        (
            {},
            {"transformer.h.0.crossattention.c_attn.bias": torch.ones(32)},
            "has the tensor 'h.0.crossattention",
        ),
        ({"model_type": None, "n_head": None}, {}, "of type None; supported are 'gpt2'"),
        ({"model_type": "opt"}, {}, "of type 'opt'; supported are 'gpt2'"),
        ({"n_layer": 2}, {}, "lacks the tensor 'h.1"),
    ],
)
def test_what_is_no_gpt2_is_still_refused(model: Path, options: dict, tensors: dict, message: str):
    changed(model, options, tensors)
    with pytest.raises(ValueError, match=message):
        GPT.from_pretrained(model)


def test_an_exported_tokenizer_takes_special_tokens_as_text(
    model: Path, tokenizer: BPETokenizer, tmp_path: Path
):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(model)
    text = "line <|endoftext|> of<|endoftext|>"
    assert theirs(text).input_ids == tokenizer.encode(text).tolist()
    assert theirs.model_max_length == 32 and theirs.eos_token_id == tokenizer.end_of_text
    assert theirs.decode(theirs(text).input_ids) == text
    GPT(GPTConfig(256, 16, n_layer=1, n_head=1, n_embd=8)).save_pretrained(
        tmp_path / "bytes", ByteTokenizer()
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "bytes")
    assert theirs.model_max_length == 16
    assert theirs(text).input_ids == list(text.encode())
