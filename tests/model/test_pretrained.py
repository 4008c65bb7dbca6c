"""GPT-2 checkpoints: transformers reads ours with equal logits, and all of its layouts are read."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fastgpt.checkpoints.gpt2_layout import GPT2_SIZES
from fastgpt.checkpoints.load import open_model
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.text import generate_texts
from fastgpt.gpt_config import ACTIVATIONS, GATED
from fastgpt.model import GPT
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer, load_tokenizer
from tests.model.test_model import TINY, hugging_face_gpt2, lively, tokens

TEXT = "def größer(x):\n    return 'Ā€ 漢字 🙂'  # <|endoftext|>\n" * 20


def theirs(directory: Path):
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers, which is not installed"
    )
    return transformers.GPT2LMHeadModel.from_pretrained(directory).eval()


@pytest.mark.parametrize("position", ["learned", "sinusoidal"])
@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name not in GATED])
@pytest.mark.parametrize(("bias", "tied"), list(itertools.product([True, False], repeat=2)))
def test_transformers_loads_what_we_write_with_equal_logits(
    tmp_path: Path, position: str, activation: str, bias: bool, tied: bool
):
    options = {"position": position, "activation": activation, "bias": bias, "tie_head": tied}
    ours = lively(layer_norm_eps=1e-3, dropout=0.25, **options).eval()
    ours.save_pretrained(tmp_path / "model")
    loaded = theirs(tmp_path / "model")
    idx = tokens(3, 24)
    torch.testing.assert_close(loaded(idx).logits, ours(idx)[0], rtol=1e-4, atol=1e-4)
    assert (loaded.lm_head.weight is loaded.transformer.wte.weight) is (tied and position == "learned")
    assert loaded.config.resid_pdrop == loaded.config.attn_pdrop == loaded.config.embd_pdrop == 0.25

    again = GPT.from_pretrained(tmp_path / "model", dropout=0.25)
    assert torch.equal(again(idx)[0], ours(idx)[0])
    if position == "learned" and bias:
        assert again.config == ours.config
        assert all(torch.equal(a, b) for a, b in zip(again.parameters(), ours.parameters(), strict=True))


def test_reduced_precision_is_kept(tmp_path: Path):
    lively().bfloat16().save_pretrained(tmp_path / "model")
    assert {t.dtype for t in load_file(tmp_path / "model" / "model.safetensors").values()} == {torch.bfloat16}


def test_rotary_positions_have_no_place_in_gpt2(tmp_path: Path):
    with pytest.raises(ValueError, match="GPT-2 does not support rotary positions"):
        lively(position="rotary").save_pretrained(tmp_path / "model")
    assert not list(tmp_path.iterdir())


# ---- layouts ---------------------------------------------------------------------------------------


def rewritten(directory: Path, layout: str) -> None:
    """Rewrite a checkpoint in another layout that is used on the Hub."""
    file = directory / "model.safetensors"
    weights = load_file(file)
    if "bare" in layout:  # openai-community/gpt2: no prefix, and the causal masks
        weights = {name.removeprefix("transformer."): t for name, t in weights.items()}
        weights |= {f"h.{i}.attn.bias": torch.ones(1, 1, 24, 24).tril() for i in range(2)}
        weights |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    if "head" in layout:
        weights["lm_head.weight"] = weights.get("wte.weight", weights.get("transformer.wte.weight")).clone()
    file.unlink()
    names, extension = sorted(weights), "bin" if "bin" in layout else "safetensors"
    stem = {"bin": "pytorch_model", "safetensors": "model"}[extension]
    parts = [names[:9], names[9:]] if "sharded" in layout else [names]
    files = [
        f"{stem}{f'-0000{i + 1}-of-00002' if len(parts) > 1 else ''}.{extension}" for i in range(len(parts))
    ]
    for name, part in zip(files, parts, strict=True):
        (torch.save if extension == "bin" else save_file)({n: weights[n] for n in part}, directory / name)
    if len(parts) > 1:
        index = {"weight_map": {n: f for f, part in zip(files, parts, strict=True) for n in part}}
        (directory / f"{stem}.{extension}.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "layout",
    [
        "",
        "head",
        "bare",
        "bare head",
        "sharded",
        "bare sharded",
        "bin",
        "bare bin head",
        "sharded bin",
        "bare sharded bin",
    ],
)
def test_every_layout_reads_the_same(tmp_path: Path, layout: str):
    model = hugging_face_gpt2()
    model.save_pretrained(tmp_path)
    rewritten(tmp_path, layout)
    idx = tokens(2, 9)
    torch.testing.assert_close(GPT.from_pretrained(tmp_path)(idx)[0], model(idx).logits, rtol=1e-4, atol=1e-4)


def test_safetensors_come_before_pickles(tmp_path: Path):
    hugging_face_gpt2().save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"never read")
    GPT.from_pretrained(tmp_path)


class Planted:
    """Object whose unpickling runs code."""

    def __reduce__(self):
        return (Path.touch, (Path("planted"),))


def test_a_bad_pickle_is_named_and_runs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    hugging_face_gpt2().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    file = tmp_path / "pytorch_model.bin"
    torch.save({"wte.weight": Planted()}, file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is not a complete file of PyTorch tensors"):
        GPT.from_pretrained(tmp_path)
    assert not (tmp_path / "planted").exists()
    for content in (b"", b"\x80", b"nonsense"):
        file.write_bytes(content)
        with pytest.raises(ValueError, match="is not a complete file of PyTorch tensors"):
            GPT.from_pretrained(tmp_path)
    for value in ([1], {"a": 1}):
        torch.save(value, file)
        with pytest.raises(ValueError, match="something other than named tensors"):
            GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="not the index of a sharded checkpoint"):
        GPT.from_pretrained(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(FileNotFoundError, match=r"lacks gone\.safetensors"):
        GPT.from_pretrained(tmp_path)


def test_the_sizes_of_gpt2_are_the_published_ones():
    found = {}
    for name, config in GPT2_SIZES.items():
        with torch.device("meta"):
            found[name] = GPT(config).num_parameters()
    assert found == {
        "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    }  # fmt: skip


# ---- directories -----------------------------------------------------------------------------------


def test_a_directory_is_whole_or_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model, out = lively(), tmp_path / "deep" / "model"

    def full(*arguments, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fastgpt.checkpoints.tensor_files.save_file", full)
        with pytest.raises(
            OSError, match=r"could not be written \(No space left on device\); no partial files remain"
        ):
            model.save_pretrained(out)
    assert not list(out.parent.iterdir())
    (out.parent / ".writing-model").mkdir()  # left by a killed save
    (out.parent / ".writing-model" / "config.json").write_text("{")
    out.mkdir()  # an empty directory may be replaced
    model.save_pretrained(out)
    assert [p.name for p in out.parent.iterdir()] == ["model"]
    with pytest.raises(FileExistsError, match="already exists; remove it"):
        model.save_pretrained(out)
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="already exists"):
        model.save_pretrained(tmp_path / "file")
    with pytest.raises(OSError):
        model.save_pretrained(tmp_path / "file" / "model")


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_transformers_reads_the_tokenizer_too(tmp_path: Path, kind: str):
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers, which is not installed"
    )
    tokenizer = ByteTokenizer() if kind == "bytes" else BPETokenizer.train([TEXT], 300)
    model = lively(vocab_size=tokenizer.vocab_size)
    model.save_pretrained(tmp_path / "model", tokenizer)
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    text = TEXT.replace("<|endoftext|>", "") + "\r\t\x7f\u00ad  ĀĠ"
    assert loaded(text)["input_ids"] == tokenizer.encode(text).tolist()
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert theirs(tmp_path / "model").config.eos_token_id == tokenizer.end_of_text
    if kind == "bpe":
        assert loaded.eos_token_id == tokenizer.end_of_text
    read, ours = open_model(tmp_path / "model")
    assert torch.equal(read(tokens(1, 9))[0], model.eval()(tokens(1, 9))[0])
    assert ours.encode(TEXT).tolist() == tokenizer.encode(TEXT).tolist()


@settings(max_examples=50, deadline=None)
@given(text=st.text())
def test_bytes_written_as_bpe_are_the_bytes(tmp_path_factory: pytest.TempPathFactory, text: str):
    directory = tmp_path_factory.mktemp("bytes")
    lively(vocab_size=256).save_pretrained(directory / "model", ByteTokenizer())
    read = BPETokenizer(
        (directory / "model" / "tokenizer.json").read_text("utf-8")
    )  # the way transformers reads it
    assert read.encode(text).tolist() == list(text.encode())
    assert read.decode(read.encode(text)) == text
    shutil.rmtree(directory)


@pytest.mark.parametrize(("token", "ends"), [(0, True), (ord("x"), False)])
def test_bytes_come_back_with_their_end_of_text(tmp_path: Path, token: int, ends: bool):
    """Use a model that always predicts the same token."""
    model = lively(vocab_size=256, tie_head=False)
    with torch.no_grad():
        model.ln_f.weight.zero_()
        model.lm_head.weight[token] = 9 * model.ln_f.bias
    model.save_pretrained(tmp_path / "model", ByteTokenizer())
    read, tokenizer = open_model(tmp_path / "model")
    assert isinstance(tokenizer, ByteTokenizer) and tokenizer.end_of_text == 0
    read.save_pretrained(tmp_path / "again", tokenizer)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "model" / name).read_bytes()
    (text,) = generate_texts(tmp_path / "again", ["ab"], 5, Sampling(temperature=0))
    assert text.continuation == ("" if ends else "xxxxx")
    written = theirs(tmp_path / "again").generate(torch.tensor([[97, 98]]), max_new_tokens=5, do_sample=False)
    assert written[0].tolist() == [97, 98, *[token] * (1 if ends else 5)]


def test_bytes_are_known_again_when_transformers_has_written_them(tmp_path: Path):
    transformers = pytest.importorskip(
        "transformers", reason="compares with transformers, which is not installed"
    )
    lively(vocab_size=256).save_pretrained(tmp_path / "model", ByteTokenizer())
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    loaded.save_pretrained(tmp_path / "theirs")
    assert isinstance(load_tokenizer(tmp_path / "theirs"), ByteTokenizer)
    loaded.add_tokens(["def"])  # the vocabulary has more than bytes
    loaded.save_pretrained(tmp_path / "more")
    more = load_tokenizer(tmp_path / "more")
    assert isinstance(more, BPETokenizer) and more.encode("def").tolist() == [256]


def test_tokenizers_that_know_more_than_the_model_are_refused(tmp_path: Path):
    with pytest.raises(
        ValueError, match="the tokenizer has 256 tokens, and the model 61; call resize_token_embeddings first"
    ):
        lively().save_pretrained(tmp_path / "model", ByteTokenizer())
    lively().save_pretrained(tmp_path / "model")
    with pytest.raises(FileNotFoundError, match=r"tokenizer .* does not exist"):
        open_model(tmp_path / "model")
    BPETokenizer.train([TEXT], 300).save(tmp_path / "model")
    with pytest.raises(ValueError, match="has 300 tokens, and the model 61; use the tokenizer"):
        open_model(tmp_path / "model")


# ---- vocabulary ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("size", [61, 64, 100, 40])
def test_resizing_keeps_rows_and_gives_new_tokens_the_mean(tied: bool, size: int):
    model = lively(tie_head=tied).eval()
    idx, kept = tokens(2, 9) % 40, min(61, size)
    before, total = model(idx)[0], model.num_parameters()
    mean = before.mean(dim=-1)
    model.resize_token_embeddings(size, shrink=True)
    after = model(idx)[0]
    assert after.shape == (2, 9, size) and model.config.vocab_size == size
    torch.testing.assert_close(after[..., :kept], before[..., :kept])
    for new in range(61, size):
        torch.testing.assert_close(after[..., new], mean, rtol=1e-4, atol=1e-4)
    assert (model.lm_head.weight is model.wte.weight) is tied
    assert model.num_parameters() - total == (size - 61) * 32 * (1 if tied else 2)
    loss = model(idx, idx)[1]
    loss.backward()
    assert model.wte.weight.grad.shape == (size, 32)
    model.load_state_dict(GPT(model.config).state_dict())  # the configuration describes it


def test_resizing_refuses_to_lose_tokens_unasked():
    model = lively()
    with pytest.raises(ValueError, match="40 tokens are fewer than 61: to drop the last ones pass shrink"):
        model.resize_token_embeddings(40)
    with pytest.raises(ValueError, match="vocab_size must be at least 1, not 0"):
        model.resize_token_embeddings(0, shrink=True)
    assert model.config.vocab_size == TINY["vocab_size"] == len(model.wte.weight)
