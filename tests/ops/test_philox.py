"""The dropout generator against the published test vectors of Philox 4×32-10, and its statistics."""

import pytest
import torch

from fastgpt.reference import dropout_keep
from fastgpt.reference.philox import philox

# Known answers of Random123 (Salmon et al., 2011), kat_vectors: counter, key, result.
VECTORS = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "expected"), VECTORS)
def test_known_answers(counter, key, expected):
    seed = key[0] | key[1] << 32
    seed = seed - 2**64 if seed >= 2**63 else seed
    words = philox(tuple(torch.tensor(c) for c in counter), torch.tensor([seed]))
    assert tuple(int(w) for w in words) == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_dropped_elements(p):
    keep = dropout_keep(torch.tensor([7]), p, (4, 4, 128, 130))
    deviation = (p * (1 - p) / keep.numel()) ** 0.5
    assert abs(1 - keep.double().mean() - p) < 5 * deviation


def test_every_coordinate_and_the_seed_matter():
    keep = dropout_keep(torch.tensor([7]), 0.5, (2, 2, 64, 64))
    assert not torch.equal(keep[0], keep[1])
    assert not torch.equal(keep[:, 0], keep[:, 1])
    assert not torch.equal(keep[:, :, 0], keep[:, :, 1])
    assert not torch.equal(keep, dropout_keep(torch.tensor([7 + 2**32]), 0.5, (2, 2, 64, 64)))


def test_the_mask_of_a_part_is_the_part_of_the_mask():
    whole = dropout_keep(torch.tensor([7]), 0.5, (3, 2, 9, 11))
    assert torch.equal(dropout_keep(torch.tensor([7]), 0.5, (3, 2, 5, 6)), whole[:, :, :5, :6])
    assert torch.equal(dropout_keep(torch.tensor([7]), 0.5, (1, 2, 9, 11), first_batch=2), whole[2:])
    assert dropout_keep(torch.tensor([7]), 0.5, (1, 0, 0, 0)).shape == (1, 0, 0, 0)
