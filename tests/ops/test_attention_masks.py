"""Masks that hide or show whole tiles of scores: kernels may skip the first and pass over the second."""

import pytest
import torch

from fastgpt import ops
from fastgpt.testing import check_error_rule, strided
from tests.support.contract import with_costly
from tests.support.plain_attention import composed

TILE = 64  # of the C++ kernels; the others' are 16 to 128


def inputs(dtype, rows=150, columns=170, batch=1, heads=2, kv_heads=1, size=8):
    shapes = ((batch, heads, rows, size), *[(batch, kv_heads, columns, size)] * 2)
    return [strided(shape, dtype, "contiguous") for shape in shapes]


def tiles(rows=150, columns=170):
    """A mask whose tiles are, in turn, hidden, shown, of one score shown, of one hidden, and mixed."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for number, (i, j) in enumerate((i, j) for i in range(0, rows, TILE) for j in range(0, columns, TILE)):
        tile = mask[i : i + TILE, j : j + TILE]
        kind = ("hidden", "one shown", "shown", "one hidden", "mixed")[number % 5]
        last = (tile.shape[0] - 1, tile.shape[1] - 1)
        if kind in ("shown", "one hidden"):
            tile.fill_(True)
        if kind in ("one shown", "one hidden"):
            tile[last] = kind == "one shown"
        if kind == "mixed":
            tile.copy_(torch.rand(tile.shape) > 0.5)
    return mask


def written_as(mask, kind, dtype):
    """The same mask as bool, or to be added; in rows, in columns, or apart from one another."""
    if kind == "added":
        return torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, -torch.inf)
    if kind == "transposed":
        return mask.t().contiguous().t()
    if kind == "gapped":
        return torch.stack((mask, ~mask), -1)[..., 0]
    return mask


KINDS = ["bool", "added", "transposed", "gapped"]


@pytest.mark.parametrize("kind", with_costly(KINDS, "added", "transposed", "gapped"))
@pytest.mark.parametrize("options", with_costly(["alone", "causal, softcap"], "causal, softcap"))
def test_tiles_hidden_shown_and_mixed(backend, dtype, kind, options):
    options = {} if options == "alone" else {"causal": "upper_left", "softcap": 2.0}
    mask = written_as(tiles(), kind, dtype)
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, attn_mask=mask, **options),
        lambda q, k, v: composed(q, k, v, attn_mask=mask, **options),
        inputs(dtype),
    )


@pytest.mark.parametrize("side", with_costly(["left", "right", "all"], "right", "all"))
def test_padding_beside_causality(backend, dtype, side):
    """Columns hidden by one row of flags, for all rows: of another number in each entry of the batch."""
    shown = torch.ones(2, 140, dtype=torch.bool)
    for entry, hidden in enumerate((70, 130)):
        shown[entry, slice(0, hidden) if side == "left" else slice(140 - hidden, 140)] = False
    if side == "all":
        shown[1] = False
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, attn_mask=shown[:, None, None], causal="upper_left"),
        lambda q, k, v: composed(q, k, v, attn_mask=shown[:, None, None], causal="upper_left"),
        inputs(dtype, 140, 140, batch=2),
    )


@pytest.mark.costly
def test_dropout_of_the_tiles_that_are_left(backend):
    mask = tiles()
    options = {"attn_mask": mask, "dropout_p": 0.4, "seed": 11}
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, **options),
        lambda q, k, v: composed(q, k, v, **options),
        inputs(torch.float32),
    )


@pytest.mark.costly
def test_one_tile_of_columns_whose_rows_are_hidden_in_turn(backend):
    """A single tile of columns has its sum of p·dp made on the way, which a skipped tile must not upset."""
    mask = torch.zeros(200, 60, dtype=torch.bool)
    mask[64:128] = True
    check_error_rule(
        lambda q, k, v: ops.attention(q, k, v, attn_mask=mask),
        lambda q, k, v: composed(q, k, v, attn_mask=mask),
        inputs(torch.float32, 200, 60),
    )
