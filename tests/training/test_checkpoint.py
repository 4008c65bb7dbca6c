"""Checkpoints: exact, atomic, and refused in one message if they are incomplete."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch

from fastgpt import atomic_io
from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.native import CheckpointError, open_checkpoint
from fastgpt.model import GPT
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer
from fastgpt.training.config import TrainConfig, trained_with
from fastgpt.training.optimizers import make_optimizers

CONFIG = TrainConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, max_steps=9, warmup_steps=1)


def trained(config: TrainConfig = CONFIG, steps: int = 2) -> tuple[GPT, torch.optim.AdamW]:
    torch.manual_seed(0)
    model = GPT(config.model(256))
    (optimizer,) = make_optimizers(model, config)
    for step in range(steps):
        update(model, optimizer, step)
    return model, optimizer


def update(model: GPT, optimizer: torch.optim.Optimizer, seed: int) -> float:
    torch.manual_seed(seed)
    idx = torch.randint(256, (2, 8), generator=torch.Generator().manual_seed(seed))
    loss = model(idx, idx)[1]
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def save(out: Path, step: int, config: TrainConfig = CONFIG) -> Path:
    model, optimizer = trained(config)
    return checkpoint.save(out, step, model, [optimizer], ByteTokenizer(), config.as_dict(), {"note": 1.5})


@pytest.mark.parametrize("tied", [True, False])
def test_a_loaded_run_goes_on_bit_for_bit(tmp_path: Path, tied: bool):
    config = CONFIG.override({"tie_head": tied, "dropout": 0.1})
    model, optimizer = trained(config)
    checkpoint.save(tmp_path, 2, model, [optimizer], ByteTokenizer(), config.as_dict(), {})
    expected = [update(model, optimizer, step) for step in (2, 3, 4)]

    opened = open_checkpoint(tmp_path)
    assert opened.step == 2 and trained_with(opened) == config and opened.model == model.config
    copy = opened.load_model()
    assert (copy.lm_head.weight is copy.wte.weight) is tied
    (copy_optimizer,) = make_optimizers(copy, config)
    opened.load_training(copy, [copy_optimizer])
    assert [update(copy, copy_optimizer, step) for step in (2, 3, 4)] == expected
    for (name, a), b in zip(model.named_parameters(), copy.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_the_tokenizer_travels_along(tmp_path: Path):
    model, optimizer = trained()
    bpe = BPETokenizer.train(["hello world " * 50], 270)
    checkpoint.save(tmp_path, 1, model, [optimizer], bpe, CONFIG.as_dict(), {})
    assert torch.equal(open_checkpoint(tmp_path).load_tokenizer().encode("hello"), bpe.encode("hello"))


def test_the_newest_checkpoints_stay_and_can_be_named(tmp_path: Path):
    paths = [save(tmp_path, step) for step in (5, 20, 100)]
    assert not paths[0].exists()
    assert sorted(tmp_path.iterdir()) == sorted(paths[1:])
    assert open_checkpoint(tmp_path).step == 100
    assert open_checkpoint(paths[1]).step == 20
    assert open_checkpoint(tmp_path).extra == {"note": 1.5}


def test_a_saved_step_is_left_as_it_is(tmp_path: Path):
    path = save(tmp_path, 5)
    before = (path / "state.json").stat().st_mtime_ns
    assert save(tmp_path, 5) == path
    assert (path / "state.json").stat().st_mtime_ns == before


def test_what_a_killed_save_leaves_is_ignored_and_swept_away(tmp_path: Path):
    path = save(tmp_path, 5)
    leftover = tmp_path / ".writing-step-00000010"
    shutil.copytree(path, leftover)
    (tmp_path / "step-00000011").mkdir()  # without a state.json: no checkpoint of ours
    assert open_checkpoint(tmp_path).step == 5
    save(tmp_path, 20)
    assert not leftover.exists()


@pytest.mark.parametrize("kind", ["safetensors", "rename"])
def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str):
    path = save(tmp_path, 5)
    before = {file.name: file.read_bytes() for file in path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    if kind == "safetensors":
        monkeypatch.setattr(checkpoint, "named_state", full)
    else:
        monkeypatch.setattr(Path, "rename", full)
    with pytest.raises(OSError, match=r"step-00000010 could not be written \(No space left on device\)"):
        save(tmp_path, 10)
    assert list(tmp_path.iterdir()) == [path]
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert open_checkpoint(tmp_path).step == 5


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "tokenizer.json"])
def test_every_damaged_file_is_noticed(tmp_path: Path, name: str):
    file = save(tmp_path, 5) / name
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    for damaged in (good[:-1], bytes(flipped), b""):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{name} is damaged"):
            open_checkpoint(tmp_path)
    file.unlink()
    with pytest.raises(CheckpointError, match=f"lacks {name}"):
        open_checkpoint(tmp_path)


def test_a_foreign_or_missing_checkpoint_is_refused_in_a_sentence(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"checkpoint directory .* does not exist"):
        open_checkpoint(tmp_path / "absent")
    with pytest.raises(CheckpointError, match="contains no checkpoint"):
        open_checkpoint(tmp_path)
    state = save(tmp_path, 5) / "state.json"
    good = json.loads(state.read_text())
    for content, message in [
        ("{", "is not JSON"),
        ("[]", "does not contain a JSON object"),
        ("[" * 100_000, "nested too deeply"),
        (json.dumps(good | {"format": 99}), "has format 99"),
        (json.dumps(good | {"train": {"n_layers": 3}}), "did you mean"),
        (json.dumps(good | {"model": good["model"] | {"n_head": 3}}), "not divisible"),
        (json.dumps({key: value for key, value in good.items() if key != "step"}), "step"),
    ]:
        state.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            trained_with(open_checkpoint(tmp_path))


def test_weights_of_another_model_do_not_load(tmp_path: Path):
    save(tmp_path, 5)
    other = GPT(CONFIG.override({"n_embd": 32}).model(256))
    with pytest.raises(CheckpointError, match="does not match the model"):
        open_checkpoint(tmp_path).load_weights(other)


def test_what_others_are_writing_beside_it_stays(tmp_path: Path):
    """Keep .writing-data and .writing-data.old, through which `fastgpt data` writes OUT/data."""
    for name in (".writing-data", ".writing-data.old"):
        (tmp_path / name).mkdir()
    save(tmp_path, 5)
    assert (tmp_path / ".writing-data").is_dir() and (tmp_path / ".writing-data.old").is_dir()


def test_files_are_flushed_before_the_rename_and_the_directory_after(tmp_path: Path, monkeypatch):
    """A power failure leaves a complete checkpoint or none."""
    done: list[tuple[str, str]] = []
    flush, rename = atomic_io.flush, Path.rename
    monkeypatch.setattr(atomic_io, "flush", lambda path: done.append(("flush", path.name)) or flush(path))
    monkeypatch.setattr(
        Path, "rename", lambda old, new: done.append(("rename", new.name)) or rename(old, new)
    )
    written = save(tmp_path, 1)
    at = done.index(("rename", written.name))
    flushed = {name for what, name in done[:at] if what == "flush"}
    assert flushed >= {file.name for file in written.iterdir()} | {"state.json"}
    assert ("flush", tmp_path.name) in done[at:]
