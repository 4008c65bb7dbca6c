"""Batched generation: rows are independent of their batch, and end where they should."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import fastgpt
from fastgpt.generation.decode import NOTHING
from fastgpt.generation.kv_cache import KVCache
from fastgpt.generation.sampling import Sampling, sampling_distribution
from fastgpt.gpt_config import POSITIONS
from fastgpt.model import GPT
from fastgpt.testing import poisoned_memory
from tests.model.test_model import lively, tokens

MODELS = {
    position: lively(position=position, tie_head=False).eval() for position in POSITIONS
}  # block_size 24


def batch(prompts: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Pad prompts (T,) on the right with a token that would change the output; return them with their lengths."""
    lengths = torch.tensor([len(p) for p in prompts])
    return torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True, padding_value=60), lengths


def grown(row: Tensor) -> list[int]:
    """Return the tokens of a row of a result."""
    assert (row[(row == NOTHING).cumsum(0) > 0] == NOTHING).all(), "a hole in the row"
    return row[row != NOTHING].tolist()


prompt_lengths = st.lists(st.integers(1, 30), min_size=1, max_size=4)


@settings(max_examples=12, deadline=None)
@given(
    lengths=prompt_lengths, position=st.sampled_from(POSITIONS), seed=st.integers(0, 2**40), data=st.data()
)
def test_a_row_of_a_ragged_batch_is_what_it_is_alone(lengths, position, seed, data):
    """Compare greedy and sampled rows, within the block and beyond it, with rows that end early."""
    model = MODELS[position]
    prompts = [tokens(n, seed=i) for i, n in enumerate(lengths)]
    options = data.draw(
        st.sampled_from(
            [
                {"temperature": 0},
                {"temperature": 0, "repetition_penalty": 1.3},
                {"seed": seed},
                {"seed": seed, "top_k": 5, "temperature": 2.0},
                {"seed": seed, "top_p": 0.8, "repetition_penalty": 0.8},
            ]
        )
    )
    options = options | {"end_token": data.draw(st.sampled_from([None, 7]))}
    idx, sizes = batch(prompts)
    together = model.generate(idx, 12, lengths=sizes, **options)
    assert together.shape == (len(prompts), max(lengths) + 12)
    for b, prompt in enumerate(prompts):
        own = options | ({"seed": seed + b} if "seed" in options else {})
        alone = model.generate(prompt[None], 12, **own)
        assert grown(together[b]) == grown(alone[0]), (b, options)
        assert grown(together[b])[: len(prompt)] == prompt.tolist()


@pytest.mark.parametrize("position", POSITIONS)
def test_a_ragged_decoding_step_has_the_logits_of_the_row_alone(position: str):
    model, lengths = MODELS[position], torch.tensor([3, 17, 9])
    idx, new = tokens(3, 17), tokens(3, 1, seed=5)
    cache = KVCache(2, 24)
    with torch.no_grad():
        model.hidden_states(idx, cache)
        cache.set_lengths(lengths)
        found = [model.hidden_states(new, cache)[:, 0], model.hidden_states(new, cache)[:, 0]]
        for b, n in enumerate(lengths):
            alone = model.hidden_states(torch.cat((idx[b, :n], new[b], new[b]))[None])[0, -2:]
            torch.testing.assert_close(torch.stack((found[0][b], found[1][b])), alone, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="one token per pass, not 2"):
        model.hidden_states(tokens(3, 2), cache)


def test_rows_that_have_ended_are_computed_no_more(monkeypatch: pytest.MonkeyPatch):
    """Record the batch size of every pass, while rows end after 1, 2 and 4 tokens."""
    model, sizes, count = MODELS["learned"], [], [0, 0, 0]
    hidden = GPT.hidden_states
    monkeypatch.setattr(
        GPT, "hidden_states", lambda self, idx, *a: sizes.append(len(idx)) or hidden(self, idx, *a)
    )

    def on_token(row: int, token: int) -> bool:
        count[row] += 1
        return count[row] == (2, 1, 4)[row]

    out = model.generate(tokens(3, 5), 50, seed=0, on_token=on_token)
    assert sizes == [3, 2, 1, 1]
    assert [len(grown(row)) for row in out] == [7, 6, 9]
    assert out.shape == (3, 55)


