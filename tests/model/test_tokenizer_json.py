"""Untrusted tokenizer.json files: published ones work, others raise one ValueError and never hang."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Engine

from fastgpt.cli import main
from fastgpt.tokenizer import BPETokenizer, load_tokenizer
from fastgpt.tokenizer_json import _REGEXES, MOST_TOKENS, guarded

TEXT = "The naïve fox's 12345 steps — 漢字 🎉\n\n\tDON'T  stop\r\n" * 3
LLAMA3 = next(r for r in _REGEXES if r.startswith("(?i:'s|") and r"]?\p{L}+|\p{N}{1,3}" in r)
BASE: dict[str, Any] = {
    **{"version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None},
    **{"pre_tokenizer": None, "post_processor": None, "decoder": None},
    "model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0, "[UNK]": 1}, "unk_token": "[UNK]"},
}


def learned(engine: Engine, trainer: Any) -> Engine:
    engine.train_from_iterator([TEXT], trainer)
    return engine


def gpt2() -> Engine:
    engine = Engine(models.BPE())
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return learned(engine, trainers.BpeTrainer(initial_alphabet=alphabet, special_tokens=["<|endoftext|>"]))


def bert() -> Engine:
    engine = Engine(models.WordPiece(unk_token="[UNK]"))
    engine.normalizer, engine.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    engine = learned(engine, trainers.WordPieceTrainer(special_tokens=["[UNK]", "[CLS]", "[SEP]"]))
    engine.post_processor = processors.TemplateProcessing(
        "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1", [("[CLS]", 1), ("[SEP]", 2)]
    )
    return engine


def llama2() -> Engine:
    engine = Engine(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    engine.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    engine.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return learned(
        engine, trainers.BpeTrainer(special_tokens=["<unk>", *(f"<0x{i:02X}>" for i in range(256))])
    )


def llama3() -> Engine:
    engine = gpt2()
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(LLAMA3), "isolated"), pre_tokenizers.ByteLevel(use_regex=False)]
    )
    engine.add_special_tokens([AddedToken("<|begin_of_text|>", special=True)])
    begin = ("<|begin_of_text|>", engine.token_to_id("<|begin_of_text|>"))
    template = processors.TemplateProcessing("<|begin_of_text|> $A", special_tokens=[begin])
    engine.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return engine


def t5() -> Engine:
    engine = Engine(models.Unigram())
    engine.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), "▁")]
    )
    engine.pre_tokenizer, engine.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    return learned(engine, trainers.UnigramTrainer(special_tokens=["<unk>", "</s>"], unk_token="<unk>"))


@pytest.mark.parametrize("make", [gpt2, bert, llama2, llama3, t5])
@pytest.mark.parametrize("old", [False, True], ids=["new", "without a type"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tokenizers_as_they_are_published_work_as_before(make: Any, old: bool):
    engine = make()
    value = json.loads(engine.to_str())
    if old:  # the format of 2020
        del value["model"]["type"]
    ours = BPETokenizer(json.dumps(value))
    for text in (TEXT, "", " a", "x" * 5000):
        expected = engine.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == expected
        assert ours.decode(ours.encode(text)) == engine.decode(expected, skip_special_tokens=False)
    assert BPETokenizer(ours.serialized()).serialized() == ours.serialized()


@pytest.mark.parametrize("name", ["GPT2", "Qwen2", "Llama", "CLIP", "Gemma", "Bert"])
def test_tokenizers_of_transformers_are_accepted(name: str):
    import transformers

    BPETokenizer(getattr(transformers, f"{name}Tokenizer")().backend_tokenizer.to_str())


def split(pattern: str) -> dict[str, Any]:
    kind = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return {"pre_tokenizer": kind}


def replace(pattern: Any, content: Any) -> dict[str, Any]:
    return {"type": "Replace", "pattern": pattern, "content": content}


def sequence(*steps: Any) -> dict[str, Any]:
    return {"type": "Sequence", "normalizers": list(steps)}


def charsmap(texts: bytes) -> dict[str, Any]:
    raw = (4).to_bytes(4, "little") + bytes(4) + texts
    return {"type": "Precompiled", "precompiled_charsmap": base64.b64encode(raw).decode()}


def template(*single: Any) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": list(single), "pair": [], "special_tokens": {}}


GROW = replace({"String": "a"}, "a" * 32)
A = {"Sequence": {"id": "A", "type_id": 0}}
BROKEN = {
    "regex that backtracks": split("(a|a|a|b?a)+$"),
    "regex in quadratic time": split(r"\p{L}*1"),
    "reference": split(r"(a)\1"),
    "bounded repetition": split("a{1,1000000}"),
    "sequence of growth": {"normalizer": sequence(*[GROW] * 7)},
    "nested growth": {"normalizer": sequence(GROW, sequence(sequence(GROW)))},
    "growth in the decoder": {"decoder": {"type": "Sequence", "decoders": [GROW] * 2}},
    "growth by a character class": {"normalizer": sequence(replace({"Regex": "[a-z]"}, "a" * 60), GROW)},
    "empty pattern": {"normalizer": replace({"String": ""}, "a")},
    "two patterns": {"normalizer": replace({"String": "a", "Regex": "(a+)+$"}, "a")},
    "long prefix": {"normalizer": {"type": "Prepend", "prepend": "a" * 10**5}},
    "many steps": {"normalizer": sequence(*[{"type": "Lowercase"}] * 1000)},
    "unknown step": {"normalizer": {"type": "Exec"}},
    "step of an object's type": {"normalizer": {"type": {}}},
    "model of a list's type": {"model": {"type": []}},
    "step without a type": {"normalizer": {"lowercase": True}},
    "step that is a text": {"normalizer": "Lowercase"},
    "unknown pre-tokenizer": {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
    "unknown decoder": {"decoder": {"type": "CTC", "pad_token": "", "word_delimiter_token": ""}},
    "unknown post-processor": {"post_processor": {"type": "Mystery"}},
    "sequence of nothing": {"normalizer": {"type": "Sequence", "normalizers": None}},
    "strip of 2^64 characters": {
        "decoder": {"type": "Strip", "content": "a", "start": 0, "stop": (1 << 64) - 1}
    },
    "merge without its prefix": {
        "model": {
            **{"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2}, "merges": ["a b"]},
            "continuing_subword_prefix": "##########",
        }
    },
    "merge to no token": {
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": [["a", "b"]]},
    },
    "merge of three": {"model": {"type": "BPE", "vocab": {"a": 0, "aa": 1}, "merges": ["a a a"]}},
    "template that repeats": {"post_processor": template(*[A] * 20)},
    "template that is a number": {"post_processor": template() | {"single": 5}},
    "charsmap": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////wAAAAA="}},
    "charsmap of long texts": {"normalizer": charsmap(b"a" * 10**6 + b"\0")},
    "charsmap that is a number": {"normalizer": {"type": "Precompiled", "precompiled_charsmap": 5}},
    "long words": {"model": {"type": "WordPiece", "max_input_chars_per_word": 10**9, "vocab": {"a": 0}}},
    "long marks of words": {
        "model": {"type": "BPE", "vocab": {}, "merges": [], "end_of_word_suffix": "a" * 10**6}
    },
    "id 4*10^9": {"model": BASE["model"] | {"vocab": {"<|endoftext|>": 0, "[UNK]": 4_000_000_000}}},
    "id 2^31": {"model": BASE["model"] | {"vocab": {"<|endoftext|>": 0, "[UNK]": 1 << 31}}},
    "id 10^5 of 2 words": {"model": BASE["model"] | {"vocab": {"<|endoftext|>": 0, "[UNK]": 100_000}}},
    "id below 0": {"model": BASE["model"] | {"vocab": {"<|endoftext|>": 0, "[UNK]": -1}}},
    "model of another kind": {"model": {"type": "Neural", "vocab": {}}},
    "model that is a list": {"model": []},
    "words with no id": {"model": BASE["model"] | {"vocab": {"<|endoftext|>": None}}},
    "no unknown word": {"model": {"type": "WordLevel", "vocab": {"<|endoftext|>": 0}, "unk_token": "[UNK]"}},
    "no unknown piece": {
        "model": {"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0.0]], "byte_fallback": False}
    },
    "wrong type": {"added_tokens": 5},
    "infinite": {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["</s>", float("inf")]]}},
}


@pytest.mark.parametrize("change", BROKEN.values(), ids=BROKEN)
def test_others_end_in_one_message(
    tmp_path: Path, change: dict[str, Any], capfd: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "t.txt").write_text("a" * 40 + "c\n" + "b word\n" * 3)
    (tmp_path / "tokenizer.json").write_text(json.dumps(BASE | change))
    out = ["--out", str(tmp_path / "set"), "--tokenizer", str(tmp_path), "--repetition", "keep"]
    assert main(["data", str(tmp_path / "t.txt"), *out]) == 2
    error = capfd.readouterr().err
    assert (
        error.startswith("fastgpt: error: ") and error.count("\n") == 1
    )  # nor does the package print anything
    assert not (tmp_path / "set").exists()


def test_what_is_checked_is_what_is_read():
    """The last of two equal keys counts, in Python and in the package."""
    safe, bomb = '"normalizer": null', f'"normalizer": {json.dumps(sequence(*[GROW] * 7))}'
    text = json.dumps(BASE | {"pre_tokenizer": {"type": "Whitespace"}})
    BPETokenizer(text.replace(safe, f"{bomb}, {safe}")).encode("a" * 40)
    with pytest.raises(ValueError, match="lengthen a text"):
        BPETokenizer(text.replace(safe, f"{safe}, {bomb}"))


def test_a_fault_of_the_package_is_a_value_error_and_a_signal_is_none():
    broken = json.dumps(BASE | BROKEN["charsmap"])
    with pytest.raises(BaseException, match="charsmap") as found:
        Engine.from_str(broken)
    assert not isinstance(found.value, Exception)
    with pytest.raises(ValueError, match="charsmap"):
        guarded(Engine.from_str, broken)

    def fails(error: BaseException) -> None:
        raise error

    for error in (KeyboardInterrupt(), SystemExit(3), MemoryError()):
        with pytest.raises(type(error)):
            guarded(fails, error)
    with pytest.raises(ValueError, match=r"^first second$"):
        guarded(fails, Exception("first\nsecond"))


def test_bpe_learns_no_more_than_the_text_has():
    tokenizer = BPETokenizer.train(["ab ab abc"], MOST_TOKENS)
    assert tokenizer.serialized() == BPETokenizer.train(["ab ab abc"], 257 + 9).serialized()
    assert 257 < tokenizer.vocab_size < 257 + 9
    with pytest.raises(ValueError, match=r"vocab_size must be at most 16,777,216, not 1,000,000,000,000"):
        BPETokenizer.train(["ab"], 10**12)


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "vocab.txt", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "content", [b"", b"[" * 100_000, b"\xff\xfe", b"5", b'{"a": [1]}', b'{"a": -1, "b": 1e99}']
)
def test_malformed_files_end_in_one_value_error(tmp_path: Path, name: str, content: bytes):
    beside = {"vocab.json": "merges.txt", "tokenizer_config.json": "vocab.txt"}.get(name)
    if beside:
        (tmp_path / beside).write_text("")
    (tmp_path / name).write_bytes(content)
    try:
        load_tokenizer(tmp_path).encode("a")
    except ValueError as error:
        assert str(tmp_path) in str(error) or "cannot encode" in str(error)
        assert "\n" not in str(error)
    else:  # any words are accepted
        assert name in ("vocab.txt", "tokenizer_config.json")
