"""`accelerate` on models whose code looks at its own attention or that are built of several, and on wrapped ones."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderModel,
    LlamaConfig,
    T5Config,
    T5ForConditionalGeneration,
    XLNetConfig,
    XLNetLMHeadModel,
)
from transformers.models.bert.modeling_bert import BertForMaskedLM, BertLMHeadModel, BertModel
from transformers.models.llama.modeling_llama import LlamaForCausalLM

import fastgpt
from fastgpt.integrations.accelerate import _Work
from fastgpt.integrations.attention import attention_forward
from tests.support.client_models import VOCAB, assert_same, batch, loss_and_gradients

SMALL = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=64, pad_token_id=0,
)  # fmt: skip
SPARSE = SMALL | dict(
    num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8,
    n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=1, topk_group=1, index_topk=4,
    index_n_heads=2, index_head_dim=16, first_k_dense_replace=1,
)  # fmt: skip
TOKENS = torch.arange(1, 33).reshape(2, 16)


def of_newer(name):
    """A class that not every version of transformers has."""
    return getattr(transformers, name, None) or pytest.skip(f"this version of transformers has no {name}")


def older_than(version):
    return Version(transformers.__version__) < Version(version)


def details(entries):
    return " ".join(entry.detail for entry in entries)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["GlmMoeDsa", "DeepseekV32"])
def test_sparse_attention_is_left_alone(family, implementation):
    config = of_newer(f"{family}Config")(**SPARSE, attn_implementation=implementation)
    model = of_newer(f"{family}ForCausalLM")(config)
    inputs = batch(type(model).__name__)
    before = loss_and_gradients(model, inputs)
    report = fastgpt.accelerate(model)
    if older_than("5.14"):  # its code does not ask
        with pytest.raises(ValueError, match="has no sparse attention"):
            loss_and_gradients(model, inputs)
        return
    assert "asks whether its attention is 'sdpa'" in details(report.left)
    assert model.config._attn_implementation == implementation
    assert_same(before, loss_and_gradients(model, inputs))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_queries_that_a_model_drops_keep_their_place(implementation):
    config = of_newer("Gemma4TextConfig")(
        **SMALL | {"num_hidden_layers": 4}, vocab_size_per_layer_input=VOCAB, num_key_value_heads=2, head_dim=8,
        global_head_dim=8, hidden_size_per_layer_input=8, sliding_window=64, num_kv_shared_layers=2,
        layer_types=["sliding_attention", "full_attention"] * 2, attn_implementation=implementation,
    )  # fmt: skip
    model = of_newer("Gemma4ForCausalLM")(config).eval()
    with torch.no_grad():
        expected = [model(TOKENS, logits_to_keep=n).logits for n in (1, 3, 0)]
        report = fastgpt.accelerate(model)
        assert "asks whether" in details(report.left) or older_than("5.24")
        torch.testing.assert_close([model(TOKENS, logits_to_keep=n).logits for n in (1, 3, 0)], expected)


@pytest.mark.parametrize("keyword", ["indices", "block_indices", "sinks"])
def test_keyword_that_changes_the_attention_is_an_error(keyword):
    q = torch.randn(1, 2, 3, 4)
    module = torch.nn.Identity()
    out, _ = attention_forward(module, q, q, q, None, **{keyword: None}, sliding_window=4)
    assert out.shape == (1, 3, 2, 4)
    with pytest.raises(ValueError, match=keyword):
        attention_forward(module, q, q, q, None, **{keyword: torch.zeros(2)})


def clip(**implementation):
    part = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4)
    text = part | dict(vocab_size=VOCAB, max_position_embeddings=24, eos_token_id=2, bos_token_id=1)
    config = CLIPConfig(text_config=text, vision_config=part | {"image_size": 16, "patch_size": 8})
    return CLIPModel._from_config(config, attn_implementation=implementation)


def in_force(config):
    return [
        config._attn_implementation,
        *(getattr(config, k)._attn_implementation for k in config.sub_configs),
    ]


MIXED = [
    {"text_config": "eager", "vision_config": "sdpa"},
    {"": "eager", "text_config": "sdpa", "vision_config": "eager"},
]


@pytest.mark.parametrize("implementation", MIXED)
def test_each_part_gets_its_own_implementation_back(implementation):
    model = clip(**implementation)
    before = in_force(model.config)
    report = fastgpt.accelerate(model)
    if older_than("5.2") and "asks whether" in details(report.left):
        pytest.skip("the code of this version compares its implementation with 'eager', and is left alone")
    assert set(in_force(model.config)) == {"fastgpt"}
    copied = copy.deepcopy(model)
    for accelerated in (model, copied):
        fastgpt.restore(accelerated)
        assert in_force(accelerated.config) == before


@pytest.mark.parametrize("implementation", MIXED)
def test_each_part_gets_its_own_implementation_back_after_an_exception(implementation, monkeypatch):
    model = clip(**implementation)
    before = in_force(model.config)

    def failing(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(_Work, "_module", failing)
    with pytest.raises(KeyboardInterrupt):
        fastgpt.accelerate(model)
    assert in_force(model.config) == before


def test_part_that_the_user_switched_since_stays_switched():
    model = clip(text_config="sdpa", vision_config="sdpa")
    fastgpt.accelerate(model)
    model.set_attn_implementation({"text_config": "eager"})
    fastgpt.restore(model)
    assert model.config.text_config._attn_implementation == "eager"
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "sdpa"


def test_encoder_and_decoder_get_their_own_implementation_back():
    def part(implementation, **options):
        return BertConfig(**SMALL, attn_implementation=implementation, **options)

    decoder = BertLMHeadModel(part("sdpa", is_decoder=True, add_cross_attention=True))
    model = EncoderDecoderModel(encoder=BertModel(part("eager")), decoder=decoder)
    before = in_force(model.config)
    fastgpt.accelerate(model)
    fastgpt.restore(model)
    assert in_force(model.config) == before
    assert model.encoder.config._attn_implementation == "eager"


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**SMALL | {"use_cache": False}, num_key_value_heads=2, **options))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("build", [llama, lambda: BertForMaskedLM(BertConfig(**SMALL))])
def test_model_can_be_traced(build):
    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build().eval()

        def forward(self, tokens):
            return self.model(input_ids=tokens).logits

    model = Logits()
    with torch.no_grad():
        expected = model(TOKENS)
        try:
            torch.jit.trace(model, (TOKENS,))
        except IndexError:
            pytest.skip("this version of transformers makes masks that cannot be traced")
        fastgpt.accelerate(model)
        traced = torch.jit.trace(model, (TOKENS,))
        torch.testing.assert_close(traced(TOKENS), expected)


def test_weights_that_are_asked_for_are_an_error_and_the_report_says_it():
    model = llama(attn_implementation="eager")
    assert model(TOKENS, output_attentions=True).attentions[0].shape == (2, 4, 16, 16)
    report = fastgpt.accelerate(model)
    if older_than("5.2") and "asks whether" in details(report.left):
        pytest.skip("the code of this version compares its implementation with 'eager', and is left alone")
    assert "no weights for output_attentions=True" in details(report.replaced)
    with pytest.raises(ValueError, match="set_attn_implementation"):
        model(TOKENS, output_attentions=True)
    with pytest.raises(ValueError, match="Please set it to 'eager'"):
        model.config.output_attentions = True
    model.set_attn_implementation("eager")
    assert len(model(TOKENS, output_attentions=True).attentions) == 2


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
    )


def xlnet():
    return XLNetLMHeadModel(XLNetConfig(vocab_size=VOCAB, d_model=32, n_layer=1, n_head=4, d_inner=48))


@pytest.mark.parametrize("build", [t5, xlnet])
def test_loss_that_a_model_does_not_ask_for_is_not_said_to_be_replaced(build):
    model = build()
    assert "loss_function" not in str(fastgpt.accelerate(model))
    assert "_loss_function" not in vars(model)


def test_loss_of_a_forward_that_calls_the_one_above_is_replaced():
    class Mine(LlamaForCausalLM):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    assert "loss_function" in str(fastgpt.accelerate(Mine(llama().config)))


def test_what_was_accelerated_within_a_model_is_named():
    model = torch.nn.Sequential(torch.nn.Sequential(torch.nn.LayerNorm(4)), torch.nn.GELU())
    fastgpt.accelerate(model[0])
    note = fastgpt.accelerate(model).note
    assert "nothing done: 0 in it" in note
    assert 'fastgpt.restore(model.get_submodule("0"))' in note
    with pytest.raises(ValueError, match=r'restore\(model.get_submodule\("0"\)\)'):
        fastgpt.restore(model)
    fastgpt.restore(model.get_submodule("0"))
    fastgpt.accelerate(model)


def test_compiled_model_stands_for_the_model_within():
    model = torch.nn.Sequential(torch.nn.LayerNorm(4))
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(3, 4)
    expected = compiled(x)
    assert fastgpt.accelerate(compiled).model is compiled
    assert type(model[0]) is not torch.nn.LayerNorm
    torch.testing.assert_close(compiled(x), expected)
    fastgpt.restore(model)
    fastgpt.accelerate(model)
    fastgpt.restore(compiled)
    assert type(model[0]) is torch.nn.LayerNorm


def test_attention_that_came_with_a_shared_config_is_said_to_be_fastgpts():
    first = llama()
    second = LlamaForCausalLM(first.config)
    fastgpt.accelerate(first)
    left = details(fastgpt.accelerate(second).left)
    assert "fastgpt's already" in left
    assert "chosen" not in left
