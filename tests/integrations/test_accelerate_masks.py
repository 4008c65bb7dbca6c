"""Windows, padding and packed documents of transformers' models: the kernels' own, and no mask of (L, L)."""

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
    sliding_window_overlay,
)

import fastgpt
from fastgpt import ops
from fastgpt.integrations import attention, masks
from fastgpt.integrations.masks import Causality, CausalMask, Documents
from tests.integrations.test_accelerate_recognized import build
from tests.support import zoo
from tests.support.client_models import assert_same, batch, loss_and_gradients

WINDOWED = ("Mistral", "Exaone4", "Gemma2")
MODELS = ("Llama", *WINDOWED)
LENGTHS = (10, 13, 1)  # of the packed documents


def built(name):
    softcap = {"attn_logit_softcapping": 3.0} if name == "Gemma2" else {}
    return build(name, **({"sliding_window": 6} if name in WINDOWED else {}), **softcap)


@pytest.fixture
def seen(monkeypatch):
    """The op, shape of the mask, and window of every call of attention."""
    calls = []

    def recorded(op):
        right = getattr(ops, op)

        def function(*args, **options):
            mask = options.get("attn_mask")
            calls.append((op, None if mask is None else tuple(mask.shape), options.get("window")))
            return right(*args, **options)

        return function

    for op in ("attention", "attention_varlen"):
        monkeypatch.setattr(ops, op, recorded(op))
    return calls


def packed(name, use_cache, rows=1):
    """Tokens of documents in each row, as DataCollatorWithFlattening packs them: the first label of each is -100."""
    inputs = {key: value[:rows] for key, value in batch(name).items()}
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None].expand(rows, -1)
    inputs["labels"] = inputs["labels"].masked_fill(positions == 0, -100)
    return inputs | {"position_ids": positions, "use_cache": use_cache}


def one_by_one(model, inputs):
    """The loss and gradients of the packed documents, each run alone; their labels have equal weight."""
    model.zero_grad()
    tokens, labels = (inputs[name].split(LENGTHS, dim=1) for name in ("input_ids", "labels"))
    count = sum(int((label[:, 1:] != -100).sum()) for label in labels)
    total = 0.0
    for document, label in zip(tokens, labels, strict=True):
        logits = model(input_ids=document, use_cache=False).logits[:, :-1]
        each = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), label[:, 1:].flatten(), reduction="sum"
        )
        (each / count).backward()
        total += each.detach() / count
    return total, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding", [None, "ones", "left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_windows_and_padding_need_no_mask_of_elements(name, padding, seen):
    model = built(name)
    inputs = batch(name, None if padding == "ones" else padding)
    if padding == "ones":
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    if name == "Gemma2" and padding == "left":  # "eager" gives a row of padding alone a mean, the kernels 0
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"].cumsum(1) == 1, -100)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    seen.clear()
    assert_same(before, loss_and_gradients(model, inputs))
    batch_size, length = inputs["input_ids"].shape
    flags = (batch_size, 1, 1, length) if padding in ("left", "right") else None
    assert seen and all(op == "attention" and mask == flags for op, mask, _ in seen)
    assert ((5, 0) in {window for *_, window in seen}) == (name in WINDOWED)


@pytest.mark.parametrize("use_cache", [False, True], ids=["no cache", "cache"])
@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_are_as_documents_run_alone(name, use_cache, seen):
    model, inputs = built(name), packed(name, use_cache)
    before = one_by_one(model, inputs)
    fastgpt.accelerate(model)
    seen.clear()
    assert_same(before, loss_and_gradients(model, inputs), rtol=1e-5 if name == "Llama" else 2e-4)
    assert seen and {op for op, *_ in seen} == {"attention_varlen"}


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_in_several_rows(name, seen):
    model, inputs = built(name), packed(name, False, rows=3)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    seen.clear()
    assert_same(before, loss_and_gradients(model, inputs))
    assert {op for op, *_ in seen} == {"attention_varlen"}


