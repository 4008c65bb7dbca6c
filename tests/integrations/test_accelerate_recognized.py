"""`accelerate` on models that are known by the code of their forward: Llama's kind, of many names."""

import ast
import copy
import pickle

import pytest
import torch
import transformers
from torch import nn

import fastgpt
from fastgpt.integrations import decoder_patterns, patterns
from fastgpt.integrations.fingerprint import digest, fingerprint
from fastgpt.integrations.replacement import Replacement
from tests.support.client_models import VOCAB, assert_same, batch, loss_and_gradients

SIZES = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    intermediate_size=48, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    attention_dropout=0.0,
)  # fmt: skip
NORM, LAYER, MLP, GEMMA, HEAD = "rms_norm", "add_rms_norm", "swiglu", "geglu", "linear_cross_entropy"
# Options of the configuration, and the ops that a training step must call beside attention.
ROPE = "rope"
FAMILIES = {
    "Llama": ({}, {NORM, LAYER, MLP, HEAD, ROPE}),
    "Mistral": ({"sliding_window": 6}, {NORM, LAYER, MLP, HEAD, ROPE}),
    "Qwen2": ({}, {NORM, LAYER, MLP, HEAD, ROPE}),
    "Qwen3": ({"head_dim": 8}, {NORM, LAYER, MLP, HEAD, ROPE}),
    "Gemma": ({"head_dim": 8}, {NORM, LAYER, GEMMA, HEAD, ROPE}),
    "Gemma2": ({"head_dim": 8, "final_logit_softcapping": 2.0}, {NORM, GEMMA, HEAD, ROPE}),
    "Olmo2": ({}, {NORM, MLP, HEAD, ROPE}),
    "SmolLM3": ({}, {NORM, LAYER, MLP, HEAD}),
    "Mixtral": ({"num_local_experts": 2}, {NORM, LAYER, HEAD, ROPE}),
    "Qwen2Moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        {NORM, MLP, HEAD},
    ),
    "Granite": ({"logits_scaling": 3.0}, {NORM, MLP, ROPE, HEAD}),
    "Cohere": ({"logit_scale": 0.25}, {MLP, HEAD}),
    "Helium": ({"head_dim": 8}, {LAYER, MLP, HEAD}),
    "Ernie4_5": ({}, {NORM, LAYER, MLP, HEAD}),
    "Glm4Moe": (  # rotates the first half of the channels
        {
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        {NORM, LAYER, MLP, ROPE},
    ),
    "Exaone4": ({"sliding_window": 6}, {NORM, MLP, HEAD}),
}


def build(name, **options):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **FAMILIES[name][0], **options})
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def called(model, inputs):
    return {decision.op for decision in fastgpt.explain(model, **inputs).decisions}


