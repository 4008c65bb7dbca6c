"""Whole training steps:  python -m bench train

The same GPT-2, from the same weights, on the same batches: ours, plain PyTorch (eager and compiled) and
transformers' (plain, and with what Liger-Kernel offers for it). Before a speed counts, the losses of the first
steps must agree with plain PyTorch in float32: ours within twice what plain PyTorch in the dtype of the run is
off, plus a thousandth of a nat; peers within ten times. Then all take steps in turns.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastgpt
from bench.harness import OUR_FACTOR, PEER_FACTOR, Contender, Plan, Turn, race, ratio, summary, weigh
from bench.machine import DTYPES, Machine
from bench.peers import MissingError, require
from bench.plain_gpt import PlainGPT
from bench.records import Record
from fastgpt import data
from fastgpt.model import GPT, GPTConfig

Batch = tuple[Tensor, Tensor]

# Layers, heads, width, length, sequences a step, vocabulary.
SIZES = {
    "tiny": [{"L": 1, "H": 2, "C": 32, "T": 16, "B": 2, "V": 256}],
    "quick": [{"L": 6, "H": 6, "C": 384, "T": 256, "B": 8, "V": 256}],
    "cpu": [
        {"L": 6, "H": 6, "C": 384, "T": 256, "B": 8, "V": 256},
        {"L": 6, "H": 6, "C": 384, "T": 256, "B": 4, "V": 50304},
        {"L": 4, "H": 12, "C": 768, "T": 1024, "B": 1, "V": 50304},
    ],
    "gpu": [{"L": 12, "H": 12, "C": 768, "T": 1024, "B": 16, "V": 50304}],  # GPT-2 124M
}
PEERS = ("PyTorch", "torch.compile", "transformers", "transformers + Liger-Kernel")

_ATOL = 1e-3  # nats
_LR = 3e-4


def name(size: dict[str, int]) -> str:
    """A size as `--shape` takes it: the sizes in the order of SIZES."""
    return "x".join(map(str, size.values()))


def run_train(
    size: dict[str, int], dtype: str, machine: Machine, plan: Plan, compared: int = 8
) -> list[Record]:
    """Check and time every contender on one size; one record each, ours first.

    Args:
        compared: how many steps' losses are compared before timing.
    """
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=size["V"], block_size=size["T"], n_layer=size["L"], n_head=size["H"], n_embd=size["C"]
    )
    weights = GPT(config).state_dict()
    batches = [tuple(t.to(machine.device) for t in batch) for batch in _batches(size, compared)]
    torch._dynamo.reset()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        contenders = list(_contenders(config, weights, machine, dtype, plan))
        exact = _losses(_trainer(_plain(config, weights), machine, "fp32"), batches)
        measure = _losses(_trainer(_plain(config, weights), machine, dtype), batches)
        off = max(abs(a - e) for a, e in zip(measure, exact, strict=True))
        losses = [_check(contender, batches, exact, off) for contender in contenders]
        turn = partial(_turn, batches)
        race("step", contenders, turn, machine, plan)
        for contender in contenders:
            if contender.status == "ok":
                weigh(contender, turn(contender, 0), machine)
    flops = GPT(config).flops_per_token() * size["B"] * size["T"]
    records = [
        _record(size, dtype, c, contenders, curve, flops, machine)
        for c, curve in zip(contenders, losses, strict=True)
    ]
    del contenders
    gc.collect()
    return records


def _batches(size: dict[str, int], count: int) -> list[Batch]:
    """Real text, the standard library's source: bytes, or for a larger vocabulary pairs of bytes."""
    text = torch.frombuffer(
        bytearray("".join(data.load_corpus("stdlib").val).encode()), dtype=torch.uint8
    ).long()
    tokens = text if size["V"] <= 256 else (text[:-1] * 256 + text[1:]) % size["V"]
    return [data.batch(tokens, i, batch_size=size["B"], block_size=size["T"], seed=0) for i in range(count)]


def _plain(config: GPTConfig, weights: dict[str, Tensor]) -> nn.Module:
    model = PlainGPT(config)
    model.load_state_dict(weights)
    return model


def _transformers(config: GPTConfig, weights: dict[str, Tensor]) -> nn.Module:
    library = require("transformers", "transformers")
    model = library.GPT2LMHeadModel(
        library.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.block_size, n_embd=config.n_embd, n_layer=config.n_layer,
            n_head=config.n_head, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
            bos_token_id=0, eos_token_id=0,
        )
    )  # fmt: skip
    # Its Conv1D keeps weights as (in, out).
    turned = {
        k: v.T if v.dim() == 2 and k.split(".")[-2] in ("c_attn", "c_proj", "c_fc") else v
        for k, v in weights.items()
    }
    model.load_state_dict(
        {k if k.startswith("lm_head") else f"transformer.{k}": v for k, v in turned.items()}
    )
    return model.train()


