"""`patch_functional`: models of others that call torch.nn.functional, on our ops, and PyTorch's functions back."""

import threading

import pytest
import torch
import torch.nn.functional as T

import fastgpt
from fastgpt import functional
from fastgpt.integrations.patch_functional import NAMES
from tests.support.client_models import NanoGPT, assert_same, loss_and_gradients


@pytest.fixture
def untouched():
    """PyTorch's functions are the same afterwards."""
    before = {name: getattr(T, name, None) for name in NAMES}
    yield
    assert {name: getattr(T, name, None) for name in NAMES} == before


def called(function, *args):
    return {decision.op for decision in fastgpt.explain(function, *args).decisions}


def test_nanogpt_runs_on_our_ops(untouched):
    model, tokens = NanoGPT(), torch.randint(0, 200, (2, 24))
    before = loss_and_gradients(model, (tokens, tokens))
    assert called(model, tokens, tokens) == set()
    with fastgpt.patch_functional():
        assert called(model, tokens, tokens) == {"attention", "gelu", "add_layer_norm", "cross_entropy"}
        assert_same(before, loss_and_gradients(model, (tokens, tokens)))
    assert called(model, tokens, tokens) == set()


def test_dropout_repeats_by_seed(untouched):
    model, tokens = NanoGPT(dropout=0.3), torch.randint(0, 200, (2, 24))
    with fastgpt.patch_functional():
        losses = []
        for seed in (1, 1, 2):
            torch.manual_seed(seed)
            losses.append(model(tokens, tokens))
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])


def test_what_our_kernels_do_not_cover_is_pytorchs(untouched):
    """The fallbacks must not come back to what replaced them."""
    probabilities, targets = torch.randn(3, 5), torch.rand(3, 5).softmax(-1)
    expected = T.cross_entropy(probabilities, targets)
    with fastgpt.patch_functional():
        assert torch.equal(T.cross_entropy(probabilities, targets), expected)
        assert T.gelu(torch.ones(2, dtype=torch.float64)).dtype == torch.float64
        with pytest.raises(RuntimeError):
            T.gelu(torch.ones(2, dtype=torch.int64))
        with fastgpt.use_backend("reference"):
            torch.testing.assert_close(T.gelu(probabilities), torch._C._nn.gelu(probabilities))
        q = torch.randn(1, 1, 2, 300)
        assert T.scaled_dot_product_attention(q, q, q).shape == q.shape


def test_it_nests_and_decorates_and_survives_exceptions(untouched):
    original = T.gelu
    with fastgpt.patch_functional():
        with fastgpt.patch_functional():
            assert T.gelu is functional.gelu
        assert T.gelu is functional.gelu
    assert T.gelu is original

    @fastgpt.patch_functional()
    def inside():
        return T.gelu

    assert inside() is functional.gelu
    with pytest.raises(ZeroDivisionError), fastgpt.patch_functional():
        1 / 0
    assert T.gelu is original


def test_threads_may_enter_at_the_same_time(untouched):
    together = threading.Barrier(8)

    def enter():
        together.wait()
        for _ in range(200):
            with fastgpt.patch_functional():
                seen.append(T.gelu is functional.gelu)

    seen = []
    threads = [threading.Thread(target=enter) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == 1600
    assert all(seen)


def test_it_compiles(untouched):
    model, tokens = NanoGPT(), torch.randint(0, 200, (2, 24))
    before = loss_and_gradients(model, (tokens, tokens))
    torch._dynamo.reset()
    with fastgpt.patch_functional():
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        after = loss_and_gradients(compiled, (tokens, tokens))
    assert_same(before, (after[0], {k.removeprefix("_orig_mod."): v for k, v in after[1].items()}))


def test_x_transformers(untouched):
    x_transformers = pytest.importorskip("x_transformers")
    model = x_transformers.TransformerWrapper(
        num_tokens=97, max_seq_len=32, attn_layers=x_transformers.Decoder(dim=32, depth=2, heads=4, attn_flash=True)
    )  # fmt: skip
    model = x_transformers.AutoregressiveWrapper(model)
    tokens = torch.randint(0, 97, (2, 20))
    before = loss_and_gradients(model, (tokens,))
    with fastgpt.patch_functional():
        assert {"attention", "gelu", "add_layer_norm"} <= called(
            model, tokens
        )  # it keeps cross_entropy itself
        assert_same(before, loss_and_gradients(model, (tokens,)))


def test_vision_transformer_of_timm(untouched):
    try:
        import timm
    except (
        Exception
    ) as error:  # torchvision of a CUDA build fails beside a CPU build of PyTorch in its own way
        pytest.skip(f"timm cannot be imported: {error}")
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=11, depth=2)
    images, labels = torch.randn(2, 3, 32, 32), torch.tensor([3, 8])

    class Loss(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self):
            return T.cross_entropy(self.model(images), labels)

    whole = Loss()
    before = loss_and_gradients(whole, ())
    with fastgpt.patch_functional():
        assert {"attention", "gelu", "add_layer_norm", "cross_entropy"} <= called(whole)
        assert_same(before, loss_and_gradients(whole, ()))
