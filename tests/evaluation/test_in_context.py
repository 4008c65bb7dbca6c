"""In-context measurements: perfect induction scores 1, chance scores chance, and the validation data do not leak."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.cli import main
from fastgpt.data import SHORTEST, Repeats
from fastgpt.evaluation import bootstrap
from fastgpt.evaluation.in_context import (
    FUNCTIONS,
    alphabet,
    induction,
    k_shot,
    loss_by_position,
    measure,
)
from fastgpt.model import GPT, GPTConfig
from fastgpt.tokenizer import BPETokenizer, ByteTokenizer

ROOT = Path(__file__).parents[2]
TOKENS = alphabet(ByteTokenizer(), 256)


class Copying(torch.nn.Module):
    """Perfect induction head: predicts the token after the previous occurrence, and token 0 for a new one."""

    def __init__(self) -> None:
        super().__init__()
        self.config = GPTConfig(vocab_size=256, block_size=64, n_layer=1, n_head=1, n_embd=8)
        self.wte = torch.nn.Embedding(1, 1)

    def forward(self, idx: torch.Tensor) -> tuple[torch.Tensor, None]:
        logits = torch.zeros(*idx.shape, 256)
        logits[..., 0] = 0.5
        for row, tokens in enumerate(idx.tolist()):
            for i, token in enumerate(tokens):
                before = [j for j in range(i) if tokens[j] == token]
                if before:
                    logits[row, i, tokens[before[-1] + 1]] = 1.0
        return logits, None


def test_a_perfect_induction_head_scores_1_and_nothing_in_the_first_pass():
    for length in (2, 4, 32):
        score = induction(Copying(), TOKENS, length, sequences=8)
        assert (score.second.value, score.second.low, score.second.high) == (1, 1, 1)
        assert score.first.value <= 1 / (length - 1)  # the constant guess for a new token may be correct


def test_a_perfect_induction_head_looks_functions_up():
    for k in (1, 4, 16):
        assert (
            k_shot(Copying(), TOKENS, "lookup", k, sequences=32).value > 0.9
        )  # an output may equal an input
    assert k_shot(Copying(), TOKENS, "shift", 8, sequences=64).value < 0.2


def test_an_untrained_model_scores_chance():
    torch.manual_seed(0)
    model = GPT(
        GPTConfig(vocab_size=256, block_size=64, n_layer=2, n_head=2, n_embd=32, tie_head=False)
    ).eval()
    found = measure(model, TOKENS)
    assert found.chance == 1 / len(TOKENS)
    assert [item.length for item in found.induction] == [4, 8, 16, 32]
    estimates = [item.second for item in found.induction] + [item.accuracy for item in found.shots]
    assert all(item.low <= item.value <= item.high for item in estimates)
    assert max(item.value for item in estimates) < 0.1
    assert {item.functions for item in found.shots} == set(FUNCTIONS)
    assert [item.shots for item in found.shots if item.functions == "shift"] == [0, 1, 2, 4, 8, 16]


def test_measurements_are_repeatable_and_leave_the_generators_alone():
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=256, block_size=16, n_layer=1, n_head=1, n_embd=16)).eval()
    state = torch.get_rng_state()
    assert measure(model, TOKENS, sequences=16) == measure(model, TOKENS, sequences=16)
    assert measure(model, TOKENS, sequences=16) != measure(model, TOKENS, sequences=16, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


@given(st.integers(0, 40), st.integers(1, 60))
@settings(max_examples=20, deadline=None)
def test_intervals_are_of_the_right_width(ones: int, zeros: int):
    found = bootstrap.mean([1.0] * ones + [0.0] * zeros)
    n, p = ones + zeros, ones / (ones + zeros)
    assert found.value == pytest.approx(p)
    assert found.low <= found.value <= found.high
    expected = min(1.0, 2 * 1.96 * (p * (1 - p) / n) ** 0.5)  # an interval of fractions has at most width 1
    assert found.high - found.low == pytest.approx(expected, abs=0.5 / n**0.5)


@pytest.mark.parametrize("length", [17, 40, 16 * 5 + 1, 4000])
def test_windows_of_a_text_do_not_overlap(length: int, monkeypatch: pytest.MonkeyPatch):
    model = GPT(GPTConfig(vocab_size=5000, block_size=16, n_layer=1, n_head=1, n_embd=8)).eval()
    seen: list[torch.Tensor] = []
    forward = GPT.forward
    monkeypatch.setattr(
        GPT, "forward", lambda self, idx, *a, **k: [seen.append(idx), forward(self, idx, *a, **k)][1]
    )
    found = loss_by_position(model, torch.arange(length), windows=64)
    places = torch.cat(seen).flatten().tolist()
    assert len(places) == len(set(places))
    assert 16 * (64 if length == 4000 else 1) <= len(places) <= length - 1
    assert found[-1].last == 16
    with pytest.raises(ValueError, match="too few for a block"):
        loss_by_position(model, torch.arange(16))


def test_the_alphabet_has_words_alone():
    assert bytes(TOKENS.tolist()).decode() == "".join(map(chr, range(33, 127)))
    bpe = BPETokenizer.train(["the cat and the dog " * 50], 280)
    tokens = alphabet(bpe, bpe.vocab_size).tolist()
    assert bpe.end_of_text not in tokens
    assert all(bpe.decode(torch.tensor([token])).strip() for token in tokens)


@given(number=st.integers(0, 1000), block_size=st.integers(8, 70))
@settings(max_examples=50, deadline=None)
def test_a_repeated_word_counts_where_its_context_tells(number: int, block_size: int):
    source = Repeats(TOKENS, batch_size=4, block_size=block_size)
    batch = source.batch(number)
    for idx, targets in zip(batch.idx.tolist(), batch.targets.tolist(), strict=True):
        text = [*idx, targets[-1]]
        length = next((n for n in range(1, len(text)) if text[n] == text[0]), len(text))
        assert SHORTEST <= length <= block_size // 2 and len(set(text[:length])) == length
        assert all(text[i] == text[i - length] for i in range(length, len(text)))
        assert targets == [-100 if i < length else text[i + 1] for i in range(len(idx))]
    again = Repeats(TOKENS, batch_size=4, block_size=block_size).batch(number, slice(1, None, 2))
    assert torch.equal(again.idx, batch.idx[1::2]) and torch.equal(again.targets, batch.targets[1::2])


def test_validation_words_are_others_than_those_of_training():
    source = Repeats(TOKENS, batch_size=32, block_size=64)
    train = torch.cat([source.batch(i).idx for i in range(20)])
    val = torch.cat([batch.idx for batch in source.validation_batches(20)])
    assert not (train[:, None, :8] == val[None, :, :8]).all(-1).any()


def test_an_alphabet_or_a_block_that_is_too_small_is_refused():
    with pytest.raises(ValueError, match="distinct tokens and a block_size"):
        Repeats(TOKENS[:3], batch_size=1, block_size=64)
    with pytest.raises(ValueError, match="a block_size of 8, not 94 and 7"):
        Repeats(TOKENS, batch_size=1, block_size=7)
    model = GPT(GPTConfig(vocab_size=256, block_size=16, n_layer=1, n_head=1, n_embd=8)).eval()
    with pytest.raises(ValueError, match="alphabet of at least 16 tokens"):
        measure(model, TOKENS[:15])


def draw(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "examples" / "induction_curves.py", *arguments]
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)


def test_the_command_measures_draws_and_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = ["--n-layer=1", "--n-head=2", "--n-embd=16", "--block-size=32", "--batch-size=4", "--max-steps=2"]
    out = str(tmp_path / "run")
    rest = ["--warmup-steps=1", "--sample-tokens=0", "--eval-batches=1", "--dtype=float32", "--eval-every=1"]
    assert main(["train", "--data=repeats", f"--out={out}", *run, *rest]) == 0
    printed = capsys.readouterr().out
    assert (
        "data: repeats; random words of 4 to 16 of 94 tokens" in printed and "step 2: induction 0." in printed
    )
    picture = tmp_path / "panels.png"
    arguments = ["eval", "--checkpoint", out, "--in-context", "--data", str(ROOT / "README.md")]
    assert main([*arguments, "--plot", str(picture), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [item["length"] for item in found["induction"]] == [4, 8, 16]
    assert [(p["first"], p["last"]) for p in found["positions"]] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (5, 8),
        (9, 16),
        (17, 32),
    ]
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert main(arguments[:4]) == 0
    table = capsys.readouterr().out
    assert "second pass" in table and "lookup" in table and "position" not in table
    assert draw(tmp_path / "moment.png", out).returncode == 0
    for log in ("5\n", "[" * 10**5, '{"induction": "a"}', "{"):
        (tmp_path / "odd").mkdir(exist_ok=True)
        (tmp_path / "odd" / "config.toml").write_text("n_layer = 2\n")
        (tmp_path / "odd" / "log.jsonl").write_text(log)
        done = draw(tmp_path / "odd.png", tmp_path / "odd")
        assert done.returncode and f"error: {tmp_path / 'odd'} is not the directory of a run: " in done.stderr
    assert (tmp_path / "moment.png").read_bytes().startswith(b"\x89PNG")
    assert main(["eval", "--checkpoint", out]) == 2
    assert "give --data or --in-context" in capsys.readouterr().err


@pytest.mark.slow
def test_two_layers_learn_induction_and_one_does_not(tmp_path: Path):
    for layers, right in ((2, lambda score: score > 0.9), (1, lambda score: score < 0.5)):
        out = tmp_path / str(layers)
        recipe = [
            "train",
            "--config",
            str(ROOT / "examples/induction.toml"),
            f"--n-layer={layers}",
            f"--out={out}",
        ]
        assert main(recipe) == 0
        records = list(map(json.loads, (out / "log.jsonl").read_text().splitlines()))
        assert right([record["induction"] for record in records if "induction" in record][-1])