class _TransformersLoss(nn.Module):
    """(tokens, targets) to the loss, through the model's own loss function."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        return self.model(input_ids=idx, labels=targets, shift_labels=targets).loss


class _LigerLoss(_TransformersLoss):
    """The same with Liger's LayerNorm and its fused projection and loss; it has no patch for GPT-2 itself."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        liger = require("liger_kernel.transformers", "liger-kernel", triton=True)
        self.loss = liger.LigerFusedLinearCrossEntropyLoss()
        for parent in list(model.modules()):
            for child_name, child in list(parent.named_children()):
                if isinstance(child, nn.LayerNorm):
                    norm = liger.LigerLayerNorm(child.normalized_shape[0], eps=child.eps)
                    norm.weight, norm.bias = child.weight, child.bias
                    setattr(parent, child_name, norm)

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        hidden = self.model.transformer(input_ids=idx).last_hidden_state
        return self.loss(self.model.lm_head.weight, hidden.flatten(0, 1), targets.flatten())


class _Ours(nn.Module):
    """Our GPT with a backend pinned."""

    def __init__(self, config: GPTConfig, weights: dict[str, Tensor], backend: str) -> None:
        super().__init__()
        self.model = GPT(config)
        self.model.load_state_dict(weights)
        self.backend = backend

    def forward(self, idx: Tensor, targets: Tensor) -> Tensor:
        with fastgpt.use_backend(self.backend):
            return self.model(idx, targets)[1]


def _contenders(
    config: GPTConfig, weights: dict[str, Tensor], machine: Machine, dtype: str, plan: Plan
) -> Iterator[Contender]:
    def trainer(make: Callable[[], nn.Module], compiled: bool = False) -> Callable[[], Callable[..., Tensor]]:
        return lambda: _trainer(make(), machine, dtype, compiled)

    for backend in plan.ours("attention"):
        yield Contender(backend, None, trainer(partial(_Ours, config, weights, backend)))
    found: list[tuple[str, str, Callable[[], nn.Module], bool]] = [
        (PEERS[0], "torch", lambda: _plain(config, weights), False),
        (PEERS[1], "torch", lambda: _plain(config, weights), True),
        (PEERS[2], "transformers", lambda: _TransformersLoss(_transformers(config, weights)), False),
        (PEERS[3], "liger-kernel", lambda: _LigerLoss(_transformers(config, weights)), False),
    ]
    for peer, package, make_peer, compiled in found:
        if plan.wants(peer):
            yield Contender(package, peer, trainer(make_peer, compiled))


def _trainer(model: nn.Module, machine: Machine, dtype: str, compiled: bool = False) -> Callable[..., Tensor]:
    """A function that takes one optimizer step and returns its loss."""
    model = model.to(machine.device)
    forward = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LR, fused=True)

    def step(idx: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(machine.device.type, DTYPES[dtype], enabled=dtype != "fp32"):
            loss = forward(idx, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def _losses(step: Callable[..., Tensor], batches: Sequence[Any]) -> list[float]:
    return [float(loss) for loss in [step(*batch) for batch in batches]]


def _check(contender: Contender, batches: Sequence[Any], exact: list[float], off: float) -> list[float]:
    """The first losses of a contender, which is out if they stray."""
    try:
        contender.function = contender.make()
        losses = _losses(contender.function, batches)
    except MissingError as error:
        contender.fail("missing", error)
        return []
    except Exception as error:
        contender.fail("failed", error)
        return []
    difference = max(abs(a - e) for a, e in zip(losses, exact, strict=True))
    factor = OUR_FACTOR if contender.peer is None else PEER_FACTOR
    bound = factor * off + _ATOL
    contender.error = difference / (OUR_FACTOR * off + _ATOL)
    if not difference <= bound:  # NaN is not
        contender.fail("wrong", f"a step's loss is {difference:.2g} nats off, {bound:.2g} are allowed")
    return losses


def _turn(batches: Sequence[Any], contender: Contender, number: int) -> Turn:
    """A step on the batch of the round; nothing has to be done before it."""
    assert contender.function is not None
    return lambda: None, partial(contender.function, *batches[number % len(batches)])


def _record(
    size: dict[str, int],
    dtype: str,
    contender: Contender,
    contenders: list[Contender],
    losses: list[float],
    flops: float,
    machine: Machine,
) -> Record:
    gemm = machine.roofs(dtype)[1]
    record = contender.record() | {
        "op": "train",
        "group": "train",
        "case": name(size),
        "dims": size,
        "dtype": dtype,
        "direction": "step",
        "flops": flops,
        "roof": flops / gemm,
        "bound": "compute",
        "losses": losses,
    }
    if contender.status == "ok":
        record |= summary(contender.times["step"])
        record["peak_bytes"] = contender.peak_bytes
        rate = flops / record["seconds"]
        sheet = machine.datasheet_flops()
        record["tokens_per_second"] = size["B"] * size["T"] / record["seconds"]
        record["share_of_roof"] = record["mfu_measured"] = rate / gemm
        record["mfu_datasheet"] = rate / sheet[dtype] if sheet else None
        record |= ratio(contender, "step", contenders)
    return record
