"""Text to token ids and back, without loss: raw bytes, or byte-level BPE.

Both know every text: a byte is a token of the first kind, and the fallback of the second.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

FILE = "tokenizer.json"
_END_OF_TEXT = ("<|endoftext|>", "[SEP]", "</s>")  # of GPT-2, BERT, and many others
_PIECE = 1 << 16  # characters encoded at once by BPE: many pieces are spread over the cores


class Tokenizer(Protocol):
    """What the trainer and the generator ask of a tokenizer."""

    name: str

    @property
    def vocab_size(self) -> int:
        """V: token ids lie in [0, V)."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """The id of the token behind a document, which `encode` never gives; None where there is none."""
        ...

    def encode(self, text: str) -> Tensor:
        """The ids of a text, (N,) uint8 or int32. Raises ValueError for a lone surrogate, no text."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """The text of ids (N,); an incomplete UTF-8 sequence becomes U+FFFD."""
        ...

    def words(self) -> list[str]:
        """The word of each token id, (V,), without the space that marks its beginning; "" for what is none."""
        ...

    def serialized(self) -> str:
        """The text of its tokenizer.json."""
        ...

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json`, from which `load_tokenizer` makes an equal tokenizer."""
        ...


class ByteTokenizer:
    """One token a UTF-8 byte, V = 256. A NUL, which is in no text (`data.read_text`), ends a document."""

    name = "bytes"
    vocab_size = 256
    end_of_text = 0

    def encode(self, text: str) -> Tensor:
        raw = bytearray(_utf8(text))
        return torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)

    def decode(self, tokens: Tensor) -> str:
        return bytes(tokens.tolist()).decode("utf-8", errors="replace")

    def words(self) -> list[str]:
        """A character of ASCII that can be seen; "" for spaces, controls, and the bytes of longer characters."""
        return [chr(byte) if 32 < byte < 127 else "" for byte in range(self.vocab_size)]

    def serialized(self) -> str:
        return json.dumps({"type": self.name})

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(self.serialized(), "utf-8")


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2) by the package `tokenizers`."""

    name = "bpe"

    def __init__(self, serialized: str) -> None:
        """`serialized` is the text of a tokenizer.json. Raises ValueError if it is not one."""
        from tokenizers import Tokenizer as Engine

        try:
            self._engine = Engine.from_str(serialized)
        except Exception as error:  # the package raises bare Exceptions
            raise ValueError(f"this is not a tokenizer.json: {str(error).splitlines()[0]}") from None
        self._engine.encode_special_tokens = True  # a text that spells <|endoftext|> does not end by it

    @classmethod
    def train(cls, documents: list[str], vocab_size: int) -> BPETokenizer:
        """Learn the bytes, <|endoftext|> and vocab_size - 257 merges; a small text may have fewer. Raises
        ValueError below 257.
        """
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise ValueError(
                "vocab_size must be at least 257 for bpe, which starts from bytes and an end of text, "
                f"not {vocab_size}"
            )
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        engine.train_from_iterator(
            documents,
            trainers.BpeTrainer(
                vocab_size=vocab_size,
                initial_alphabet=alphabet,
                special_tokens=list(_END_OF_TEXT[:1]),
                show_progress=False,
            ),
        )
        return cls(engine.to_str())

    @property
    def vocab_size(self) -> int:
        return self._engine.get_vocab_size()

    @property
    def end_of_text(self) -> int | None:
        ids = (self._engine.token_to_id(token) for token in _END_OF_TEXT)
        return next((id for id in ids if id is not None), None)

    def encode(self, text: str) -> Tensor:
        _utf8(text)
        encoded = self._engine.encode_batch_fast(_pieces(text), add_special_tokens=False)
        ids = [torch.tensor(piece.ids, dtype=torch.int32) for piece in encoded]
        return torch.cat(ids) if ids else torch.empty(0, dtype=torch.int32)

    def decode(self, tokens: Tensor) -> str:
        return self._engine.decode(tokens.tolist(), skip_special_tokens=False)

    def words(self) -> list[str]:
        """As the decoder writes each token by itself: "the" for both "Ġthe" and "the"; "" for spaces and for part of
        a character.
        """
        ids = [[token] for token in range(self.vocab_size)]
        texts = self._engine.decode_batch(ids, skip_special_tokens=False)
        special = {token.content for token in self._engine.get_added_tokens_decoder().values()}
        return ["" if "\ufffd" in text or text in special else text.strip() for text in texts]

    def serialized(self) -> str:
        return self._engine.to_str()

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(self.serialized(), "utf-8")


def make_tokenizer(name: str, documents: list[str], vocab_size: int) -> ByteTokenizer | BPETokenizer:
    """The tokenizer that `--tokenizer` names; `documents` and `vocab_size` matter to "bpe" alone."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "bpe":
        return BPETokenizer.train(documents, vocab_size)
    return load_tokenizer(Path(name))


def load_tokenizer(path: Path) -> ByteTokenizer | BPETokenizer:
    """The tokenizer in a tokenizer.json, or in a directory that has one. Raises FileNotFoundError and
    ValueError.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(
            f"there is no tokenizer {file}; --tokenizer takes bytes, bpe or a tokenizer.json"
        )
    try:
        text = file.read_text("utf-8")
        if json.loads(text) == {"type": "bytes"}:
            return ByteTokenizer()
        return BPETokenizer(text)
    except ValueError as error:
        raise ValueError(f"{file} is not a tokenizer: {error}") from None


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text holds {text[error.start]!r}, which is no character") from None


def _pieces(text: str) -> list[str]:
    """The text cut behind line ends, at least _PIECE characters each where it has so many."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces
