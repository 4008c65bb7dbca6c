"""Text generation from a checkpoint: `fastgpt generate`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch

from fastgpt import data
from fastgpt.backends import use_backend
from fastgpt.checkpoints.load import open_model
from fastgpt.device import resolve_device
from fastgpt.generation.sampling import Sampling
from fastgpt.model import GPT
from fastgpt.tokenizer import Tokenizer

MOST_ROWS = 1 << 16  # limit of batch_size
_CONTEXT = (
    4  # tokens decoded before new ones, for decoders that depend on neighbours; most tokens of a character
)
_MOST_HELD = 64  # tokens to hold back for an incomplete last character


@dataclass
class IncrementalDetokenizer:
    """Incremental decoder of the text after a prompt.

    It returns complete characters only, up to the first stop string, and holds back a possible beginning of a stop
    string or of a character until it is decided. The pieces that `add` and `close` return add up to `text`.

    Attributes:
        tokenizer: decodes the tokens.
        tokens: those of the prompt at first, then all.
        stop: the stop strings.
        text: the decoded text after the prompt.
        ended: True after a stop string.
    """

    tokenizer: Tokenizer
    tokens: list[int]
    stop: Sequence[str] = ()
    text: str = ""
    ended: bool = False
    _held: str = ""
    _read: int = field(init=False)  # number of tokens in `text` or held back

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ValueError("a stop string must not be empty")
        self._read = len(self.tokens)

    def add(self, token: int) -> str:
        """Append a token, and return the text that is now certain."""
        self.tokens.append(token)
        end = len(self.tokens)
        new = self._decoded(end)
        if new.endswith("\ufffd"):  # the last character may be incomplete
            ends = range(end - _CONTEXT, end - 2 * _CONTEXT, -1) if end - self._read > _MOST_HELD else ()
            end, new = next(
                ((e, prefix) for e in ends if new.startswith(prefix := self._decoded(e))), (self._read, "")
            )
        return self._take(new, end, last=False)

    def close(self) -> str:
        """Return the text that was held back, after the last token."""
        end = len(self.tokens)
        return "" if self.ended else self._take(self._decoded(end), end, last=True)

    def _decoded(self, end: int) -> str:
        """Decode the tokens from `_read` to `end`; an incomplete last character is U+FFFD."""
        start = max(0, self._read - _CONTEXT)
        before, now = (
            self.tokenizer.decode(torch.tensor(self.tokens[start:stop], dtype=torch.long))
            for stop in (self._read, end)
        )
        return now[len(before) :]

    def _take(self, new: str, end: int, last: bool) -> str:
        self._read = end
        self._held += new
        found = [at for at in map(self._held.find, self.stop) if at >= 0]
        if found:
            self.ended = True
            certain = min(found)
        else:
            certain = len(self._held) - (0 if last else self._possible_stop())
        piece, self._held = self._held[:certain], self._held[certain:]
        self.text += piece
        return piece

    def _possible_stop(self) -> int:
        """Return the number of characters at the end that may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in ends if any(s.startswith(self._held[-n:]) for s in self.stop)), 0)


@dataclass(frozen=True)
class Generated:
    """A prompt and its continuation.

    Attributes:
        prompt: the prompt.
        sample: number of the continuation of this prompt, from 1.
        continuation: the text after the prompt.
    """

    prompt: str
    sample: int
    continuation: str

    @property
    def text(self) -> str:
        return self.prompt + self.continuation


def generate(
    checkpoint: str | Path,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int | None = None,
    device: str = "auto",
    backend: str = "auto",
) -> str:
    """Return the prompt and one continuation; arguments and exceptions are those of `generate_texts`."""
    sampling = Sampling(temperature, top_k, top_p)
    texts = generate_texts(
        checkpoint, [prompt], max_new_tokens, sampling, seed=seed, device=device, backend=backend
    )
    return next(texts).text


