"""Untrusted checkpoints and run directories: no code runs, no outside file is read, mismatches are refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import stat
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fastgpt.atomic_io import AtomicDirectory, fingerprint, inside, open_to_append, replace_file
from fastgpt.checkpoints import native as checkpoint
from fastgpt.checkpoints.native import Checkpoint, CheckpointError, open_checkpoint
from fastgpt.checkpoints.tensor_files import TensorFiles
from fastgpt.cli import main
from fastgpt.model import GPT
from fastgpt.tokenizer import ByteTokenizer
from fastgpt.training.config import TrainConfig, trained_with
from fastgpt.training.optimizers import make_optimizers

FILES = ("model.safetensors", "optimizer.safetensors", "tokenizer.json")
CONFIG = TrainConfig(n_layer=2, n_head=2, n_embd=16, block_size=8, max_steps=9, warmup_steps=1)


class Code:
    """Object whose unpickling writes a file."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> Any:
        return Path.write_text, (self.proof, "code ran")


def trained(config: TrainConfig = CONFIG) -> tuple[GPT, list[torch.optim.Optimizer]]:
    torch.manual_seed(0)
    model = GPT(config.model(256))
    optimizers = make_optimizers(model, config)
    idx = torch.randint(256, (2, 8))
    model(idx, idx)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    return model, optimizers


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("good")
    model, optimizers = trained()
    return checkpoint.save(out, 3, model, optimizers, ByteTokenizer(), CONFIG.as_dict(), {})


@pytest.fixture
def path(good: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(good, tmp_path / good.name))


def rewrite(path: Path, change: dict[str, Any]) -> None:
    """Change state.json, and list the current files."""
    state = json.loads((path / "state.json").read_text())
    state |= change
    if "files" not in change:
        names = [file for file in path.rglob("*") if file.is_file() and file.name != "state.json"]
        state["files"] = {file.relative_to(path).as_posix(): fingerprint(file) for file in names}
    (path / "state.json").write_text(json.dumps(state))