def test_documents_by_the_keywords_of_flash_attention(seen):
    model, inputs = built("Llama"), packed("Llama", True)
    before = one_by_one(model, inputs)
    fastgpt.accelerate(model)
    ends = torch.tensor([0, *LENGTHS], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    inputs |= {f"cu_seq_lens_{of}": ends for of in "qk"} | {f"max_length_{of}": max(LENGTHS) for of in "qk"}
    positions = inputs.pop("position_ids")
    seen.clear()
    assert_same(before, loss_and_gradients(model, inputs | {"position_ids": positions + 3}))
    assert {op for op, *_ in seen} == {"attention_varlen"}


@pytest.mark.parametrize(
    "positions",
    [[0, 1, 2, 3, 4], [3, 4, 5, 6, 7], [1, 1, 1, 0, 1], [0, 1, 5, 6, 7], [4, 3, 2, 1, 0], [0, 0, 1, 3, 4]],
)
def test_other_positions_are_no_documents(positions):
    assert masks.documents_of(torch.tensor([positions])) is None


def test_documents_of_positions_are_those_of_their_last_values():
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    assert masks.documents_of(positions).cu_seqlens.tolist() == [0, 3, 5]
    assert masks.documents_of(positions) is masks.documents_of(positions)
    positions[0, 1] = 0
    positions[0, 2] = 1
    assert masks.documents_of(positions).cu_seqlens.tolist() == [0, 1, 3, 5]
    with torch.inference_mode():
        positions = torch.tensor([[0, 1, 2, 0, 1]])
        assert masks.documents_of(positions).longest == 3
        positions[0, 4] = 0
        assert masks.documents_of(positions).cu_seqlens.tolist() == [0, 3, 4, 5]


def test_no_allocation_grows_with_the_square_of_the_length(monkeypatch):
    """Of 8192 tokens a mask would have 64 million elements."""
    largest = 0

    class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for tensor in found if isinstance(found, tuple | list) else (found,):
                if isinstance(tensor, torch.Tensor) and not tensor._is_view():
                    largest = max(largest, tensor.untyped_storage().nbytes())
            return found

    model = build("Mistral", sliding_window=64, num_hidden_layers=1, max_position_embeddings=8192)
    fastgpt.accelerate(model)
    tokens = torch.randint(0, 90, (1, 8192))
    padding = torch.ones_like(tokens)
    padding[:, :100] = 0
    documents = torch.arange(8192)[None] % 1000
    for inputs in ({}, {"attention_mask": padding}, {"position_ids": documents, "use_cache": False}):
        with Allocations():
            model(input_ids=tokens, labels=tokens, **inputs).loss.backward()
    assert largest < 8192 * 8192


@pytest.mark.parametrize("name", WINDOWED)
def test_generation_beyond_the_window_is_the_same(name):
    model = built(name).eval()
    tokens = batch(name)["input_ids"][:, :10]
    expected = model.generate(tokens, max_new_tokens=8, do_sample=False)
    fastgpt.accelerate(model)
    assert torch.equal(model.generate(tokens, max_new_tokens=8, do_sample=False), expected)


def test_generation_of_a_batch_padded_on_the_left_is_the_same():
    model, inputs = built("Mistral").eval(), batch("Mistral", "left")
    given = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.generate(**given, max_new_tokens=8, do_sample=False)
    fastgpt.accelerate(model)
    assert torch.equal(model.generate(**given, max_new_tokens=8, do_sample=False), expected)


def test_a_window_as_long_as_the_text_is_plain_causality(seen):
    model, inputs = built("Mistral"), batch("Mistral")
    model.config.sliding_window = inputs["input_ids"].shape[1]
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    seen.clear()
    assert_same(before, loss_and_gradients(model, inputs))
    assert {window for *_, window in seen} == {None}


@pytest.mark.parametrize("padding", [None, "left"])
@pytest.mark.parametrize("what", ["model", "layers"])
def test_what_is_compiled_has_the_same_loss(what, padding):
    model, inputs = built("Mistral"), batch("Mistral", padding)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    torch._dynamo.reset()
    for part in [model] if what == "model" else model.model.layers:
        part.compile(backend="aot_eager")
    assert_same(before, loss_and_gradients(model, inputs))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not reentrant"])
def test_checkpointed_layers_get_the_mask(use_reentrant, seen):
    model, inputs = built("Mistral"), batch("Mistral", "right")
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    seen.clear()
    assert_same(before, loss_and_gradients(model, inputs))
    assert len(seen) == 2 * model.config.num_hidden_layers


def test_an_attention_that_is_causal_by_its_mask_alone_is_left():
    assert "a variant that is not known" in attention.refusal(zoo.build("BigBirdPegasusForCausalLM"))


def test_an_attention_without_sdpa_is_served_if_its_call_is_known(monkeypatch):
    model = built("Gemma2")
    assert attention.refusal(model) is None
    monkeypatch.setattr(attention, "_SERVED", attention._SERVED - {"softcap"})
    assert "a variant that is not known" in attention.refusal(model)

    def forward(self, x):
        return attention_interface(self, x, x, x, None, dropout=0.0, bias=x)  # noqa: F821

    assert attention._keywords(forward) == {"dropout", "bias"}
    assert attention._keywords(len) == {"unknown"}


ENTRIES, LENGTH = 2, 9
PADDING = torch.tensor([[0] * 4 + [1] * 5, [1] * 9]).bool()
NUMBERS = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 2, 3], [0, 1, 1, 1, 1, 1, 1, 1, 1]])
WINDOW = sliding_window_causal_mask_function(4)


