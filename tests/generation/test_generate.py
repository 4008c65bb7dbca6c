"""Text generation: streamed pieces of complete characters add up to the text, which ends before a stop string."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.cli import main
from fastgpt.generation.sampling import Sampling
from fastgpt.generation.text import IncrementalDetokenizer, generate_texts, read_prompts
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer

pytestmark = pytest.mark.xdist_group("generate")  # its fixtures are created once

TEXT = "für 漢字 🙂🙂 == != for i in range(10):\n" * 30
TOKENIZERS = {"bytes": ByteTokenizer(), "bpe": BPETokenizer.train([TEXT], 330)}
texts = st.text(st.sampled_from("ab =\n\0é漢🙂\ufffd"), max_size=12)


def whole(tokenizer, prompt: list[int], tokens: list[int]) -> str:
    return tokenizer.decode(torch.tensor(prompt + tokens))[len(tokenizer.decode(torch.tensor(prompt))) :]


@settings(max_examples=200, deadline=None)
@given(kind=st.sampled_from(["bytes", "bpe"]), prompt=texts.filter(bool), text=texts, data=st.data())
def test_pieces_make_up_the_text_and_are_whole_characters(kind, prompt, text, data):
    tokenizer = TOKENIZERS[kind]
    start = tokenizer.encode(prompt).tolist()
    noise = st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=8)
    tokens = tokenizer.encode(text).tolist() + data.draw(noise)
    row = IncrementalDetokenizer(tokenizer, list(start))
    pieces = []
    for token in tokens:
        pieces.append(row.add(token))
        assert not pieces[-1].endswith("\ufffd")
    pieces.append(row.close())
    assert "".join(pieces) == row.text == whole(tokenizer, start, tokens)
    assert row.tokens == start + tokens


@settings(max_examples=200, deadline=None)
@given(
    kind=st.sampled_from(["bytes", "bpe"]),
    text=st.text(st.sampled_from("ab 漢🙂"), max_size=14),
    stop=st.lists(st.text(st.sampled_from("ab 漢🙂"), min_size=1, max_size=4), max_size=3),
)
def test_text_ends_before_the_first_stop_string_however_tokens_fall(kind, text, stop):
    tokenizer = TOKENIZERS[kind]
    row, pieces, read = IncrementalDetokenizer(tokenizer, [1], stop), [], 0
    for token in tokenizer.encode(text).tolist():
        pieces.append(row.add(token))
        read += 1
        if row.ended:
            break
    pieces.append(row.close())
    assert "".join(pieces) == row.text

    # The same without streaming: decode longer and longer prefixes, until one contains a stop string.
    ids = tokenizer.encode(text).tolist()
    for count in range(len(ids) + 1):
        so_far = tokenizer.decode(torch.tensor(ids[:count], dtype=torch.long))
        found = [so_far.find(s) for s in stop if s in so_far and not so_far.endswith("\ufffd")]
        if found:
            assert (row.text, read, row.ended) == (so_far[: min(found)], count, True)
            return
    assert (row.text, row.ended) == (text, False)


@settings(max_examples=50, deadline=None)
@given(
    noise=st.lists(
        st.sampled_from([0x41, 0x80, 0xC3, 0xE2, 0x82, 0xAC, 0xF0, 0xFF]), min_size=100, max_size=400
    ),
    often=st.sampled_from([b"\xff", b"\x82", b"\xe2\x82", b"\xef\xbf\xbd", b"\xf0\x9f\x98"]),
)
def test_tokens_that_never_make_a_character_are_decoded_in_linear_time(noise: list[int], often: bytes):
    """Each token is decoded a bounded number of times, in calls of bounded size."""
    tokenizer, decoded = ByteTokenizer(), []
    tokens = [*often * 100, *noise, *"€".encode(), *often * 50]
    spy = SimpleNamespace(decode=lambda ids: decoded.append(len(ids)) or tokenizer.decode(ids))
    row = IncrementalDetokenizer(spy, [65])
    pieces = [*map(row.add, tokens), row.close()]
    assert "".join(pieces) == row.text == whole(tokenizer, [65], tokens)
    assert max(decoded) <= 80


def test_what_may_become_a_stop_string_is_held_back():
    row = IncrementalDetokenizer(ByteTokenizer(), [10], ["\n\n", "end"])
    pieces = [row.add(token) for token in b"a\nb een\n"]
    assert pieces == ["a", "", "\nb", " ", "", "e", "", "en\n"[:2]]
    assert row.close() == "\n" and row.text == "a\nb een\n"
    with pytest.raises(ValueError, match="a stop string must not be empty"):
        IncrementalDetokenizer(ByteTokenizer(), [10], ["x", ""])


# ---- from a checkpoint -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save an untrained model with large weights, so that its output varies everywhere."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=330, block_size=32, n_layer=2, n_head=2, n_embd=32))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.2 if parameter.dim() == 2 else 0.1))
    directory = tmp_path_factory.mktemp("model") / "model"
    model.save_pretrained(directory, TOKENIZERS["bpe"])
    return str(directory)


def run(arguments: list[str], capsys: pytest.CaptureFixture) -> str:
    assert main(["generate", *arguments]) == 0
    return capsys.readouterr().out


PROMPTS = [
    "für 漢字",
    "a",
    "for i in range(10): for i in range(10): for i in range(10): for i in range(10): 🙂",
]


def test_text_i_of_a_run_is_what_it_is_alone_with_seed_plus_i(checkpoint: str, tmp_path: Path, capsys):
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join(PROMPTS) + "\n")
    common = ["--checkpoint", checkpoint, "--max-new-tokens", "20", "--temperature", "0.9"]
    several = ["--prompts", str(file), "--num-samples", "2", "--seed", "5", "--json"]
    lines = [json.loads(line) for line in run([*common, *several], capsys).splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [(p, s) for p in PROMPTS for s in (1, 2)]
    in_parts = run([*common, *several, "--batch-size", "4"], capsys)
    assert [json.loads(line) for line in in_parts.splitlines()] == lines
    for i, line in enumerate(lines):
        alone = run([*common, "--prompt", line["prompt"], "--seed", str(5 + i)], capsys)
        assert alone == line["prompt"] + line["continuation"] + "\n"
    assert len({line["continuation"] for line in lines}) == 6
    plain = run([*common, *several[:-1]], capsys)
    assert plain.startswith(
        f"--- prompt 1, sample 1 ---\n{PROMPTS[0]}{lines[0]['continuation']}\n--- prompt 1, sample 2"
    )


def test_streaming_prints_what_not_streaming_prints(checkpoint: str, monkeypatch, capsys):
    common = ["--checkpoint", checkpoint, "--prompt", "für", "--max-new-tokens", "40", "--seed", "1"]
    printed = []
    monkeypatch.setattr("builtins.print", lambda *a, end="\n", **k: printed.append("".join(a) + end))
    assert main(["generate", *common]) == 0
    monkeypatch.undo()
    assert len(printed) > 10
    as_json = json.loads(run([*common, "--json"], capsys))
    assert "".join(printed) == "für" + as_json["continuation"] + "\n"


def test_stop_strings_and_the_end_of_text_end_a_text(checkpoint: str, capsys):
    common = ["--checkpoint", checkpoint, "--prompt", "für", "--max-new-tokens", "60", "--seed", "2"]
    free = run(common, capsys).removesuffix("\n")
    stop = free[20:23]
    first = free.index(stop, 3)
    assert run([*common, "--stop", "nowhere", "--stop", stop], capsys) == free[:first] + "\n"
    tokenizer = TOKENIZERS["bpe"]
    many = generate_texts(
        checkpoint, ["a"], 24, Sampling(temperature=50.0), num_samples=64, batch_size=64, seed=0
    )
    always = list(many)
    ended = [t for t in always if len(tokenizer.encode(t.continuation)) < 20]
    assert ended and not any("<|endoftext|>" in t.text for t in always)  # 1 of 330 tokens ends a text


def test_nothing_to_add_prints_the_prompt(checkpoint: str, capsys):
    assert run(["--checkpoint", checkpoint, "--prompt", "für", "--max-new-tokens", "0"], capsys) == "für\n"


def test_prompts_are_the_lines_of_a_file(tmp_path: Path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("a\r\n b \nc\u2028d".encode())
    assert read_prompts(file) == ["a", " b ", "c\u2028d"]
    for text, message in [
        ("a\n\nb", "line 2 of .* is empty"),
        ("", "is empty"),
        ("a\0", "is not UTF-8 text"),
    ]:
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            read_prompts(file)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-samples", "0"], "num_samples must be at least 1, not 0"),
        (["--batch-size", "0"], "batch_size must be at least 1, not 0"),
        (["--stop", ""], "a stop string must not be empty"),
        (["--repetition-penalty", "0"], "repetition_penalty must be from 1.2e-38"),
        (["--seed", "-1"], "seed must not be negative"),
        (["--prompts", "nowhere.txt"], "file or directory nowhere.txt does not exist"),
        (["--prompt", ""], "the prompt is empty"),
        (["--prompt", "\udc80"], "which is not a character"),
        (["--max-new-tokens", "-1"], "max_new_tokens must not be negative"),
    ],
)
def test_impossible_options_are_one_sentence(arguments, message, checkpoint: str, capsys):
    assert main(["generate", "--checkpoint", checkpoint, *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and message in said.err and said.err.count("\n") == 1
