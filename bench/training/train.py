"""Training steps of a GPT-2 and of a Llama: `python -m bench train`.

The contenders are our GPT, plain PyTorch (eager and compiled) and transformers (unmodified and with the kernels of
Liger-Kernel), with the same weights and batches. Plain PyTorch is the reference for the losses.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastgpt
from bench.harness.machine import Machine
from bench.harness.measure import Plan
from bench.harness.peers import require
from bench.harness.records import Record
from bench.training.plain_gpt import PlainGPT
from bench.training.steps import Peer, name, run_steps, tokens_and_targets
from fastgpt.checkpoints import llama_layout
from fastgpt.model import GPT, GPTConfig

# L layers, H heads, C width, T length, B sequences per step, V vocabulary, Hk key heads. A size with Hk is a
# Llama's, others are a GPT-2's.
SIZES = {
    "tiny": [
        {"L": 1, "H": 2, "C": 32, "T": 16, "B": 2, "V": 256},
        {"L": 1, "H": 2, "C": 32, "T": 16, "B": 2, "V": 256, "Hk": 1},
    ],
    "quick": [{"L": 6, "H": 6, "C": 384, "T": 256, "B": 8, "V": 256}],
    "cpu": [
        {"L": 6, "H": 6, "C": 384, "T": 256, "B": 8, "V": 256},
        {"L": 6, "H": 6, "C": 384, "T": 256, "B": 4, "V": 50304},
        {"L": 4, "H": 12, "C": 768, "T": 1024, "B": 1, "V": 50304},
        {"L": 6, "H": 6, "C": 384, "T": 256, "B": 4, "V": 32000, "Hk": 2},
    ],
    "gpu": [{"L": 12, "H": 12, "C": 768, "T": 1024, "B": 16, "V": 50304}],  # GPT-2 124M
}
PEERS = ("PyTorch", "torch.compile", "transformers", "transformers + Liger-Kernel")


def run_train(
    size: dict[str, int], dtype: str, machine: Machine, plan: Plan, compared: int = 8
) -> list[Record]:
    """Check and time every contender on one size.

    Args:
        compared: number of steps whose losses are compared before the timing.

    Returns:
        One record for each contender, our backends first.
    """
    torch.manual_seed(0)
    sizes = dict(n_layer=size["L"], n_head=size["H"], n_embd=size["C"], n_kv_head=size.get("Hk"))
    preset = "llama" if "Hk" in size else "gpt2"
    config = GPTConfig.preset(preset, vocab_size=size["V"], block_size=size["T"], **sizes)
    model = GPT(config)
    weights = model.state_dict()
    flops = model.flops_per_token() * size["B"] * size["T"]
    facts = {"op": "train", "case": name(size), "dims": size, "dtype": dtype, "flops": flops}
    plain = partial(_plain, config, weights)
    peers = [
        Peer(PEERS[0], "torch", plain),
        Peer(PEERS[1], "torch", plain, compiled=True),
        Peer(PEERS[2], "transformers", lambda: TransformersLoss(transformers_model(config, weights))),
        Peer(PEERS[3], "liger-kernel", lambda: LigerLoss(transformers_model(config, weights))),
    ]
    batches = tokens_and_targets(size, compared)
    return run_steps(facts, partial(_Ours, config, weights), peers, plain, batches, machine, plan)


def _plain(config: GPTConfig, weights: dict[str, Tensor]) -> nn.Module:
    model = PlainGPT(config)
    model.load_state_dict(weights)
    return model


def transformers_model(config: GPTConfig, weights: dict[str, Tensor]) -> nn.Module:
    """Return transformers' GPT-2 or Llama with our weights, in training mode and with use_cache=False."""
    library = require("transformers", "transformers")
    if config.norm == "rms":
        return _transformers_llama(library, config, weights)
    model = library.GPT2LMHeadModel(
        library.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    # Conv1D of transformers stores weights as (in, out).
    turned = {
        k: v.T if v.dim() == 2 and k.split(".")[-2] in ("c_attn", "c_proj", "c_fc") else v
        for k, v in weights.items()
    }
    model.load_state_dict(
        {k if k.startswith("lm_head") else f"transformer.{k}": v for k, v in turned.items()}
    )
    return model.train()


def _transformers_llama(library: Any, config: GPTConfig, weights: dict[str, Tensor]) -> nn.Module:
    ours = GPT(config)
    ours.load_state_dict(weights)
    options = library.LlamaConfig(**llama_layout.write_config(config), use_cache=False)
    model = library.LlamaForCausalLM(options)
    model.load_state_dict(llama_layout.write_weights(ours))
    return model.train()


class TransformersLoss(nn.Module):
    """Module from (tokens, targets) to the loss, with the loss function of the model."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model(input_ids=idx, labels=targets, shift_labels=targets).loss


class LigerLoss(TransformersLoss):
    """`TransformersLoss` with Liger-Kernel.

    It has a patch for Llama. For GPT-2 it has none: its LayerNorm and fused linear cross-entropy are put in here.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        liger = require("liger_kernel.transformers", "liger-kernel", triton=True)
        self.is_llama = model.config.model_type == "llama"
        if self.is_llama:
            liger.apply_liger_kernel_to_llama(model=model)
            return
        self.loss = liger.LigerFusedLinearCrossEntropyLoss()
        for parent in list(model.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, nn.LayerNorm):
                    norm = liger.LigerLayerNorm(child.normalized_shape[0], eps=child.eps)
                    norm.weight, norm.bias = child.weight, child.bias
                    setattr(parent, child_name, norm)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        if self.is_llama:
            return super().forward(idx, targets)
        hidden = self.model.transformer(input_ids=idx).last_hidden_state
        return self.loss(self.model.lm_head.weight, hidden.flatten(0, 1), targets.flatten())


class _Ours(nn.Module):
    """Our GPT on a fixed backend."""

    def __init__(self, config: GPTConfig, weights: dict[str, Tensor], backend: str) -> None:
        super().__init__()
        self.model = GPT(config)
        self.model.load_state_dict(weights)
        self.backend = backend

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        with fastgpt.use_backend(self.backend):
            return self.model(idx, targets)[1]
