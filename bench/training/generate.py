"""Text generation: `python -m bench generate`.

A GPT-2 continues prompts greedily. The contenders have the same weights: our model with and without its KV cache, and
transformers' `generate` with its growing and its static cache. Before the timing, every generated token is checked
with float64 logits of the sequence: its logit must be the largest, up to rounding. Let e be the error of the
reference's logits in the dtype of the run. The logit of a token of ours may be 2·2e below the largest, that of a peer
2·10e: two logits with an error of 2e (10e) can change their order if they differ by at most twice that.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastgpt
from bench.harness.machine import DTYPES, Machine
from bench.harness.measure import (
    OUR_FACTOR,
    PEER_FACTOR,
    Contender,
    Plan,
    Turn,
    measure_peak_memory,
    ratio,
    time_rounds,
)
from bench.harness.peers import MissingError, require
from bench.harness.records import Record
from bench.training.steps import name, tokens_and_targets
from bench.training.train import transformers_model
from fastgpt.model import GPT, GPTConfig

# L layers, H heads, C width, T tokens of a prompt, N new tokens, B prompts, V vocabulary.
SIZES = {
    "tiny": [{"L": 1, "H": 2, "C": 32, "T": 8, "N": 8, "B": 2, "V": 256}],
    "quick": [{"L": 6, "H": 6, "C": 384, "T": 64, "N": 64, "B": batch, "V": 256} for batch in (1, 8)],
    "cpu": [
        {"L": 6, "H": 6, "C": 384, "T": 64, "N": 256, "B": 1, "V": 256},
        {"L": 6, "H": 6, "C": 384, "T": 64, "N": 256, "B": 8, "V": 256},
        {"L": 12, "H": 12, "C": 768, "T": 64, "N": 64, "B": 1, "V": 50257},  # GPT-2 124M
    ],
    "gpu": [{"L": 12, "H": 12, "C": 768, "T": 64, "N": 256, "B": batch, "V": 50257} for batch in (1, 8)],
}
PEERS = ("without the cache", "transformers", "transformers, static cache")

Generate = Callable[[Tensor], Tensor]  # from prompts (B, T) to (B, T + N)


def run_generate(
    size: dict[str, int], dtype: str, machine: Machine, plan: Plan, compared: int = 0
) -> list[Record]:
    """Check and time every contender on one size.

    Args:
        compared: unused; part of the common signature with `run_train`.

    Returns:
        One record for each contender, our backends first.
    """
    torch.manual_seed(0)
    config = GPTConfig(
        vocab_size=size["V"],
        block_size=size["T"] + size["N"],
        n_layer=size["L"],
        n_head=size["H"],
        n_embd=size["C"],
    )
    model = _scale_weights(GPT(config)).to(machine.device).eval()
    prompts = tokens_and_targets(size, 1)[0][0].to(machine.device)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        contenders = list(_contenders(model, dtype, size, plan))
        for contender in contenders:
            _check(contender, model, dtype, prompts)

        def turn(contender: Contender, number: int) -> Turn:
            assert contender.function is not None
            return lambda: None, partial(contender.function, prompts)

        time_rounds("generate", contenders, turn, machine, plan, whole=True)
        for contender in contenders:
            if contender.status == "ok":
                measure_peak_memory(contender, turn(contender, 0), machine)
    facts = {"op": "generate", "case": name(size), "dims": size, "dtype": dtype} | _lower_bounds(
        model, size, dtype
    )
    return [_record(facts, contender, contenders, machine) for contender in contenders]


@torch.no_grad()
def _scale_weights(model: GPT) -> GPT:
    """Draw larger weights than those of the initialization, and return the model.

    With the initial weights the predictions hardly depend on the context, so a wrong cache would not be detected.
    """
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(0.0, 2.0 * parameter.shape[1] ** -0.5)
    return model


def _contenders(model: GPT, dtype: str, size: dict[str, int], plan: Plan) -> Iterator[Contender]:
    count = size["N"]

    def ours(backend: str) -> Generate:
        own = copy.deepcopy(model).to(DTYPES[dtype])

        def generate(prompts: Tensor) -> Tensor:
            with fastgpt.use_backend(backend):
                return own.generate(prompts, count, temperature=0)

        return generate

    def without_cache() -> Generate:
        own = copy.deepcopy(model).to(DTYPES[dtype])

        def generate(tokens: Tensor) -> Tensor:
            for _ in range(count):
                chosen = own.lm_head(own.hidden_states(tokens)[:, -1:]).float().argmax(dim=-1)
                tokens = torch.cat((tokens, chosen), dim=1)
            return tokens

        return generate

    def transformers(**options: Any) -> Generate:
        require("transformers", "transformers")
        own: Any = transformers_model(model.config, model.state_dict()).eval()
        own.to(model.wte.weight.device, DTYPES[dtype])
        own.config.use_cache = own.generation_config.use_cache = True

        def generate(prompts: Tensor) -> Tensor:
            return own.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=count,
                min_new_tokens=count,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                **options,
            )

        return generate

    for backend in plan.ours("attention"):
        yield Contender(backend, None, partial(ours, backend))
    peers: list[tuple[str, Callable[[], Generate]]] = [
        ("fastgpt", without_cache),
        ("transformers", transformers),
        ("transformers", partial(transformers, cache_implementation="static")),
    ]
    for peer, (package, make) in zip(PEERS, peers, strict=True):
        if plan.includes(peer):
            yield Contender(package, peer, make)


def _check(contender: Contender, model: GPT, dtype: str, prompts: Tensor) -> None:
    """Run a contender, and mark it as wrong if one of its tokens does not have the largest logit."""
    try:
        contender.function = contender.make()
        tokens = contender.function(prompts)
    except MissingError as error:
        return contender.fail("missing", error)
    except Exception as error:
        return contender.fail("failed", error)
    length, width = prompts.shape[1], model.config.block_size
    if tokens.shape != (len(prompts), width) or not torch.equal(tokens[:, :length], prompts):
        return contender.fail(
            "wrong",
            f"the output of shape {tuple(tokens.shape)} is not the prompts with {width - length} new tokens each",
        )
    exact, rounded = (
        _logits(model, tokens[:, :-1], t)[:, length - 1 :] for t in (torch.float64, DTYPES[dtype])
    )
    chosen = exact.gather(2, tokens[:, length:, None])[..., 0]
    gap = float((exact.amax(dim=2) - chosen).max())
    off = float((rounded - exact).abs().max())
    bound = 2 * (OUR_FACTOR if contender.peer is None else PEER_FACTOR) * off
    contender.error = gap / (2 * OUR_FACTOR * off)
    if not gap <= bound:
        contender.fail(
            "wrong", f"the logit of a token is {gap:.2g} below the largest; the limit is {bound:.2g}"
        )


def _logits(model: GPT, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """Compute the logits (B, T, V) of all tokens on the reference in `dtype`; the result is float64."""
    with fastgpt.use_backend("reference"):
        logits = copy.deepcopy(model).to(dtype)(tokens)[0]
    assert logits is not None
    return logits.double()


def _lower_bounds(model: GPT, size: dict[str, int], dtype: str) -> dict[str, float]:
    """Return the fields flops and bytes: a pass over the prompts, then one read of every weight per new token."""
    c, width = model.config, 2 if dtype != "fp32" else 4
    matrices = 12 * c.n_layer * c.n_embd**2 + c.vocab_size * c.n_embd
    rows = size["B"] * (size["T"] + size["N"] - 1)
    looked_at = size["B"] * sum(range(1, size["T"] + size["N"]))
    kept = 2 * c.n_layer * c.n_embd * size["B"] * sum(range(size["T"], size["T"] + size["N"]))
    return {
        "flops": 2 * matrices * rows + 4 * c.n_layer * c.n_embd * looked_at,
        "bytes": width * (matrices * size["N"] + kept),
    }


def _record(facts: Record, contender: Contender, contenders: list[Contender], machine: Machine) -> Record:
    bandwidth, matmul_peak = machine.roofline_bounds(facts["dtype"])
    moving, computing = facts["bytes"] / bandwidth, facts["flops"] / matmul_peak
    record = contender.record() | facts | {"group": "generate", "direction": "generate"}
    record |= {
        "roofline_seconds": max(moving, computing),
        "bound": "memory" if moving > computing else "compute",
    }
    if contender.status == "ok":
        record |= contender.summary("generate") | {"peak_bytes": contender.peak_bytes}
        record["share_of_roofline"] = record["roofline_seconds"] / record["seconds"]
        record["tokens_per_second"] = facts["dims"]["B"] * facts["dims"]["N"] / record["seconds"]
        record |= ratio(contender, "generate", contenders)
    return record
