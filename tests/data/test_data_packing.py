"""Packing: all documents, uncut if they fit, in nearly full blocks, in shuffled epochs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastgpt.data import Packed, pack
from fastgpt.model import GPT, GPTConfig

LENGTHS = st.lists(st.integers(1, 70), max_size=40)


def ends_of(lengths: list[int]) -> np.ndarray:
    return np.cumsum(np.array(lengths, dtype=np.int64))


@given(lengths=LENGTHS, block_size=st.integers(1, 33))
@settings(max_examples=200, deadline=None)
def test_every_place_is_in_one_block_and_none_is_fuller_than_full(lengths: list[int], block_size: int):
    packing = pack(ends_of(lengths), block_size)
    blocks = [packing.pieces(b) for b in range(len(packing))]
    assert all(0 < sum(length for _, length in block) <= block_size for block in blocks)
    found = sorted(place for block in blocks for start, n in block for place in range(start, start + n))
    begins = [0, *itertools.accumulate(lengths)]
    assert found == [
        place for begin, n in zip(begins, lengths, strict=False) for place in range(begin, begin + n - 1)
    ]
    pieces = sorted(piece for block in blocks for piece in block)
    cut = [min(block_size, n - 1 - i) for n in lengths for i in range(0, n - 1, block_size)]
    assert [length for _, length in pieces] == cut  # a document that fits is one piece


def test_little_is_wasted():
    chance = np.random.default_rng(0)
    lengths = np.minimum(chance.lognormal(6, 1.3, 20_000).astype(np.int64) + 2, 50_000)
    packing = pack(np.cumsum(lengths), 1024)
    assert packing.fill > 0.999
    assert len(packing) <= math.ceil(1.001 * (lengths - 1).sum() / 1024)


def stream(lengths: list[int]) -> tuple[torch.Tensor, np.ndarray]:
    """Make tokens 1, 2, 3, ...: a token identifies its position."""
    return torch.arange(1, sum(lengths) + 1), ends_of(lengths)


@given(lengths=LENGTHS.filter(lambda lengths: any(n > 1 for n in lengths)), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_target_once(lengths: list[int], seed: int):
    tokens, ends = stream(lengths)
    source = Packed(tokens, ends, batch_size=1, block_size=16, seed=seed)
    for epoch in range(2):
        batches = [source.batch(epoch * len(source.packing) + i) for i in range(len(source.packing))]
        targets = torch.cat([b.targets.flatten() for b in batches])
        inputs = torch.cat([b.idx.flatten() for b in batches])
        counted = targets != -100
        assert sum(b.num_targets for b in batches) == int(counted.sum())
        assert torch.equal(inputs[counted] + 1, targets[counted])
        begins = {1, *(ends[:-1] + 1).tolist()}
        assert sorted(targets[counted].tolist()) == [t for t in tokens.tolist() if t not in begins]


def test_epochs_are_shuffled_and_repeatable():
    tokens, ends = stream([9] * 64)
    source = Packed(tokens, ends, batch_size=8, block_size=8, seed=1)
    epoch = torch.cat([source.batch(i).idx for i in range(8)])
    following = torch.cat([source.batch(i).idx for i in range(8, 16)])
    assert not torch.equal(epoch, following)
    assert torch.equal(epoch.flatten().sort().values, following.flatten().sort().values)
    again = Packed(tokens, ends, batch_size=8, block_size=8, seed=1)
    assert torch.equal(again.batch(13).idx, source.batch(13).idx)
    other = Packed(tokens, ends, batch_size=8, block_size=8, seed=2)
    assert not torch.equal(other.batch(13).idx, source.batch(13).idx)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_share_the_rows_of_a_batch(processes: int):
    tokens, ends = stream([5, 17, 3, 2, 30, 9, 9, 40, 12])
    source = Packed(tokens, ends, batch_size=4, block_size=16)
    whole, parts = (
        source.batch(3),
        [source.batch(3, slice(rank, None, processes)) for rank in range(processes)],
    )
    for rank, part in enumerate(parts):
        assert torch.equal(part.idx, whole.idx[rank::processes])
        assert torch.equal(part.targets, whole.targets[rank::processes])
        assert part.cu_seqlens is not None and int(part.cu_seqlens[-1]) == part.idx.numel()
    assert sum(part.num_targets for part in parts) == whole.num_targets


def test_validation_blocks_are_spread_and_not_repeated():
    tokens, ends = stream([9] * 64)
    source = Packed(tokens, ends, batch_size=8, block_size=8)
    batches = source.validation_batches(3)
    seen = torch.cat([b.idx for b in batches])
    assert len(batches) == 3 and len(seen.unique(dim=0)) == len(seen)
    assert len(source.validation_batches(100)) == 8  # the number of blocks
    (few,) = Packed(tokens[:18], ends[:2], batch_size=8, block_size=8).validation_batches(5)
    assert few.idx.shape == (8, 8) and few.num_targets == 16  # padded with empty blocks


def test_tokens_that_do_not_count_are_no_targets():
    tokens, ends = stream([6, 6])
    counted = torch.tensor([0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 1], dtype=torch.bool)
    batch = Packed(tokens, ends, batch_size=1, block_size=10, is_target=counted).batch(0)
    assert sorted(batch.targets[batch.targets != -100].tolist()) == [5, 6, 9, 10, 11, 12]
    assert torch.equal((batch.targets != -100).sum(), torch.tensor(batch.num_targets))


@pytest.mark.parametrize("ends", [[], [1], [1, 2, 3]])
def test_documents_without_a_target_are_refused(ends: list[int]):
    with pytest.raises(ValueError, match="no document has at least two tokens"):
        Packed(torch.arange(9), np.array(ends, dtype=np.int64), batch_size=1, block_size=4)


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "rotary"])
def test_the_loss_of_packed_documents_is_that_of_separate_ones(position: str):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=50, block_size=24, n_layer=2, n_head=2, n_embd=32, position=position))
    lengths = [5, 17, 3, 2, 25, 9, 1, 12, 20]
    tokens = torch.randint(50, (sum(lengths),))
    source = Packed(tokens, ends_of(lengths), batch_size=len(lengths), block_size=24)
    batch = source.validation_batches(1)[0]  # each block once, and empty ones
    loss = model(batch.idx, batch.targets, cu_seqlens=batch.cu_seqlens)[1]
    loss.backward()
    packed = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    documents = [d for d in tokens.split(lengths) if len(d) > 1]
    total = sum(model(d[None, :-1], d[None, 1:], reduction="sum")[1] for d in documents)
    separate = total / sum(len(d) - 1 for d in documents)
    separate.backward()
    torch.testing.assert_close(loss, separate, rtol=1e-6, atol=0)
    for ours, parameter in zip(packed, model.parameters(), strict=True):
        torch.testing.assert_close(ours, parameter.grad, rtol=1e-4, atol=1e-6)