def format_1(path: Path, tensors: dict[str, dict[str, Tensor]]) -> None:
    """Make a sharded checkpoint of format 1."""
    from torch.distributed.checkpoint import FileSystemWriter, save

    for stem, named in tensors.items():
        (path / f"{stem}.safetensors").unlink()
        writer = FileSystemWriter(path / stem, single_file_per_rank=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            save(named, storage_writer=writer, no_dist=True)
    state = json.loads((path / "state.json").read_text())
    del state["parts"]
    (path / "state.json").write_text(json.dumps(state))
    rewrite(path, {"format": 1})


def load_training(opened: Checkpoint) -> None:
    model = opened.load_model()
    opened.load_training(model, make_optimizers(model, trained_with(opened)))


def test_a_directory_beside_the_files_is_not_read(path: Path, tmp_path: Path):
    (path / "model").mkdir()
    (path / "model" / ".metadata").write_bytes(pickle.dumps(Code(tmp_path / "proof")))
    load_training(open_checkpoint(path))
    assert not (tmp_path / "proof").exists()


def test_a_sharded_checkpoint_of_format_1_is_read(path: Path):
    model, optimizers = trained()
    tensors = {stem: load_file(path / f"{stem}.safetensors") for stem in ("model", "optimizer")}
    format_1(path, tensors)
    opened = open_checkpoint(path)
    copy = opened.load_model()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, copy.state_dict()[name]), name
    copies = make_optimizers(copy, CONFIG)
    opened.load_training(copy, copies)
    for ours, theirs in zip(optimizers, copies, strict=True):
        for a, b in zip(ours.state.values(), theirs.state.values(), strict=True):
            assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def test_code_in_the_pickle_of_format_1_does_not_run(path: Path, tmp_path: Path):
    format_1(path, {stem: load_file(path / f"{stem}.safetensors") for stem in ("model", "optimizer")})
    (path / "model" / ".metadata").write_bytes(pickle.dumps(Code(tmp_path / "proof")))
    rewrite(path, {})
    with pytest.raises(CheckpointError, match=r"it refers to pathlib\.Path\.write_text|it refers to pathlib"):
        open_checkpoint(path).load_model()
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["torch manual_seed", "torch.serialization load", "builtins eval"])
def test_functions_named_in_the_pickle_of_format_1_are_not_called(path: Path, name: str):
    format_1(path, {stem: load_file(path / f"{stem}.safetensors") for stem in ("model", "optimizer")})
    module, function = name.split()
    call = f"c{module}\n{function}\n(S'7'\ntR.".encode()  # the function, of one string
    (path / "model" / ".metadata").write_bytes(call)
    rewrite(path, {})
    with pytest.raises(CheckpointError, match=rf"it refers to {module}\.{function}"):
        open_checkpoint(path).load_model()


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.storage_data.clear(),
        lambda m: [setattr(s, "relative_path", "../outside") for s in m.storage_data.values()],
        lambda m: [setattr(s, "length", 1 << 40) for s in m.storage_data.values()],
        lambda m: [setattr(s, "offset", -1) for s in m.storage_data.values()],
        lambda m: [setattr(f, "size", torch.Size((1 << 40, *f.size[1:]))) for f in m.state_dict_metadata.values()],
        lambda m: m.state_dict_metadata.update({"wte.weight": torch.float32}),
        lambda m: setattr(m, "state_dict_metadata", 3),
    ],
)  # fmt: skip
def test_a_list_of_format_1_that_lies_is_refused(path: Path, change: Any):
    format_1(path, {stem: load_file(path / f"{stem}.safetensors") for stem in ("model", "optimizer")})
    listed = path / "model" / ".metadata"
    metadata = pickle.loads(listed.read_bytes())
    change(metadata)
    listed.write_bytes(pickle.dumps(metadata))
    rewrite(path, {})
    with pytest.raises(CheckpointError, match="is not the list of a sharded checkpoint"):
        open_checkpoint(path).load_model()


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "sub/../../outside", "", "more.safetensors"])
def test_the_list_names_what_is_read_and_nothing_else(path: Path, name: str):
    files = json.loads((path / "state.json").read_text())["files"]
    rewrite(path, {"files": files | {name: files["tokenizer.json"]}})
    with pytest.raises(CheckpointError, match=r"state\.json lists .*, an unexpected file"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "tokenizer.json"])
def test_a_file_that_is_not_listed_is_not_read(path: Path, name: str):
    files = json.loads((path / "state.json").read_text())["files"]
    rewrite(path, {"files": {other: facts for other, facts in files.items() if other != name}})
    with pytest.raises(CheckpointError, match=f"state.json does not list .{name}"):
        open_checkpoint(path)


