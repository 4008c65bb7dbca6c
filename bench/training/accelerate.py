"""Training steps of transformers models with and without `fastgpt.accelerate`: `python -m bench accelerate`.

The contenders are the unmodified model, the compiled model, the model with the kernels of Liger-Kernel, and the
accelerated model, all with the same weights and batches. The unmodified model is the reference for the losses. The
losses are compared without dropout; the timed steps have the dropout of the model's configuration.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

import fastgpt
from bench.harness.machine import Machine
from bench.harness.measure import Plan
from bench.harness.peers import require
from bench.harness.records import Record
from bench.training.steps import Peer, name, run_steps, tokens_and_targets
from bench.training.train import LigerLoss

PEERS = ("unmodified", "torch.compile", "transformers + Liger-Kernel")

FAMILIES = ("GPT2LMHeadModel", "BertForMaskedLM", "ElectraForPreTraining")
# L layers, H heads, C width, T length, B sequences per step, V vocabulary; with GPT-2 124M and ELECTRA-Small.
SIZES: dict[str, list[tuple[str, dict[str, int]]]] = {
    "tiny": [("GPT2LMHeadModel", {"L": 1, "H": 2, "C": 32, "T": 16, "B": 2, "V": 256})],
    "quick": [("GPT2LMHeadModel", {"L": 6, "H": 6, "C": 384, "T": 256, "B": 4, "V": 50257})],
    "cpu": [
        ("GPT2LMHeadModel", {"L": 6, "H": 6, "C": 384, "T": 256, "B": 4, "V": 50257}),
        ("GPT2LMHeadModel", {"L": 12, "H": 12, "C": 768, "T": 512, "B": 2, "V": 50257}),
        ("BertForMaskedLM", {"L": 4, "H": 8, "C": 512, "T": 256, "B": 8, "V": 30522}),
        ("ElectraForPreTraining", {"L": 12, "H": 4, "C": 256, "T": 128, "B": 16, "V": 30522}),
    ],
    "gpu": [
        ("GPT2LMHeadModel", {"L": 12, "H": 12, "C": 768, "T": 1024, "B": 16, "V": 50257}),
        ("BertForMaskedLM", {"L": 12, "H": 12, "C": 768, "T": 512, "B": 32, "V": 30522}),
        ("ElectraForPreTraining", {"L": 12, "H": 4, "C": 256, "T": 128, "B": 128, "V": 30522}),
    ],
}
_SHARE = 0.15  # share of masked tokens (BERT) or replaced tokens (ELECTRA)


class _Loss(nn.Module):
    """Module from (tokens, labels) to the loss of a transformers model, on a backend of fastgpt if one is given."""

    def __init__(self, model: Any, backend: str | None = None) -> None:
        super().__init__()
        self.model, self.backend = model, backend

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        if self.backend is None:
            return self.model(input_ids=tokens, labels=labels).loss
        with fastgpt.use_backend(self.backend):
            return self.model(input_ids=tokens, labels=labels).loss


class _LigerLoss(LigerLoss):
    """`LigerLoss` for labels that are not shifted."""

    def forward(self, tokens: Tensor, labels: Tensor) -> Tensor:
        return super().forward(tokens, nn.functional.pad(labels, (0, 1), value=-100)[:, 1:])


def run_accelerate(
    family: str, size: dict[str, int], dtype: str, machine: Machine, plan: Plan, compared: int = 8
) -> list[Record]:
    """Check and time every contender on one model.

    Args:
        family: name of a class in transformers.
        compared: number of steps whose losses are compared before the timing.

    Returns:
        One record for each contender, our backends first.
    """
    torch.manual_seed(0)
    model = _model(family, size)
    dropout = {path: module.p for path, module in model.named_modules() if isinstance(module, nn.Dropout)}
    _set_dropout(model, dict.fromkeys(dropout, 0.0))
    copies: list[Any] = []

    def copied() -> Any:
        copies.append(copy.deepcopy(model))
        return copies[-1]

    def restore_dropout() -> None:
        for trained in copies:
            _set_dropout(trained, dropout)
        torch._dynamo.reset()  # otherwise it compiles for a variable dropout rate, which is slower

    peers = [
        Peer(PEERS[0], "transformers", lambda: _Loss(copied())),
        Peer(PEERS[1], "torch", lambda: _Loss(copied()), compiled=True),
    ]
    if family.startswith("GPT2"):  # Liger-Kernel does not support the others
        peers.append(Peer(PEERS[2], "liger-kernel", lambda: _LigerLoss(copied())))
    batches = [(tokens, _labels(family, tokens)) for tokens, _ in tokens_and_targets(size, compared)]
    counted = sum(int((labels != -100).sum()) for _, labels in batches) / sum(t.numel() for t, _ in batches)
    case = f"{family} {name(size)}"
    flops = _flops(model, size, counted)
    facts = {"op": "accelerate", "case": case, "dims": size, "dtype": dtype, "flops": flops}
    return run_steps(
        facts,
        lambda backend: _Loss(fastgpt.accelerate(copied()).model, backend),
        peers,
        lambda: _Loss(copy.deepcopy(model)),
        batches,
        machine,
        plan,
        restore_dropout,
    )


def _set_dropout(model: nn.Module, dropout: dict[str, float]) -> None:
    for path, p in dropout.items():
        module: Any = model.get_submodule(path)
        module.p = p


def _model(family: str, size: dict[str, int]) -> Any:
    library = require("transformers", "transformers")
    cls = getattr(library, family)
    if family.startswith("GPT2"):
        config = library.GPT2Config(
            vocab_size=size["V"], n_positions=size["T"], n_embd=size["C"], n_layer=size["L"], n_head=size["H"],
            use_cache=False, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
    else:
        config = cls.config_class(
            vocab_size=size["V"], max_position_embeddings=size["T"], hidden_size=size["C"], num_hidden_layers=size["L"],
            num_attention_heads=size["H"], intermediate_size=4 * size["C"],
        )  # fmt: skip
    return cls(config).train()


def _labels(family: str, tokens: Tensor) -> Tensor:
    """Create labels for the training task of the family."""
    if family.startswith("GPT2"):
        return tokens
    chosen = torch.rand(tokens.shape) < _SHARE
    return tokens.masked_fill(~chosen, -100) if "MaskedLM" in family else chosen.long()


def _flops(model: Any, size: dict[str, int], counted: float) -> float:
    """Count the operations of a step: two per matrix weight and token forward, four backward.

    The weights of the head count for the share `counted` of the tokens, those with a label. The two products of
    attention count half if it is causal.
    """
    head = model.get_output_embeddings()
    layers = [m for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor) and m is not head]
    weights = sum(m.weight.numel() for m in layers if m.weight.dim() == 2 and not isinstance(m, nn.Embedding))
    weights += counted * head.weight.numel() if isinstance(head, nn.Linear) else 0
    causal = type(model).__name__.startswith("GPT2")
    attention = 2 * size["L"] * size["T"] * size["C"] * (0.5 if causal else 1.0)
    return 6.0 * size["B"] * size["T"] * (weights + attention)