def test_on_token_hears_every_token_in_order():
    model, heard = MODELS["rotary"], {0: [], 1: []}
    out = model.generate(tokens(2, 5), 30, seed=3, on_token=lambda row, token: heard[row].append(token))
    assert [heard[0], heard[1]] == out[:, 5:].tolist()


def test_end_token_is_kept_and_ends_the_row():
    model, idx = MODELS["learned"], tokens(4, 5)
    free = model.generate(idx, 20, temperature=0)
    end = int(free[2, 9])
    out = model.generate(idx, 20, temperature=0, end_token=end)
    for row, unbroken in zip(out, free[:, 5:], strict=True):
        first = unbroken.tolist().index(end) + 1 if end in unbroken else 20
        assert grown(row)[5:] == unbroken[:first].tolist()


def test_repetition_penalty_divides_positive_multiplies_negative_logits():
    logits = torch.tensor([[2.0, -2.0, 1.5, -0.5, 0.0]])
    seen = torch.tensor([[True, True, False, False, True]])
    choose = Sampling(temperature=0, repetition_penalty=2.0).choose
    assert choose(logits, seen, None).item() == 2  # 1, -4, 1.5, -0.5, 0
    assert Sampling(temperature=0, repetition_penalty=1.25).choose(logits, seen, None).item() == 0  # 1.6
    edge = torch.tensor([[-1.0, 1.0, -1.9, 0.1, 0.0]])
    assert choose(edge, torch.tensor([[True, True, False, False, False]]), None).item() == 1
    low = torch.full((1, 5), -1.0)
    assert choose(low, torch.tensor([[True, True, False, True, True]]), None).item() == 2


def test_a_strong_penalty_never_repeats_while_tokens_are_left():
    """Seen tokens keep a logit of about 0 or far below; a third of the others have a larger one."""
    model = lively(tie_head=False).eval()
    out = model.generate(tokens(1, 1), 22, temperature=0, repetition_penalty=1e30)[0]
    assert len(set(out.tolist())) == 23
    assert len(set(model.generate(tokens(1, 1), 22, temperature=0)[0].tolist())) < 23


@settings(max_examples=100, deadline=None)
@given(
    logits=st.lists(st.floats(-50, 50, width=32), min_size=2, max_size=9),
    temperature=st.floats(1e-30, 1e30),
    uniform=st.floats(0, 1, exclude_max=True),
    top_k=st.none() | st.integers(1, 10),
    top_p=st.none() | st.floats(1e-9, 1.0),
)
def test_a_draw_is_a_token_that_the_distribution_has(logits, temperature, uniform, top_k, top_p):
    logits = torch.tensor([logits])
    p = sampling_distribution(logits, temperature, top_k, top_p)
    assert p.isfinite().all() and p.sum().item() == pytest.approx(1, abs=1e-5)
    draw = torch.tensor([uniform], dtype=torch.float64)
    token = Sampling(temperature, top_k, top_p).choose(logits, None, draw).item()
    assert p[0, token] > 0
    assert p[0, :token].sum().item() <= uniform + 1e-5 <= p[0, : token + 1].sum().item() + 2e-5