@pytest.mark.parametrize("padding", [None, "left", "right"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_stay_and_restore_undoes_all(name, training, padding):
    model, inputs = build(name).train(training), batch(name, padding)
    classes = {key: type(module) for key, module in model.named_modules()}
    attributes, keys = set(vars(model)), list(model.state_dict())
    if name == "Gemma2" and padding == "left":  # "eager" gives a row of padding alone a mean, the kernels 0
        inputs["labels"] = inputs["labels"].masked_fill(inputs["attention_mask"].cumsum(1) == 1, -100)
    before = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    assert list(model.state_dict()) == keys
    assert_same(before, loss_and_gradients(model, inputs))
    if training:
        found = called(model, inputs)
        assert FAMILIES[name][1] <= found, found
    fastgpt.restore(model)
    assert {key: type(module) for key, module in model.named_modules()} == classes
    assert set(vars(model)) == attributes
    assert torch.equal(loss_and_gradients(model, inputs)[0], before[0])


@pytest.mark.parametrize("name", ["Llama", "Gemma2", "Mixtral"])
def test_outputs_generation_and_hidden_states_are_the_same(name):
    model = build(name).eval()
    tokens = batch(name)["input_ids"]
    options = dict(max_new_tokens=5, do_sample=False)
    expected = model(tokens, output_hidden_states=True), model.generate(tokens, **options)
    fastgpt.accelerate(model)
    found = model(tokens, output_hidden_states=True), model.generate(tokens, **options)
    assert torch.equal(found[1], expected[1])
    torch.testing.assert_close(found[0].logits, expected[0].logits, rtol=1e-4, atol=1e-5)
    assert len(found[0].hidden_states) == len(expected[0].hidden_states) == 3
    for ours, theirs in zip(found[0].hidden_states, expected[0].hidden_states, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_replaced_model_is_copied_pickled_and_saved(tmp_path):
    model, inputs = build("Llama"), batch("Llama")
    fastgpt.accelerate(model)
    loss = model(**inputs).loss
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(**inputs).loss, loss)
        assert called(other, inputs) == called(model, inputs)
        fastgpt.restore(other)
        assert not any(isinstance(module, Replacement) for module in other.modules())
    torch.save(model, tmp_path / "model.pt")
    assert torch.equal(torch.load(tmp_path / "model.pt", weights_only=False)(**inputs).loss, loss)
    model.save_pretrained(tmp_path / "saved")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved").train()
    assert type(again) is transformers.LlamaForCausalLM
    torch.testing.assert_close(again(**inputs).loss, loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["Llama", "Gemma", "Olmo2"])
def test_results_keep_their_dtype(name, dtype):
    model, inputs = build(name).to(dtype), batch(name)
    expected = model(**inputs)
    fastgpt.accelerate(model)
    loss = model(**inputs).loss
    assert loss.dtype == expected.loss.dtype
    tolerance = {torch.float64: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(loss, expected.loss, rtol=tolerance, atol=tolerance)
    logits = model.eval()(inputs["input_ids"]).logits
    assert logits.dtype == expected.logits.dtype == dtype


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_autocast_and_gradient_checkpointing_give_the_same(name):
    model, inputs = build(name), batch(name)

    def loss():
        with torch.autocast("cpu", torch.bfloat16):
            return model(**inputs).loss

    expected = loss()
    fastgpt.accelerate(model)
    torch.testing.assert_close(loss(), expected, rtol=2e-2, atol=2e-2)
    plain = loss_and_gradients(model, inputs)
    model.gradient_checkpointing_enable()
    assert_same(plain, loss_and_gradients(model, inputs))


def test_a_compiled_model_has_the_same_loss():
    model, inputs = build("Gemma2"), batch("Gemma2")
    expected = loss_and_gradients(model, inputs)
    fastgpt.accelerate(model)
    torch._dynamo.reset()
    loss = torch.compile(model, backend="aot_eager")(**inputs).loss
    torch.testing.assert_close(loss, expected[0], rtol=1e-5, atol=1e-5)
    model.zero_grad()
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[1][name], rtol=1e-3, atol=1e-5)


def test_the_loss_of_a_router_is_kept():
    model, inputs = build("Mixtral", num_local_experts=4), batch("Mixtral")
    inputs["output_router_logits"] = True
    expected = model(**inputs)
    assert expected.aux_loss > 0
    fastgpt.accelerate(model)
    found = model(**inputs)
    torch.testing.assert_close(found.loss, expected.loss)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    del inputs["output_router_logits"]
    assert HEAD in called(model, inputs)


def test_hooks_and_other_modules_in_place_of_norm_gate_and_head_are_called():
    model, inputs, seen = build("Llama"), batch("Llama"), []
    layer = model.model.layers[0]
    expected = model(**inputs).loss
    fastgpt.accelerate(model)
    handles = [
        module.register_forward_hook(lambda *_: seen.append(1))
        for module in (layer.post_attention_layernorm, layer.mlp.act_fn, model.lm_head)
    ]
    torch.testing.assert_close(model(**inputs).loss, expected)
    assert len(seen) == 3
    for handle in handles:
        handle.remove()
    doubled = nn.Sequential(layer.post_attention_layernorm)
    layer.post_attention_layernorm = doubled
    torch.testing.assert_close(model(**inputs).loss, expected)


@pytest.mark.parametrize("option", ["rms_norm", "rope", "swiglu", "cross_entropy"])
def test_an_option_leaves_its_part_alone(option):
    model, inputs = build("Llama"), batch("Llama")
    report = fastgpt.accelerate(model, **{option: False})
    gone = {"rms_norm": {NORM, LAYER}, "rope": {ROPE}, "swiglu": {MLP}, "cross_entropy": {HEAD}}[option]
    assert not gone & called(model, inputs)
    assert any(f"{option}=False" in entry.detail for entry in report.left)


def test_a_rotation_that_differs_is_left_to_the_model(monkeypatch):
    llama = transformers.models.llama.modeling_llama
    attention = llama.LlamaAttention

    def rotate_half(x):
        return torch.cat((x[..., x.shape[-1] // 2 :], -x[..., : x.shape[-1] // 2]), dim=-1)

    assert decoder_patterns.RotaryAttention.fits(attention, None)
    for name, other in (
        ("rotate_half", rotate_half),
        ("apply_rotary_pos_emb", lambda q, k, cos, sin: (q, k)),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(llama, name, other)
            assert not decoder_patterns.RotaryAttention.fits(attention, None)
    with monkeypatch.context() as patched:
        patched.setattr(llama.LlamaRotaryEmbedding, "forward", lambda self, x, position_ids: (x, x))
        assert not decoder_patterns.RotaryAttention.fits(attention, None)


def test_a_cache_given_by_its_former_name_is_still_used():
    """The decorators of an attention's forward are kept."""
    model = build("Llama").eval()
    fastgpt.accelerate(model)
    layer, cos = model.model.layers[0].self_attn, torch.ones(1, 3, 8)
    cache = transformers.DynamicCache()
    x = torch.randn(2, 3, 32)
    layer(x, position_embeddings=(cos, 0 * cos), attention_mask=None, past_key_values=cache)
    assert cache.get_seq_length() == 3


def test_a_head_that_is_no_linear_layer_still_gets_the_loss_on_logits():
    model, inputs = build("Llama"), batch("Llama")
    model.lm_head = nn.Sequential(model.lm_head)
    expected = loss_and_gradients(model, inputs)
    report = fastgpt.accelerate(model)
    assert any("its head is a Sequential" in entry.detail for entry in report.left)
    assert "cross_entropy" in called(model, inputs)
    assert_same(expected, loss_and_gradients(model, inputs))
    assert model(**inputs).logits is not None
    fastgpt.restore(model)
    assert "_loss_function" not in vars(model)


def test_changed_code_is_left_as_it_was():
    class Changed(transformers.models.llama.modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states):
            input_dtype = hidden_states.dtype
            hidden_states = hidden_states.to(torch.float32)
            variance = hidden_states.pow(2).sum(-1, keepdim=True)
            hidden_states = hidden_states * torch.rsqrt(variance + self.variance_epsilon)
            return self.weight * hidden_states.to(input_dtype)

    class Inherited(transformers.models.llama.modeling_llama.LlamaRMSNorm):
        pass

    assert patterns.replacement_of(Changed(8)) is None
    assert patterns.replacement_of(Inherited(8)) is None  # it may have changed what forward calls
    assert patterns.replacement_of(transformers.models.llama.modeling_llama.LlamaRMSNorm(8)) is not None
    assert patterns.replacement_of(nn.Linear(2, 2)) is None


def test_an_activation_that_is_no_known_gate_is_refused():
    model, inputs = build("Llama", hidden_act="relu"), batch("Llama")
    report = fastgpt.accelerate(model)
    assert any("its gate is no SiLU or GELU that is known" in entry.detail for entry in report.left)
    assert MLP not in called(model, inputs)


def test_fingerprints_see_code_and_arguments_alone():
    def plain(x, y=1):
        return x + y

    def annotated(x: int, y: int = 1) -> int:
        """Add."""
        total: int = x + y  # a comment
        return total

    def assigned(x, y=1):
        total = x + y
        return total

    def renamed(z, y=1):
        return z + y

    def other(x, y=2):
        return x + y

    assert fingerprint(annotated) == fingerprint(assigned)
    assert len({fingerprint(f) for f in (plain, assigned, renamed, other)}) == 4
    assert fingerprint(len) is None
    # What it is must not depend on the version of Python.
    assert (
        digest(ast.parse("def f(self, x):\n    return [x, (1, 'a'), f'{x}!', *x]").body[0])
        == "7aaed7037cc2ba46"
    )


def test_the_patterns_serve_over_a_hundred_classes_of_transformers():
    import pathlib

    known = {code for pattern in patterns.PATTERNS for code in pattern.code}
    found = 0
    for path in pathlib.Path(transformers.__file__).parent.glob("models/*/modeling_*.py"):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.ClassDef):
                forward = [f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "forward"]
                found += any(digest(function) in known for function in forward)
    assert found > 200, f"transformers {transformers.__version__}: new fingerprints are needed"


@pytest.mark.parametrize("name", ["Llama", "Gemma2"])
def test_a_graph_that_breaks_within_the_model_has_the_same_loss(name, monkeypatch):
    model, inputs = build(name), batch(name)
    expected = model(**inputs).loss
    fastgpt.accelerate(model)
    kind = type(model.model.layers[0].mlp)
    whole = kind.forward

    def broken(self, x):
        torch._dynamo.graph_break()
        return whole(self, x)

    monkeypatch.setattr(kind, "forward", broken)
    torch._dynamo.reset()
    found = torch.compile(model, backend="aot_eager")(**inputs).loss
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
