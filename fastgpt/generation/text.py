"""Text from a checkpoint: `fastgpt generate`."""

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

MOST_ROWS = 1 << 16  # of a batch
_CONTEXT = 4  # tokens decoded again before a new one, for decoders that look at the neighbour; the most of a character
_MOST_HELD = 64  # tokens without a whole character at their end: more are not waited for


@dataclass
class IncrementalDetokenizer:
    """The text behind a prompt, as its tokens come: whole characters alone, cut before the first stop string.

    What may be the beginning of a stop string, or of a character, is held back until that is decided. The pieces that
    `add` and `close` return make up `text`.

    tokens: those of the prompt, and then all.
    ended:  whether a stop string has come.
    """

    tokenizer: Tokenizer
    tokens: list[int]
    stop: Sequence[str] = ()
    text: str = ""
    ended: bool = False
    _held: str = ""
    _read: int = field(init=False)  # tokens that are in `text` or held back

    def __post_init__(self) -> None:
        if "" in self.stop:
            raise ValueError("a stop string must not be empty")
        self._read = len(self.tokens)

    def add(self, token: int) -> str:
        """Take one more token; the text that is certain by it."""
        self.tokens.append(token)
        end = len(self.tokens)
        new = self._decoded(end)
        if new.endswith("\ufffd"):  # its last character may not be whole yet
            ends = range(end - _CONTEXT, end - 2 * _CONTEXT, -1) if end - self._read > _MOST_HELD else ()
            end, new = next(
                ((e, some) for e in ends if new.startswith(some := self._decoded(e))), (self._read, "")
            )
        return self._take(new, end, last=False)

    def close(self) -> str:
        """What was held back, now that no token comes any more."""
        end = len(self.tokens)
        return "" if self.ended else self._take(self._decoded(end), end, last=True)

    def _decoded(self, end: int) -> str:
        """The text of the tokens from `_read` to an end, which is U+FFFD at its end where a character is not whole."""
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
            sure = min(found)
        else:
            sure = len(self._held) - (0 if last else self._possible_stop())
        piece, self._held = self._held[:sure], self._held[sure:]
        self.text += piece
        return piece

    def _possible_stop(self) -> int:
        """How many characters at the end may be the beginning of a stop string."""
        longest = max(map(len, self.stop), default=1) - 1
        ends = range(min(longest, len(self._held)), 0, -1)
        return next((n for n in ends if any(s.startswith(self._held[-n:]) for s in self.stop)), 0)


@dataclass(frozen=True)
class Generated:
    """A prompt and what came behind it; `sample` counts the continuations of one prompt from 1."""

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
    """The prompt and its continuation, as `generate_texts` makes them. Raises as that does."""
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
    """num_samples continuations of every prompt, in float32, batch_size of them at once, in order.

    checkpoint: what `fastgpt train --out` was given, or a Hugging Face GPT-2 directory.
    stop:       a text ends before the first of these strings, and at the tokenizer's end of text.
    seed:       text number i, from 0, is what it is alone with seed + i.
    on_text:    called with (i, prompt), and then with (i, piece) for every piece of the continuation as it comes.

    Raises ValueError for the checkpoint, a prompt or an option, OSError for what cannot be read.
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
    """`generate_texts` with a model at hand, where it is and in its dtype."""
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
    while some := list(islice(texts, batch_size)):
        rows = [IncrementalDetokenizer(tokenizer, tokens.tolist(), stop) for _, _, tokens in some]
        say = _with_prompts(on_text, first, [prompt for _, prompt, _ in some])
        with use_backend(backend):
            _continue(model, rows, max_new_tokens, sampling, None if seed is None else seed + first, say)
        for (sample, prompt, _), done in zip(some, rows, strict=True):
            yield Generated(prompt, sample, done.text)
        first += len(some)


def read_prompts(path: str | Path) -> list[str]:
    """The prompts in a text file, one a line; "-" is standard input. Raises OSError and ValueError for a file that has
    none.
    """
    if (kind := data.format_of(path)) != "text":
        raise ValueError(f"prompts are read from a text file, one a line, and {path} is named as {kind}")
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
    say: Callable[[int, str], object],
) -> None:
    """Let every row grow to its end."""
    end = rows[0].tokenizer.end_of_text

    def on_token(row: int, token: int) -> bool:
        if token != end:
            say(row, rows[row].add(token))
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
        say(number, row.close())


def _with_prompts(
    on_text: Callable[[int, str], object] | None, first: int, prompts: Sequence[str]
) -> Callable[[int, str], None]:
    """on_text for rows counted from `first`; it hears the prompt before the first piece, and no empty piece."""
    told: set[int] = set()

    def say(row: int, piece: str) -> None:
        if on_text is None:
            return
        if row not in told:
            told.add(row)
            on_text(first + row, prompts[row])
        if piece:
            on_text(first + row, piece)

    return say
