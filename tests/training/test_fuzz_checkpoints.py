"""Fuzzing of checkpoints, foreign models and logs: a correct result or one message, as in `test_fuzz_files`."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from fastgpt.atomic_io import fingerprint
from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.load import open_model
from fastgpt.checkpoints.native import open_checkpoint
from fastgpt.tokenizer import ByteTokenizer
from fastgpt.training.config import TrainConfig, trained_with
from fastgpt.training.metrics_log import MetricsLog
from fastgpt.training.optimizers import make_optimizers
from tests.data.test_fuzz_files import COUNTS, _nothing_outside_is_touched, fuzz  # noqa: F401  (a fixture)
from tests.support.fuzz import Case, Files
from tests.training.test_untrusted_checkpoint import format_1, trained

CONFIG = TrainConfig(n_layer=1, n_head=2, n_embd=16, block_size=8, max_steps=9, warmup_steps=1)

pytestmark = pytest.mark.parametrize("count", COUNTS)


def contents(directory: Path) -> Files:
    files = sorted(file for file in directory.rglob("*") if file.is_file())
    return {file.relative_to(directory).as_posix(): file.read_bytes() for file in files}


def saved(directory: Path) -> Path:
    model, optimizers = trained(CONFIG)
    return checkpoint.save(directory, 3, model, optimizers, ByteTokenizer(), CONFIG.as_dict(), {})


def in_parts(path: Path) -> None:
    """Convert it to the checkpoint of a sharded run of two processes."""
    for stem in ("model", "optimizer"):
        parts: list[dict[str, torch.Tensor]] = [{}, {}]
        for name, tensor in load_file(path / f"{stem}.safetensors").items():
            rows = tensor.chunk(2) if tensor.dim() else (tensor,)
            for part, piece in zip(parts, rows, strict=False):
                part[name] = piece.contiguous()
        (path / f"{stem}.safetensors").unlink()
        for number, part in enumerate(parts, 1):
            (path / f"{stem}-{number:05d}-of-00002.safetensors").write_bytes(save(part))
    state = json.loads((path / "state.json").read_text()) | {"parts": 2}
    (path / "state.json").write_text(json.dumps(state))
    list_again(path)


def list_again(path: Path) -> None:
    """Update sizes and checksums in state.json, so that they do not detect the damage."""
    try:
        state = json.loads((path / "state.json").read_bytes())
        found = [file for file in path.rglob("*") if file.is_file() and file.name != "state.json"]
        state["files"] = {file.relative_to(path).as_posix(): fingerprint(file) for file in found}
        (path / "state.json").write_text(json.dumps(state))
    except (ValueError, TypeError, RecursionError):
        pass


def use(path: Path) -> object:
    """Load a complete checkpoint, then take a step and generate a token."""
    opened = open_checkpoint(path)
    opened.load_tokenizer()
    model = opened.load_model()
    optimizers = make_optimizers(model, trained_with(opened))
    opened.load_training(model, optimizers)
    idx = torch.zeros(1, 2, dtype=torch.int64)
    model(idx, idx)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    return opened


@pytest.mark.parametrize("listed", [False, True], ids=["", "listed"])
@pytest.mark.parametrize("kind", ["whole", "parts", "format 1"])
def test_checkpoint(tmp_path: Path, count: int, kind: str, listed: bool):
    path = saved(tmp_path / "files")
    if kind == "parts":
        in_parts(path)
    elif kind == "format 1":
        format_1(path, {stem: load_file(path / f"{stem}.safetensors") for stem in ("model", "optimizer")})
    valid = contents(path)

    def read(directory: Path, case: Case) -> object:
        if listed and case.done:
            list_again(directory)
        return use(directory)

    fuzz(valid, count, tmp_path / "files", read)


@pytest.mark.parametrize("kind", ["safetensors", "bin", "shards"])
def test_hugging_face_directory(tmp_path: Path, count: int, kind: str):
    model, _ = trained(CONFIG)
    model.save_pretrained(tmp_path / "files", ByteTokenizer())
    valid = contents(tmp_path / "files")
    tensors = load_file(tmp_path / "files" / "model.safetensors")
    if kind == "bin":
        del valid["model.safetensors"]
        written = io.BytesIO()
        torch.save(tensors, written)
        valid["pytorch_model.bin"] = written.getvalue()
    elif kind == "shards":
        del valid["model.safetensors"]
        halves = [dict(sorted(tensors.items())[half::2]) for half in (0, 1)]
        names = [f"model-{part}.safetensors" for part in (1, 2)]
        valid |= {name: save(half) for name, half in zip(names, halves, strict=True)}
        weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
        valid["model.safetensors.index.json"] = json.dumps({"weight_map": weight_map}).encode()
    fuzz(valid, count, tmp_path / "files", lambda path, _: open_model(path))


def test_log(tmp_path: Path, count: int):
    lines = "".join(json.dumps({"step": step, "train_loss": 5.5 - step}) + "\n" for step in range(9))

    def read(path: Path, case: Case) -> object:
        log = MetricsLog(path / "log.jsonl", resume_at=5)
        try:
            return log.curve("train_loss")
        finally:
            log.close()

    fuzz({"log.jsonl": lines.encode()}, count, tmp_path / "files", read)
