"""Cross-entropy's loss and gradient at once, in place: against the two ops that it stands for, at any cut of a row."""

import pytest
import torch
from hypothesis import strategies as st

from fastgpt.testing import poisoned_memory
from tests.support.contract import any_of, check_opcheck, registered
from tests.support.cuda_kernels import has_clusters, launches

pytestmark = pytest.mark.only("reference", "triton", "cuda")
NOTHING = (
    None,
    -100,
    0.0,
    0.0,
    0.0,
    1.0,
)  # weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale


@pytest.fixture
def op(backend):
    """The registered op, which linear_cross_entropy calls on a GPU; in C++ that is one kernel."""
    return registered("cross_entropy_with_grad_inplace", backend)


def in_two_steps(backend, logits, y, options):
    """Loss, statistics and gradient of the sum, by the forward and the backward."""
    loss, statistics = registered("cross_entropy_fwd", backend)(logits, y, *options)
    ones = torch.ones_like(loss)
    grad = registered("cross_entropy_bwd", backend)(ones, None, logits, y, statistics, *options)
    return loss, statistics, grad


def check(backend, op, logits, y, options, block_bytes):
    """The gradient stands where the logits stood, and nothing beside them is written."""
    expected = in_two_steps(backend, logits, y, options)
    whole = logits._base if logits._base is not None else logits
    whole = whole.clone()
    rows = whole.as_strided(logits.shape, logits.stride(), logits.storage_offset())
    around = whole.clone()
    around.as_strided(rows.shape, rows.stride(), rows.storage_offset()).zero_()
    with poisoned_memory(False):
        loss, statistics = op(rows, y, *options, block_bytes)
    torch.testing.assert_close(loss, expected[0])
    torch.testing.assert_close(statistics, expected[1], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(rows, expected[2])
    rows.zero_()
    assert torch.equal(whole, around)


@any_of(
    vocab=st.sampled_from([1, 2, 7, 64, 65, 500, 1031, 2048, 4100]),
    gap=st.integers(0, 17),
    offset=st.integers(0, 9),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    block_bytes=st.sampled_from([0, 16, 256, 1024, 4096]),
    weighted=st.booleans(),
    label_smoothing=st.sampled_from([0.0, 0.1]),
    z_loss=st.sampled_from([0.0, 0.01]),
    softcap=st.sampled_from([0.0, 5.0]),
    logit_scale=st.sampled_from([1.0, 0.3, 2.0]),
    ignore_index=st.sampled_from([-100, 0]),
)
def test_is_the_forward_and_the_backward(
    backend,
    op,
    vocab,
    gap,
    offset,
    dtype,
    block_bytes,
    weighted,
    label_smoothing,
    z_loss,
    softcap,
    logit_scale,
    ignore_index,
):
    """Rows that start anywhere, in one block, in clusters of 2, 4 and 8, and too long for any."""
    memory = torch.randn(offset + 3 * (vocab + gap)).mul_(2).to(dtype)
    logits = memory.as_strided((3, vocab), (vocab + gap, 1), offset)
    weight = torch.rand(vocab) + 0.1 if weighted else None
    y = torch.tensor([vocab - 1, ignore_index, vocab // 2])
    options = (weight, ignore_index, label_smoothing, z_loss, softcap, logit_scale)
    check(backend, op, logits, y, options, block_bytes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_vocabulary_of_gpt2(backend, op, dtype):
    """An odd number of classes; in float32 the row takes two blocks, in bfloat16 one."""
    check(backend, op, torch.randn(2, 50257).to(dtype), torch.tensor([50256, 3]), NOTHING, 0)


@pytest.mark.parametrize(("block_bytes", "blocks"), [(0, 1), (4096, 1), (1024, 4), (512, 8), (511, 16)])
def test_a_row_is_read_twice_only_where_no_cluster_holds_it(cuda, block_bytes, blocks):
    """1024 numbers of 4 bytes. Beyond clusters of 8 there are two kernels, the forward and the backward."""
    arguments = (torch.randn(2, 1024), torch.tensor([0, 1023]), *NOTHING, block_bytes)
    op = registered("cross_entropy_with_grad_inplace", "cuda")
    assert launches(lambda: op(*arguments)) == (1 if blocks <= (8 if has_clusters() else 1) else 2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_logits(backend, dtype, op):
    """-inf in a thread's every element, in a block's, and in the target's; NaN where PyTorch's is."""
    logits = torch.full((4, 600), -torch.inf, dtype=dtype)
    logits[0, 17], logits[1, 300:], logits[2, :2] = (
        1.0,
        torch.randn(300).to(dtype),
        torch.tensor([0.5, 2.0]),
    )
    for block_bytes in (0, 512):
        check(backend, op, logits[:3], torch.tensor([17, 299, 1]), NOTHING, block_bytes)
        alone = logits[3:].clone()
        assert op(alone, torch.tensor([1]), *NOTHING, block_bytes)[0].isnan().all()
        assert alone.isnan().all()


@pytest.mark.parametrize("bad", [600, -1, 2**40])
def test_a_target_that_is_no_class(backend, op, bad):
    logits, y = torch.randn(3, 600), torch.tensor([1, bad, 2])
    options = (torch.rand(600), -100, 0.1, 0.1, 3.0, 0.5)
    if backend != "cuda" and not logits.is_cuda:
        with pytest.raises(IndexError, match=f"Target {bad} is out of bounds"):
            op(logits, y, *options, 0)
        return
    for block_bytes in (0, 512, 64):
        grad = logits.clone()
        loss, statistics = op(grad, y, *options, block_bytes)
        assert loss.isnan().tolist() == [False, True, False]
        assert statistics.isfinite().all()
        assert grad[1].isnan().all()
        assert grad[::2].isfinite().all()


def test_no_rows_and_no_classes(backend, op):
    for rows, vocab in ((0, 5), (3, 0)):
        y = torch.full((rows,), -100)
        loss, statistics = op(torch.randn(rows, vocab), y, *NOTHING, 0)
        assert torch.equal(loss, torch.zeros(rows))
        assert torch.equal(statistics[:, 0] + statistics[:, 1].log(), torch.full((rows,), -torch.inf))


@pytest.mark.once
def test_opcheck(backend, op):
    x, y, w = torch.randn(3, 5), torch.tensor([1, -100, 4]), torch.rand(5)
    check_opcheck(
        op, (x, y, w, -100, 0.1, 0.0, 0.0, 1.0, 0), (x.clone(), y, None, -100, 0.0, 0.1, 2.0, 0.5, 16)
    )


@pytest.mark.only("triton", "cuda")
def test_gradients_are_as_exact_as_the_backwards(backend, op):
    """To the last bit but few: the two differ only in the order in which the exponentials are summed."""
    logits, y = torch.randn(4, 3001) * 4, torch.randint(0, 3001, (4,))
    exact = torch.softmax(logits.double(), 1)
    exact[torch.arange(4), y] -= 1
    _, _, twice = in_two_steps(backend, logits, y, NOTHING)
    once = logits.clone()
    op(once, y, *NOTHING, 0)
    assert (once - exact).abs().max() <= 2 * (twice - exact).abs().max() + 1e-7
