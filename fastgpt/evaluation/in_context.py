"""In-context learning of a model: `fastgpt eval --in-context`.

Three measurements, each with a 95% confidence interval:

- loss by position in the context, on a text: the benefit of each further token of context; - induction score (Olsson et
al. 2022): a random word of n distinct tokens, twice; the accuracy of the most likely token in the second pass, where
copying the token after the previous occurrence is sufficient, and in the first pass, which is unpredictable; - k-shot
accuracy on classes of functions (in the spirit of Garg et al. 2022): k examples x y of a random function of the class,
then x; the accuracy of the most likely token as y.

Tokens are drawn from an alphabet, the words of the model's tokenizer (`alphabet`). The most likely token is taken from
the alphabet only, so that the accuracy of guessing is one over its size.
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

SEQUENCES = 256  # per measurement
_AT_ONCE = 8192  # tokens per forward pass
_LOGITS_AT_ONCE = 1 << 26  # logits per forward pass
_SYMBOLS = 8  # size of the domain of a lookup function
_Generator = np.random.Generator


@dataclass(frozen=True)
class Induction:
    """Accuracy in both passes over a random word of `length` tokens."""

    length: int
    first: Estimate
    second: Estimate


@dataclass(frozen=True)
class Shots:
    """Accuracy after `shots` examples of a function of the class `functions`."""

    functions: str
    shots: int
    accuracy: Estimate


@dataclass(frozen=True)
class Position:
    """Loss, in nats per token, of the targets at positions first..last (from 1) of their window."""

    first: int
    last: int
    loss: Estimate


@dataclass(frozen=True)
class InContext:
    """Results of all measurements.

    Attributes:
        chance: accuracy of guessing.
        induction: induction scores by length of the word.
        shots: k-shot accuracies by class of functions and k.
        positions: loss by position; empty without a text.
    """

    chance: float
    induction: list[Induction]
    shots: list[Shots]
    positions: list[Position]

    def as_dict(self) -> dict[str, Any]:
        """Return the results as values for JSON."""
        return finite(asdict(self))

    def table(self) -> str:
        """Format the results as tables."""
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
    """Measure in-context learning of a model, in float32; with a text, also the loss by position.

    Args:
        checkpoint: as in `evaluate`.
        source: the text, as in `evaluate`; None for no text.
        device: the device.
        backend: the backend of the kernels.
        seed: seed of the words and functions.
        text_key: as in `evaluate`.
        skip_broken: as in `evaluate`.

    Raises:
        ValueError: as in `evaluate`, or the alphabet or the context is too small.
        OSError: the text cannot be read.
        FloatingPointError: the logits are NaN or infinite.
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
    """Return the ids of all tokens that are words (not spaces, parts of characters, or special), (A,) int64."""
    return torch.tensor([i for i, word in enumerate(tokenizer.words()[:vocab_size]) if word])