def test_a_link_out_of_the_checkpoint_is_not_followed(path: Path, tmp_path: Path):
    (path / "tokenizer.json").rename(tmp_path / "elsewhere")
    (path / "tokenizer.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a link to a file outside"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "change",
    [
        {"step": -5}, {"step": 4}, {"step": 3.0}, {"step": True}, {"step": 10**30}, {"step": "3"},
        {"parts": 0}, {"parts": 2}, {"parts": 10**12}, {"parts": None}, {"parts": 1.0},
        {"format": True}, {"format": 3}, {"format": []},
        {"files": []}, {"files": 5}, {"files": dict.fromkeys(FILES, 5)},
        {"train": []}, {"train": {"lr": "high"}}, {"train": {"n_layer": 1.0}},
        {"model": []}, {"model": {"layers": 3}}, {"extra": 5},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_of_other_types_or_values_is_refused(path: Path, change: dict[str, Any]):
    rewrite(path, change)
    with pytest.raises(CheckpointError):
        trained_with(open_checkpoint(path))


@pytest.mark.parametrize(
    "change",
    [
        {"n_layer": 10**9}, {"n_layer": 16_000}, {"n_layer": 3}, {"n_layer": 2.0}, {"n_layer": True}, {"n_layer": "2"},
        {"n_embd": 1 << 18, "vocab_size": 1 << 24}, {"vocab_size": 257}, {"vocab_size": None}, {"block_size": 1 << 24},
        {"position": "rotary", "block_size": 1 << 24}, {"position": "sinusoidal"}, {"bias": 1}, {"tie_head": False},
        {"dropout": float("nan")}, {"layer_norm_eps": 1e999}, {"position": []}, {"n_head": 10**30},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_of_other_tensors_is_refused_before_it_is_made(
    path: Path, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
):
    state = json.loads((path / "state.json").read_text())
    rewrite(path, {"model": state["model"] | change})
    made = []
    monkeypatch.setattr(torch.Tensor, "normal_", lambda self, *_, **__: made.append(self.device.type) or self)
    with pytest.raises(CheckpointError):
        open_checkpoint(path).load_model()
    assert set(made) <= {"meta"}


def test_parts_of_any_sizes_are_one_tensor(tmp_path: Path):
    generator = torch.Generator().manual_seed(7)
    whole = {
        "a": torch.randn(7, 3, generator=generator),
        "b": torch.randn(5, generator=generator),
        "c": torch.tensor(2.0),
    }
    sizes = {"a": (3, 0, 4), "b": (0, 5, 0)}
    for part in range(3):
        rows = {name: whole[name].split(sizes[name])[part].clone() for name in sizes}
        save_file(rows | ({"c": whole["c"]} if part == 0 else {}), tmp_path / f"{part}.safetensors")
    files = TensorFiles([tmp_path / f"{part}.safetensors" for part in range(3)])
    assert files.shapes == {name: tuple(tensor.shape) for name, tensor in whole.items()}
    for name, tensor in whole.items():
        assert torch.equal(files.read(name), tensor), name


@pytest.mark.parametrize(
    "second", [torch.ones(2, 4), torch.ones(2, 3).bfloat16(), torch.tensor(1.0), torch.ones(2)]
)
def test_parts_that_do_not_fit_are_refused(tmp_path: Path, second: Tensor):
    save_file({"a": torch.ones(2, 3)}, tmp_path / "0.safetensors")
    save_file({"a": second}, tmp_path / "1.safetensors")
    with pytest.raises(ValueError, match="does not match the other parts: a is"):
        TensorFiles([tmp_path / "0.safetensors", tmp_path / "1.safetensors"])


def one_number(moments: dict[str, Tensor]) -> None:
    moments.update({k: v.flatten()[:1].clone() for k, v in moments.items() if "exp_avg" in k})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (one_number, r"does not match the optimizer: .* is \(1,\), not"),
        (lambda m: m.pop("wte.weight.exp_avg"), "lacks .wte.weight.exp_avg"),
        (lambda m: m.pop("h.0.ln_1.bias.step"), "lacks .h.0.ln_1.bias.step"),
        (lambda m: m.update({"wte.weight.more": torch.ones(1)}), "has an unexpected .wte.weight.more"),
        (lambda m: m.update({"exp_avg": torch.ones(1)}), "has an unexpected .exp_avg"),
        (lambda m: m.update({"wte.weight.exp_avg": m["wte.weight.exp_avg"].T.contiguous()}), "not"),
        (
            lambda m: m.update({"wte.weight.exp_avg": m["wte.weight.exp_avg"].half()}),
            "float16, not torch.float32",
        ),
        (lambda m: m.update({"wte.weight.exp_avg": m["wte.weight.exp_avg"].long()}), "in None, not"),
        (
            lambda m: m.update({"wte.weight.step": torch.tensor(float("nan"))}),
            "has an invalid wte.weight.step, nan",
        ),
        (
            lambda m: m.update({"wte.weight.step": torch.tensor(-1.0)}),
            r"has an invalid wte.weight.step, -1\.0",
        ),
        (lambda m: m.update({"wte.weight.step": torch.ones(1)}), r"wte.weight.step is \(1,\), not \(\)"),
    ],
)
def test_the_state_of_an_optimizer_is_of_its_parameters(path: Path, change: Any, message: str):
    moments = load_file(path / "optimizer.safetensors")
    change(moments)
    save_file(moments, path / "optimizer.safetensors")
    rewrite(path, {})
    with pytest.raises(CheckpointError, match=message):
        load_training(open_checkpoint(path))


def test_the_state_of_muon_is_of_its_parameters(tmp_path: Path):
    config = CONFIG.override({"optimizer": "muon"})
    model, optimizers = trained(config)
    path = checkpoint.save(tmp_path, 3, model, optimizers, ByteTokenizer(), config.as_dict(), {})
    load_training(open_checkpoint(path))
    moments = load_file(path / "optimizer.safetensors")
    moments["h.0.mlp.c_fc.weight.momentum_buffer"] = torch.ones(1)
    save_file(moments, path / "optimizer.safetensors")
    rewrite(path, {})
    with pytest.raises(CheckpointError, match=r"h.0.mlp.c_fc.weight.momentum_buffer is \(1,\), not"):
        load_training(open_checkpoint(path))


# ---- files ----


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_all_files_have_the_mode_that_the_umask_says(tmp_path: Path, mask: int):
    before = os.umask(mask)
    try:
        model, optimizers = trained()
        path = checkpoint.save(tmp_path, 3, model, optimizers, ByteTokenizer(), CONFIG.as_dict(), {})
        model.save_pretrained(tmp_path / "exported", ByteTokenizer())
        replace_file(tmp_path / "text", "text")
    finally:
        os.umask(before)
    files = [*path.iterdir(), *(tmp_path / "exported").iterdir(), tmp_path / "text"]
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o666 & ~mask}


@pytest.mark.parametrize("name", ["..", "../x", "/x", "a/../../x", "", ".", "a\0b", 5, None, "a\\b"])
def test_a_name_that_leaves_the_directory_is_refused(tmp_path: Path, name: Any):
    with pytest.raises(ValueError, match="is not a valid name of a file"):
        inside(tmp_path, name)


def test_a_link_inside_the_directory_is_followed_and_one_out_of_it_is_not(tmp_path: Path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "in").symlink_to("file")
    (tmp_path / "d" / "out").symlink_to(tmp_path / "file")
    assert inside(tmp_path / "d", "in") == tmp_path / "d" / "in"
    with pytest.raises(ValueError, match="is a link to a file outside"):
        inside(tmp_path / "d", "out")
    assert inside(tmp_path / "d", "out", links=True) == tmp_path / "d" / "out"


def test_a_file_is_replaced_and_the_target_of_a_link_is_not(tmp_path: Path):
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link").symlink_to("target")
    with pytest.raises(OSError, match="symbolic links"):
        open_to_append(tmp_path / "link")
    replace_file(tmp_path / "link", "new")
    assert (tmp_path / "link").read_text() == "new" and not (tmp_path / "link").is_symlink()
    assert (tmp_path / "target").read_text() == "precious"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["link", "target"]


@pytest.mark.parametrize("kind", ["link", "file", "foreign"])
def test_what_is_in_the_way_of_a_temporary_directory_stays(tmp_path: Path, kind: str):
    model, (optimizer,) = trained()
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "model.safetensors").write_text("precious")
    way = tmp_path / "run" / ".writing-exported"
    way.parent.mkdir()
    if kind == "link":
        way.symlink_to(precious)
    elif kind == "file":
        way.write_text("precious")
    else:
        way.mkdir()
        (way / "thesis.tex").write_text("precious")
    with pytest.raises(FileExistsError, match="cannot be used"):
        model.save_pretrained(tmp_path / "run" / "exported", ByteTokenizer())
    assert (precious / "model.safetensors").read_text() == "precious"
    assert kind != "foreign" or (way / "thesis.tex").read_text() == "precious"
    checkpoint.save(tmp_path / "run", 3, model, [optimizer], ByteTokenizer(), CONFIG.as_dict(), {})


