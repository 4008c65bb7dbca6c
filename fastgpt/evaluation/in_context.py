"""How much a model learns from its context: `fastgpt eval --in-context`.

Three measurements, each with a 95 % interval:

- the loss by position in the context, on a text: what every further token of context is worth;
- the induction score (Olsson et al. 2022): a random word of n distinct tokens, twice; how often the most likely token
  is the right one in the second pass, where copying what followed the first time is all it takes, and in the first,
  where nothing helps;
- k-shot accuracy on classes of functions (in the spirit of Garg et al. 2022): k examples x y of a function drawn from
  the class, then x, and whether the most likely token is y.

Tokens are drawn from an alphabet, the words of the model's tokenizer (`alphabet`), in which the most likely token is
looked for, so that chance is one over its size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastgpt import data
from fastgpt.backends import use_backend
from fastgpt.checkpoints.load import open_model
from fastgpt.device import resolve_device
from fastgpt.evaluation import bootstrap
from fastgpt.evaluation.bootstrap import Estimate
from fastgpt.evaluation.perplexity import check_loss, read_texts, spans
from fastgpt.generation.decode import UNUSABLE
from fastgpt.json_io import finite
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

SEQUENCES = 256  # of each kind
_AT_ONCE = 8192  # tokens a forward pass
_LOGITS_AT_ONCE = 1 << 26  # of them, where the logits are needed
_SYMBOLS = 8  # inputs that a function is defined on
_Generator = np.random.Generator


@dataclass(frozen=True)
class Induction:
    """The accuracy in both passes over a random word of `length` tokens."""

    length: int
    first: Estimate
    second: Estimate


@dataclass(frozen=True)
class Shots:
    """The accuracy after `shots` examples of a function of the class `functions`."""

    functions: str
    shots: int
    accuracy: Estimate


@dataclass(frozen=True)
class Position:
    """The loss, in nats a token, of the targets at positions first..last (from 1) of their window."""

    first: int
    last: int
    loss: Estimate


@dataclass(frozen=True)
class InContext:
    """All that is found; `chance` is the accuracy of guessing, `positions` are those of a text, if there is one."""

    chance: float
    induction: list[Induction]
    shots: list[Shots]
    positions: list[Position]

    def as_dict(self) -> dict[str, Any]:
        """The same as JSON can hold it."""
        return finite(asdict(self))

    def table(self) -> str:
        """The same for people."""
        lines = [f"induction (chance {self.chance:.2%})", "length   first pass                  second pass"]
        lines += [
            f"{item.length:<7}{_percent(item.first):<28}{_percent(item.second)}" for item in self.induction
        ]
        lines += ["", f"k-shot accuracy (chance {self.chance:.2%})", "functions  k   accuracy"]
        lines += [f"{item.functions:<10}{item.shots:>2}  {_percent(item.accuracy)}" for item in self.shots]
        if self.positions:
            lines += ["", "position   loss, nats/token"]
        for item in self.positions:
            span = f"{item.first}" if item.first == item.last else f"{item.first}-{item.last}"
            lines.append(f"{span:<9}  {item.loss.value:.4f} ({item.loss.low:.4f} to {item.loss.high:.4f})")
        return "\n".join(lines)


def in_context(
    checkpoint: str | Path,
    source: str | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    seed: int = 0,
    text_key: str = "text",
    skip_broken: bool = False,
) -> InContext:
    """Measure a model, in float32; with a text, `source` as `evaluate` takes it, by position too.

    Raises as `evaluate` does, and ValueError for an alphabet or a context that is too small.
    """
    model, tokenizer = open_model(checkpoint)
    model = model.to(resolve_device(device)).eval()
    with use_backend(backend):
        found = measure(model, alphabet(tokenizer, model.config.vocab_size), seed=seed)
        if source is None:
            return found
        text = "".join(read_texts(source, text_key, skip_broken))
        return replace(found, positions=loss_by_position(model, tokenizer.encode(text)))


def alphabet(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """(A,) int64, the ids of all tokens that are words: not spaces, parts of characters, or special."""
    return torch.tensor([i for i, word in enumerate(tokenizer.words()[:vocab_size]) if word])


def measure(model: GPT, tokens: Tensor, *, sequences: int = SEQUENCES, seed: int = 0) -> InContext:
    """Induction and k-shot accuracy of a model in evaluation mode, on an alphabet `tokens` (A,).

    Raises ValueError for an alphabet or a context that is too small.
    """
    block = model.config.block_size
    if len(tokens) < 2 * _SYMBOLS or block < 4:
        raise ValueError(
            f"in-context learning is measured with {2 * _SYMBOLS} tokens and a context of 4, "
            f"not {len(tokens)} and {block}"
        )
    lengths = [n for n in (4, 8, 16, 32, 64, 128, 256) if n <= len(tokens) and 2 * n <= block]
    found = [induction(model, tokens, n, sequences=sequences, seed=seed) for n in lengths or [2]]
    shots = [
        Shots(name, k, k_shot(model, tokens, name, k, sequences=sequences, seed=seed))
        for name in FUNCTIONS
        for k in (0, 1, 2, 4, 8, 16)
        if 2 * k + 1 <= block
    ]
    return InContext(1 / len(tokens), found, shots, [])


def induction(
    model: GPT, tokens: Tensor, length: int, *, sequences: int = SEQUENCES, seed: int = 0
) -> Induction:
    """The induction score for words of `length` distinct tokens."""
    draw = np.random.default_rng((seed, length))
    words = torch.from_numpy(np.stack([draw.permutation(len(tokens))[:length] for _ in range(sequences)]))
    places = torch.cat((words, words), dim=1)
    right = torch.cat([guess == part[:, 1:] for part, guess in _guesses(model, tokens, places)]).double()
    # The guess at place i is for the token at i + 1: the first length - 1 are of the first pass.
    # The first token of the second pass follows none that was seen with a successor; it counts in neither.
    return Induction(
        length, bootstrap.mean(right[:, : length - 1].mean(1)), bootstrap.mean(right[:, length:].mean(1))
    )


def k_shot(
    model: GPT, tokens: Tensor, functions: str, shots: int, *, sequences: int = SEQUENCES, seed: int = 0
) -> Estimate:
    """The accuracy behind x1 y1 … xk yk x, for functions of a class in `FUNCTIONS`."""
    draw = np.random.default_rng((seed, shots, sorted(FUNCTIONS).index(functions)))
    rows, answers = [], []
    for _ in range(sequences):
        x, y = FUNCTIONS[functions](draw, shots, len(tokens))
        rows.append(np.stack((x, y), axis=1).reshape(-1))
        answers.append(y[-1])
    places = torch.from_numpy(np.stack(rows))
    guesses = torch.cat([guess[:, -1] for _, guess in _guesses(model, tokens, places)])
    return bootstrap.mean((guesses == torch.tensor(np.array(answers))).double())


@torch.no_grad()
def loss_by_position(model: GPT, tokens: Tensor, *, windows: int = SEQUENCES) -> list[Position]:
    """The loss of a text, tokens (N,), by position in windows spread evenly over it; an interval over the windows.

    There are fewer windows in a short text, so that they do not overlap, which would make the interval too narrow.
    Raises ValueError for a text that does not fill a window.
    """
    block = model.config.block_size
    windows = max(1, min(windows, (len(tokens) - 1) // block))
    source = data.Stream(tokens, batch_size=min(windows, max(1, _AT_ONCE // block)), block_size=block)
    count = windows // source.batch_size
    device = model.wte.weight.device
    losses = []
    for batch in source.validation_batches(count):
        loss = model(batch.idx.to(device), batch.targets.to(device), reduction="none")[1]
        losses.append(loss.double().cpu())
    by_window = torch.cat(losses)
    check_loss(float(by_window.sum()), "the model")
    return [
        Position(first, last, bootstrap.mean(by_window[:, first - 1 : last].mean(1)))
        for first, last in spans(block)
    ]


def _copy(draw: _Generator, shots: int, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    x = draw.integers(size, size=shots + 1)
    return x, x


def _constant(draw: _Generator, shots: int, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    return draw.integers(size, size=shots + 1), np.full(shots + 1, draw.integers(size))


def _lookup(draw: _Generator, shots: int, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    table = draw.permutation(size)[:_SYMBOLS], draw.integers(size, size=_SYMBOLS)
    shown = draw.integers(_SYMBOLS, size=shots)
    asked = draw.choice(shown, size=1) if shots else draw.integers(_SYMBOLS, size=1)
    chosen = np.concatenate((shown, asked))
    return table[0][chosen], table[1][chosen]


def _shift(draw: _Generator, shots: int, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    x = draw.integers(size, size=shots + 1)
    return x, (x + draw.integers(1, size)) % size


# Classes of functions: (random numbers, k, A) to the k + 1 inputs and outputs of one of them, places in the alphabet.
#   copy:     y = x
#   constant: y = c, drawn for the function
#   lookup:   y is drawn for each of eight symbols x; the symbol asked for is among the examples
#   shift:    y = x + c in the order of the alphabet, which begins anew behind its end
FUNCTIONS: dict[str, Callable[[_Generator, int, int], tuple[NDArray[Any], NDArray[Any]]]] = {
    "copy": _copy,
    "constant": _constant,
    "lookup": _lookup,
    "shift": _shift,
}


@torch.no_grad()
def _guesses(model: GPT, tokens: Tensor, places: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Some rows of places (N, T) in the alphabet, and the place of the most likely token behind each of the first
    T - 1, both on the CPU.
    """
    device = model.wte.weight.device
    at_once = min(_AT_ONCE, _LOGITS_AT_ONCE // model.config.vocab_size)
    for part in places.split(max(1, at_once // places.shape[1])):
        logits = model(tokens[part[:, :-1]].to(device))[0]
        if not logits.amax().isfinite():
            raise FloatingPointError(UNUSABLE)
        yield part, logits[..., tokens.to(device)].argmax(-1).cpu()


def _percent(found: Estimate) -> str:
    return f"{found.value:7.2%} ({found.low:.2%} to {found.high:.2%})"