def measure(model: GPT, tokens: Tensor, *, sequences: int = SEQUENCES, seed: int = 0) -> InContext:
    """Measure induction and k-shot accuracy of a model in evaluation mode, on an alphabet `tokens` (A,).

    Raises ValueError if the alphabet or the context is too small.
    """
    block = model.config.block_size
    if len(tokens) < 2 * _SYMBOLS or block < 4:
        raise ValueError(
            f"in-context learning needs an alphabet of at least {2 * _SYMBOLS} tokens and a context of 4, "
            f"not {len(tokens)} and {block}; use another model"
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
    """Measure the induction score for words of `length` distinct tokens."""
    rng = np.random.default_rng((seed, length))
    words = torch.from_numpy(np.stack([rng.permutation(len(tokens))[:length] for _ in range(sequences)]))
    indices = torch.cat((words, words), dim=1)
    right = torch.cat([guess == part[:, 1:] for part, guess in _guesses(model, tokens, indices)]).double()
    # The guess at position i predicts the token at i + 1, so the first length - 1 belong to the first pass.
    # The first token of the second pass follows a token that had no successor before; it counts in neither pass.
    return Induction(
        length, bootstrap.mean(right[:, : length - 1].mean(1)), bootstrap.mean(right[:, length:].mean(1))
    )


def k_shot(
    model: GPT, tokens: Tensor, functions: str, shots: int, *, sequences: int = SEQUENCES, seed: int = 0
) -> Estimate:
    """Measure the accuracy after x1 y1 ... xk yk x, for functions of a class in `FUNCTIONS`."""
    rng = np.random.default_rng((seed, shots, sorted(FUNCTIONS).index(functions)))
    rows, answers = [], []
    for _ in range(sequences):
        x, y = FUNCTIONS[functions](rng, shots, len(tokens))
        rows.append(np.stack((x, y), axis=1).reshape(-1))
        answers.append(y[-1])
    indices = torch.from_numpy(np.stack(rows))
    guesses = torch.cat([guess[:, -1] for _, guess in _guesses(model, tokens, indices)])
    return bootstrap.mean((guesses == torch.tensor(np.array(answers))).double())


@torch.no_grad()
def loss_by_position(model: GPT, tokens: Tensor, *, windows: int = SEQUENCES) -> list[Position]:
    """Measure the loss by position in evenly spaced windows of a text, with intervals over the windows.

    A short text has fewer windows: overlapping windows would make the intervals too narrow.

    Args:
        model: a model in evaluation mode.
        tokens: (N,), the text.
        windows: maximum number of windows.

    Raises:
        ValueError: the text does not fill one window.
        FloatingPointError: the loss is not finite.
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


def _copy(rng: _Generator, shots: int, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    x = rng.integers(size, size=shots + 1)
    return x, x


def _constant(rng: _Generator, shots: int, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    return rng.integers(size, size=shots + 1), np.full(shots + 1, rng.integers(size))


def _lookup(rng: _Generator, shots: int, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    table = rng.permutation(size)[:_SYMBOLS], rng.integers(size, size=_SYMBOLS)
    examples = rng.integers(_SYMBOLS, size=shots)
    query = rng.choice(examples, size=1) if shots else rng.integers(_SYMBOLS, size=1)
    chosen = np.concatenate((examples, query))
    return table[0][chosen], table[1][chosen]


def _shift(rng: _Generator, shots: int, size: int) -> tuple[NDArray[Any], NDArray[Any]]:
    x = rng.integers(size, size=shots + 1)
    return x, (x + rng.integers(1, size)) % size


# Classes of functions: (generator, k, A) to k + 1 inputs and outputs of a random function, indices into the alphabet.
#   copy:     y = x
#   constant: y = c, with a random c per function
#   lookup:   random y for each of eight symbols x; the examples include the last x
#   shift:    y = (x + c) modulo the size of the alphabet
FUNCTIONS: dict[str, Callable[[_Generator, int, int], tuple[NDArray[Any], NDArray[Any]]]] = {
    "copy": _copy,
    "constant": _constant,
    "lookup": _lookup,
    "shift": _shift,
}


@torch.no_grad()
def _guesses(model: GPT, tokens: Tensor, indices: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield chunks of `indices` (N, T) into the alphabet, and the most likely next tokens.

    The second tensor has the index of the most likely token after each of the first T - 1 positions. Both are on the
    CPU.
    """
    device = model.wte.weight.device
    at_once = min(_AT_ONCE, _LOGITS_AT_ONCE // model.config.vocab_size)
    for part in indices.split(max(1, at_once // indices.shape[1])):
        logits = model(tokens[part[:, :-1]].to(device))[0]
        if not logits.amax().isfinite():
            raise FloatingPointError(UNUSABLE)
        yield part, logits[..., tokens.to(device)].argmax(-1).cpu()


def _percent(found: Estimate) -> str:
    return f"{found.value:7.2%} ({found.low:.2%} to {found.high:.2%})"