def test_a_directory_that_another_process_has_just_written_is_not_emptied(tmp_path: Path, monkeypatch):
    import re

    own = re.compile("a")

    def publish_first(descriptor: int, directory: Path) -> None:
        (tmp_path / ".writing-d" / "a").write_text("precious")
        (tmp_path / ".writing-d").rename(directory)

    monkeypatch.setattr("fastgpt.atomic_io.lock", publish_first)
    with pytest.raises(FileExistsError, match="has just written"):
        AtomicDirectory(tmp_path / "d", own)
    assert (tmp_path / "d" / "a").read_text() == "precious"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train two steps, on a text beside the run."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "text").write_text("some text of a line\n" * 200)
    options = "--n-layer=1 --n-head=1 --n-embd=8 --block-size=8 --batch-size=2 --max-steps=2 --eval-batches=1"
    arguments = [*options.split(), "--sample-tokens=4", "--device=cpu", "--warmup-steps=1"]
    assert main(["train", f"--data={folder / 'text'}", f"--out={folder / 'run'}", *arguments]) == 0
    return folder


@pytest.mark.parametrize(
    "name", ["config.toml", "environment.json", "log.jsonl", "loss.png", "sample.txt", ".lock"]
)
def test_a_link_in_a_run_directory_is_not_written_through(run: Path, tmp_path: Path, name: str):
    shutil.copytree(run, tmp_path / "copy")
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = tmp_path / "copy" / "run" / name
    link.unlink(missing_ok=True)
    link.symlink_to(victim)
    main(
        ["train", "--resume", f"--out={tmp_path / 'copy' / 'run'}", f"--data={run / 'text'}", "--max-steps=3"]
    )
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("log", ["5\n", '{"step": "x"}\n', "[]\n"])
def test_a_log_that_is_none_is_refused(run: Path, tmp_path: Path, log: str, capsys: pytest.CaptureFixture):
    shutil.copytree(run, tmp_path / "copy")
    (tmp_path / "copy" / "run" / "log.jsonl").write_text(log)
    assert main(["train", "--resume", f"--out={tmp_path / 'copy' / 'run'}", "--max-steps=3"]) == 2
    assert "log.jsonl is not the log of a run" in capsys.readouterr().err