def test_the_greatest_draw_stays_within_the_tokens_that_are_kept():
    logits = torch.randn(1, 50257, generator=torch.Generator().manual_seed(0))
    greatest = torch.tensor([1 - 2**-53], dtype=torch.float64)
    for k in (None, 3):
        p = sampling_distribution(logits, 1.0, k)
        token = Sampling(top_k=k).choose(logits, None, greatest)
        assert p[0, token].item() > 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lengths": torch.tensor([1, 4])}, "lengths must be from 1 to 3, not from 1 to 4"),
        ({"lengths": torch.tensor([0, 3])}, "lengths must be from 1 to 3, not from 0 to 3"),
        ({"lengths": torch.tensor([1])}, r"lengths must be \(2,\) integers, not \(1,\)"),
        ({"lengths": torch.tensor([1.0, 2.0])}, "not \\(2,\\) of torch.float32"),
        ({"repetition_penalty": 0.0}, r"repetition_penalty must be from 1.2e-38 to 3.4e\+38, not 0.0"),
        ({"repetition_penalty": 1e-45}, "repetition_penalty"),
        ({"temperature": 1e-300}, r"temperature must be 0 or from 1.2e-38 to 3.4e\+38, not 1e-300"),
        ({"temperature": 1e39}, "temperature"),
        ({"top_p": 1e-320}, r"top_p must be from 1.2e-38 to 1, not 1e-320"),
        ({"max_new_tokens": 10**12}, "max_new_tokens must be at most 16,777,216, not 1,000,000,000,000"),
        ({"repetition_penalty": float("inf")}, "repetition_penalty"),
        ({"repetition_penalty": float("nan")}, "repetition_penalty"),
        ({"seed": -1}, "seed must not be negative, not -1"),
    ],
)
def test_impossible_options_are_named(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        MODELS["learned"].generate(tokens(2, 3), **{"max_new_tokens": 2, **options})


@given(
    logits=st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=4, max_size=4),
    extremes=st.tuples(*[st.sampled_from([1.2e-38, 1e-20, 1.0, 1e20, 3.4e38])] * 2),
    top_p=st.sampled_from([None, 1.2e-38, 0.5, 1.0]),
    seen=st.lists(st.booleans(), min_size=4, max_size=4),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_the_smallest_and_largest_options_choose_a_token(logits, extremes, top_p, seen, uniform):
    temperature, penalty = extremes
    sampling = Sampling(temperature, None, top_p, penalty)
    drawn = torch.tensor([uniform], dtype=torch.float64)
    assert sampling_distribution(torch.tensor([logits]), temperature, None, top_p).isfinite().all()
    for draw in (drawn, None):
        token = sampling.choose(torch.tensor([logits]), torch.tensor([seen]), draw)
        assert 0 <= int(token) < 4


def test_memory_is_taken_as_rows_grow(monkeypatch: pytest.MonkeyPatch):
    """Allocate in blocks, with the same draws; rows that end early allocate no more."""
    model, idx = MODELS["learned"], tokens(3, 4)
    ends = {0: 2, 1: 9, 2: 30}

    def grow(**options: object) -> Tensor:
        count = dict.fromkeys(ends, 0)

        def on_token(row: int, token: int) -> bool:
            count[row] += 1
            return count[row] == ends[row]

        return model.generate(idx, 40, on_token=on_token, **options)

    for options in ({"seed": 5}, {"temperature": 0}):
        expected = grow(**options)
        assert [len(grown(row)) for row in expected] == [4 + n for n in ends.values()]
        for block in (1, 7, 40):
            monkeypatch.setattr("fastgpt.generation.decode._BLOCK", block)
            assert torch.equal(grow(**options), expected)
        monkeypatch.undo()


def test_no_rows_are_no_rows():
    assert MODELS["learned"].generate(tokens(0, 3), 2, seed=1).shape == (0, 5)
    with pytest.raises(ValueError, match="lengths given for an empty batch"):
        MODELS["learned"].generate(tokens(0, 3), 2, lengths=torch.empty(0, dtype=torch.long))


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_ragged_batch_reads_no_column_that_nobody_wrote(backend: str):
    prompts = [tokens(1, n, seed=n)[0] for n in (1, 9, 3)]
    model = MODELS["learned"]
    with fastgpt.use_backend(backend):
        expected = [model.generate(p[None], 12, temperature=0)[0].tolist() for p in prompts]
        with poisoned_memory(True):
            idx, lengths = batch(prompts)
            found = model.generate(idx, 12, temperature=0, lengths=lengths)
    assert [grown(row) for row in found] == expected