def generate_texts(
    checkpoint: str | Path,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    num_samples: int = 1,
    batch_size: int = 16,
    stop: Sequence[str] = (),
    seed: int | None = None,
    device: str = "auto",
    backend: str = "auto",
    on_text: Callable[[int, str], object] | None = None,
) -> Iterator[Generated]:
    """Generate num_samples continuations of every prompt, in order, in float32.

    Args:
        checkpoint: the directory of a run (`fastgpt train --out`) or of a Hugging Face model.
        prompts: the prompts.
        max_new_tokens: maximum number of new tokens per text.
        sampling: options of sampling.
        num_samples: continuations per prompt.
        batch_size: texts that are generated together.
        stop: a text ends before the first of these strings; it also ends at the tokenizer's end of text.
        seed: text i, from 0, is the same as alone with seed + i.
        device: the device.
        backend: the backend of the kernels.
        on_text: called with (i, prompt), then with (i, piece) for every new piece of the continuation.

    Yields:
        The texts, sample by sample of each prompt.

    Raises:
        ValueError: the checkpoint, a prompt or an option is invalid.
        OSError: a file cannot be read.
    """
    model, tokenizer = open_model(checkpoint)
    yield from continue_texts(
        *(model.to(resolve_device(device)), tokenizer, prompts, max_new_tokens, sampling),
        num_samples=num_samples,
        batch_size=batch_size,
        stop=stop,
        seed=seed,
        backend=backend,
        on_text=on_text,
    )


def continue_texts(
    model: GPT,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    num_samples: int = 1,
    batch_size: int = 16,
    stop: Sequence[str] = (),
    seed: int | None = None,
    backend: str = "auto",
    on_text: Callable[[int, str], object] | None = None,
) -> Iterator[Generated]:
    """Generate like `generate_texts`, with a loaded model, on its device and in its dtype."""
    for name, value, most in (("num_samples", num_samples, None), ("batch_size", batch_size, MOST_ROWS)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
        if most is not None and value > most:
            raise ValueError(f"{name} must be at most {most:,}, not {value:,}")
    encoded = [(prompt, tokenizer.encode(prompt).long()) for prompt in prompts]
    if not all(len(tokens) for _, tokens in encoded):
        raise ValueError("the prompt is empty; give it at least one character")
    texts = ((sample, *pair) for pair in encoded for sample in range(1, num_samples + 1))
    first = 0
    while chunk := list(islice(texts, batch_size)):
        rows = [IncrementalDetokenizer(tokenizer, tokens.tolist(), stop) for _, _, tokens in chunk]
        on_piece = _with_prompts(on_text, first, [prompt for _, prompt, _ in chunk])
        with use_backend(backend):
            _continue(model, rows, max_new_tokens, sampling, None if seed is None else seed + first, on_piece)
        for (sample, prompt, _), done in zip(chunk, rows, strict=True):
            yield Generated(prompt, sample, done.text)
        first += len(chunk)


def read_prompts(path: str | Path) -> list[str]:
    """Read prompts from a text file, one per line; "-" is standard input.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is not text, or a line is empty.
    """
    if (kind := data.format_of(path)) != "text":
        raise ValueError(f"{path} is named as {kind}; give a text file with one prompt per line")
    prompts = data.read_text(path).removesuffix("\n").split("\n")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip("\r"):
            raise ValueError(
                f"line {number} of {data.name_of(path)} is empty; give every prompt at least one character"
            )
    return [prompt.removesuffix("\r") for prompt in prompts]


def _continue(
    model: GPT,
    rows: Sequence[IncrementalDetokenizer],
    max_new_tokens: int,
    sampling: Sampling,
    seed: int | None,
    on_piece: Callable[[int, str], object],
) -> None:
    """Generate the continuations of one batch."""
    end = rows[0].tokenizer.end_of_text

    def on_token(row: int, token: int) -> bool:
        if token != end:
            on_piece(row, rows[row].add(token))
        return rows[row].ended

    prompts = [torch.tensor(row.tokens) for row in rows]
    lengths = torch.tensor([len(prompt) for prompt in prompts])
    idx = torch.nn.utils.rnn.pad_sequence(prompts, batch_first=True)
    device = model.wte.weight.device
    model.generate(
        idx.to(device),
        max_new_tokens,
        seed=seed,
        lengths=None if bool((lengths == lengths[0]).all()) else lengths,
        end_token=end,
        num_tokens=rows[0].tokenizer.vocab_size,
        on_token=on_token,
        **asdict(sampling),
    )
    for number, row in enumerate(rows):
        on_piece(number, row.close())


def _with_prompts(
    on_text: Callable[[int, str], object] | None, first: int, prompts: Sequence[str]
) -> Callable[[int, str], None]:
    """Wrap on_text for rows counted from `first`: pass each prompt before its first piece, and no empty pieces."""
    started: set[int] = set()

    def on_piece(row: int, piece: str) -> None:
        if on_text is None:
            return
        if row not in started:
            started.add(row)
            on_text(first + row, prompts[row])
        if piece:
            on_text(first + row, piece)

    return on_piece