@pytest.mark.parametrize("padding", [None, PADDING], ids=["whole", "padded"])
@pytest.mark.parametrize(
    "function",
    [
        pytest.param(causal_mask_function, id="causal"),
        pytest.param(WINDOW, id="window"),
        pytest.param(and_masks(causal_mask_function, packed_sequence_mask_function(NUMBERS)), id="packed"),
        pytest.param(and_masks(WINDOW, packed_sequence_mask_function(NUMBERS)), id="packed window"),
    ],
)
def test_a_mask_without_elements_stands_for_that_of_transformers(function, padding):
    arguments = {"batch_size": ENTRIES, "q_length": LENGTH, "kv_length": LENGTH, "attention_mask": padding}
    arguments |= {"mask_function": function, "local_size": 4 if function is WINDOW else None}
    arguments["allow_is_causal_skip"] = function in (causal_mask_function, WINDOW)
    mask = attention.attention_mask(**arguments)
    expected = sdpa_mask(**arguments)
    if function is causal_mask_function and padding is None:
        assert mask is None and expected is None
        return
    assert isinstance(mask, CausalMask) == (padding is None or function in (causal_mask_function, WINDOW))
    assert torch.equal(mask | False, expected)  # which reads its elements


def test_other_mask_functions_keep_their_elements():
    for function in (
        sliding_window_overlay(7),
        and_masks(sliding_window_overlay(7), sliding_window_overlay(3)),
        and_masks(sliding_window_causal_mask_function(7), lambda b, h, q, k: q != k),
        or_masks(sliding_window_causal_mask_function(7), lambda b, h, q, k: q == k),
        or_masks(causal_mask_function, packed_sequence_mask_function(NUMBERS)),
        lambda b, h, q, k: k <= q,
    ):
        arguments = {"batch_size": 2, "q_length": 9, "kv_length": 9, "mask_function": function}
        mask = attention.attention_mask(**arguments, allow_is_causal_skip=False)
        assert type(mask) is torch.Tensor
        assert torch.equal(mask, sdpa_mask(**arguments, allow_is_causal_skip=False))


def test_fewer_rows_than_columns_keep_their_elements():
    arguments = {"batch_size": 2, "q_length": 3, "q_offset": 6, "kv_length": 9, "attention_mask": PADDING}
    mask = attention.attention_mask(**arguments)
    assert type(mask) is torch.Tensor and torch.equal(mask, sdpa_mask(**arguments))


def test_whoever_looks_into_a_mask_finds_its_elements():
    seen = Causality(window=4, padding=PADDING)
    mask, dense = CausalMask(ENTRIES, LENGTH, "cpu", seen), seen.mask(ENTRIES, LENGTH, "cpu")
    assert mask.shape == dense.shape and mask.dtype == dense.dtype and mask.device == dense.device
    assert mask.stride() == (0, 0, 0, 0)
    for function in (
        lambda m: m[:, :, :, :5],
        lambda m: torch.where(m, 0.0, -1.0),
        lambda m: m.sum(),
        lambda m: m.to(torch.float32),
        lambda m: ~m,
        lambda m: m.clone(),
        lambda m: torch.cat([m, m]),
        lambda m: torch.nn.functional.scaled_dot_product_attention(
            *[torch.ones(2, 1, 9, 4)] * 3, attn_mask=m
        ),
        lambda m: checkpoint(
            lambda x, n: x + n, torch.ones(2, 1, 9, 9, requires_grad=True), m, use_reentrant=True
        ),
    ):
        found = function(mask)
        assert type(found) is torch.Tensor and torch.equal(found, function(dense))


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("what", ["window", "padding", "documents"])
def test_where_no_kernel_serves_pytorch_has_the_same_mask(what, softcap, monkeypatch):
    q, k, v = torch.randn(2, 4, 9, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    documents = Documents.beginning(NUMBERS.diff(dim=1, prepend=NUMBERS[:, :1]) != 0)
    seen = Causality(
        **{"window": {"window": 4}, "padding": {"padding": PADDING}}.get(what, {"documents": documents})
    )
    mask, module = CausalMask(ENTRIES, LENGTH, "cpu", seen), torch.nn.Module()
    expected, _ = attention.attention_forward(module, q, k, v, mask, softcap=softcap)
    monkeypatch.setattr(attention, "goes_to_pytorch", lambda *_: True)
    found, _ = attention.attention_forward(module, q, k, v, mask, softcap=softcap)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    dense, _ = attention.attention_forward(module, q, k, v, mask.dense(), softcap=softcap)
    torch.testing.assert_close(expected, dense, rtol=1e-4, atol=1e-5)
    biased, _ = attention.attention_forward(module, q, k, v, mask, position_bias=torch.zeros(1, 1, 9, 9))
    plain, _ = attention.attention_forward(
        module, q, k, v, mask.dense(), position_bias=torch.zeros(1, 1, 9, 9)
    )
    torch.testing.assert_close(biased, plain, rtol=1e-4, atol=1e-5)
