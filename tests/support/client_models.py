"""Small models of others, with inputs, for the tests of `accelerate`."""

import torch
from torch import nn
from torch.nn import functional as T
from transformers import BertConfig, ElectraConfig, GPT2Config
from transformers.models.bert import modeling_bert
from transformers.models.electra import modeling_electra
from transformers.models.gpt2.modeling_gpt2 import GPT2LMHeadModel

VOCAB, LENGTH = 211, 24
_BERT = dict(
    vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48,
    max_position_embeddings=64,
)  # fmt: skip


def _gpt2(dropout, **options):
    config = GPT2Config(
        vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=4, bos_token_id=0, eos_token_id=0,
        resid_pdrop=dropout, embd_pdrop=dropout, attn_pdrop=dropout, **options,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _bert(cls, dropout, **options):
    return cls(
        BertConfig(**_BERT, hidden_dropout_prob=dropout, attention_probs_dropout_prob=dropout, **options)
    )


def _electra(cls, dropout, **options):
    config = ElectraConfig(
        **_BERT,
        embedding_size=16,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        **options,
    )
    return cls(config)


FAMILIES = {
    "GPT2LMHeadModel": _gpt2,
    "BertForMaskedLM": lambda p, **o: _bert(modeling_bert.BertForMaskedLM, p, **o),
    "BertForPreTraining": lambda p, **o: _bert(modeling_bert.BertForPreTraining, p, **o),
    "BertLMHeadModel": lambda p, **o: _bert(modeling_bert.BertLMHeadModel, p, is_decoder=True, **o),
    "ElectraForMaskedLM": lambda p, **o: _electra(modeling_electra.ElectraForMaskedLM, p, **o),
    "ElectraForCausalLM": lambda p, **o: _electra(
        modeling_electra.ElectraForCausalLM, p, is_decoder=True, **o
    ),
    "ElectraForPreTraining": lambda p, **o: _electra(modeling_electra.ElectraForPreTraining, p, **o),
}


def build(name, dropout=0.0, **options):
    """A model of the family in training mode, none of its parameters zero or one throughout."""
    model = FAMILIES[name](dropout, **options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def batch(name, padding=None, batch_size=3):
    """Tokens and labels; padding is "left", "right" or None. Labels of padding do not count."""
    tokens = torch.randint(0, VOCAB, (batch_size, LENGTH))
    mask = torch.ones_like(tokens)
    for i, row in enumerate(mask):
        row[
            slice(0, 3 * i) if padding == "left" else slice(LENGTH - 3 * i, LENGTH) if padding else slice(0)
        ] = 0
    given = {"input_ids": tokens, **({"attention_mask": mask} if padding else {})}
    if "ForPreTraining" in name and "Electra" in name:
        return given | {"labels": torch.randint(0, 2, tokens.shape)}
    labels = tokens.masked_fill(mask == 0, -100)
    if "MaskedLM" in name or "PreTraining" in name:
        labels = labels.masked_fill(torch.rand(tokens.shape) < 0.8, -100)
        labels[:, [1, LENGTH // 2]] = 7  # some count, of a part of the batch too
    if name == "BertForPreTraining":
        given["next_sentence_label"] = torch.randint(0, 2, (batch_size,))
    return given | {"labels": labels}


def loss_and_gradients(model, inputs):
    """The loss, and each parameter's gradient by name, of a model of transformers or of one that returns a loss."""
    model.zero_grad()
    output = model(**inputs) if isinstance(inputs, dict) else model(*inputs)
    loss = output if isinstance(output, torch.Tensor) else output.loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(before, after, rtol=2e-4):
    """Loss and gradients agree: each to rtol of itself, or of the model's largest where it is nought by nature (the
    bias of keys, which the softmax cancels).
    """
    torch.testing.assert_close(after[0], before[0], rtol=rtol, atol=0)
    assert before[1].keys() == after[1].keys()
    largest = max(float(g.abs().max()) for g in before[1].values())
    for name, gradient in before[1].items():
        scale = float(gradient.abs().max())
        error = float((after[1][name] - gradient).abs().max())
        assert error <= max(rtol * scale, 1e-6 * largest), f"{name}: off by {error:.2g}, {scale:.2g} at most"


class NanoGPT(nn.Module):
    """A GPT written as people write it: calls of torch.nn.functional, modules of PyTorch."""

    def __init__(self, dropout=0.0):
        super().__init__()
        self.dropout = dropout
        self.wte, self.wpe = nn.Embedding(VOCAB, 32), nn.Embedding(64, 32)
        self.norms = nn.ModuleList(nn.LayerNorm(32) for _ in range(3))
        self.qkv, self.proj = nn.Linear(32, 96), nn.Linear(32, 32)
        self.up, self.down = nn.Linear(32, 128), nn.Linear(128, 32)
        self.head = nn.Linear(32, VOCAB, bias=False)

    def forward(self, tokens, targets):
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        q, k, v = (
            part.unflatten(2, (4, 8)).transpose(1, 2) for part in self.qkv(self.norms[0](x)).chunk(3, -1)
        )
        y = T.scaled_dot_product_attention(
            q, k, v, is_causal=True, dropout_p=self.dropout if self.training else 0.0
        )
        x = x + self.proj(y.transpose(1, 2).flatten(2))
        x = x + self.down(T.gelu(self.up(self.norms[1](x)), approximate="tanh"))
        return T.cross_entropy(self.head(self.norms[2](x)).flatten(0, 1), targets.flatten())
