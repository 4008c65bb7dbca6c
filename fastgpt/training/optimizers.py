"""Optimizers and learning-rate schedules, by their names in the configuration."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastgpt.training.config import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, …: linear warm-up to lr, then the schedule down to min_lr at max_steps.

    cosine: one period of SGDR (Loshchilov & Hutter 2017).
    linear: a straight line.
    wsd:    warm-up, stable, decay (Hu et al. 2024, MiniCPM): lr, and a straight line over the last decay_steps.
    """
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    begin = config.warmup
    if config.schedule == "wsd":
        begin = max(begin, config.max_steps - config.decay_steps)
    done = min(1.0, max(0, step - begin) / max(1, config.max_steps - begin))
    left = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.min_lr + (config.lr - config.min_lr) * left


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[torch.optim.Optimizer]:
    """The optimizers of a GPT's parameters; each has one part of them. Decay acts on matrices alone.

    adamw: AdamW (Loshchilov & Hutter 2019), its decay decoupled from the gradient.
    adam:  Adam (Kingma & Ba 2015), the decay an L2 term of the gradient.
    muon:  Muon (Jordan et al. 2024) for the matrices of the blocks, its steps scaled to have the size of AdamW's
           (Liu et al. 2025), so that one learning rate is right for both; AdamW for embeddings, head and vectors.
    """
    matrices: list[Tensor] = []
    embeddings: list[Tensor] = []
    vectors: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2:
            vectors.append(parameter)
        else:
            (matrices if name.startswith("h.") else embeddings).append(parameter)
    betas = (config.beta1, config.beta2)
    if config.optimizer == "muon":
        muon = torch.optim.Muon(
            matrices, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw"
        )
        rest = torch.optim.AdamW(_groups(embeddings, vectors, config), lr=config.lr, betas=betas, fused=True)
        return [muon, rest]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    groups = _groups([p for p in model.parameters() if p.dim() >= 2], vectors, config)
    return [kind(groups, lr=config.lr, betas=betas, fused=True)]


def _groups(
    decayed: Sequence[Tensor], others: Sequence[Tensor], config: TrainConfig
) -> list[dict[str, object]]:
    return [
        {"params": list(decayed), "weight_decay": config.weight_decay},
        {"params": list(others), "weight_decay": 0.0},
    ]