def test_data_that_only_a_checkpoint_names_are_those_it_was_trained_on(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture
):
    shutil.copytree(run / "run", tmp_path / "run")
    secret = tmp_path / "secret"
    secret.write_text("a secret of this machine\n" * 100)
    (path,) = (tmp_path / "run").glob("step-*")
    train = json.loads((path / "state.json").read_text())["train"]
    rewrite(path, {"train": train | {"data": str(secret)}})
    resume = ["train", "--resume", f"--out={tmp_path / 'run'}", "--max-steps=3"]
    assert main(resume) == 2
    assert f"was not trained on the text that {secret} holds now" in capsys.readouterr().err
    assert main([*resume, f"--data={secret}"]) == 2


@pytest.mark.parametrize(
    "extra",
    [{}, *({"validation": odd, "scaler": {}} for odd in (5, {"step": "x"}, {"steps": 1}, {"loss": [1]}))],
    ids=str,
)
def test_the_state_of_a_run_has_its_types(
    run: Path, tmp_path: Path, extra: dict, capsys: pytest.CaptureFixture
):
    shutil.copytree(run / "run", tmp_path / "run")
    (path,) = (tmp_path / "run").glob("step-*")
    digest = json.loads((path / "state.json").read_text())["extra"]["data"]
    rewrite(path, {"extra": extra | {"data": digest}})
    assert main(["train", "--resume", f"--out={tmp_path / 'run'}", "--max-steps=3"]) == 2
    assert "is not that of a run" in capsys.readouterr().err
