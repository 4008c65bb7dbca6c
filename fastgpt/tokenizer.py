"""Lossless tokenizers: raw bytes, and byte-level BPE.

Both encode every text: bytes are the tokens of the first and the fallback of the second.
"""

from __future__ import annotations

import functools
import json
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from fastgpt.download import download, is_hub_name
from fastgpt.json_io import loads, read_json
from fastgpt.tokenizer_json import MOST_TOKENS, check_ids, check_tokenizer, guarded

FILE = "tokenizer.json"
TOKENIZER_FILES = (  # patterns of files on the Hub
    "tokenizer*",
    "vocab.json",
    "*.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
)
_SUPPORTED = (
    "give --tokenizer bytes, bpe, a tokenizer.json, a directory with one, vocab.json and merges.txt, or vocab.txt, "
    "or the name of a model on the Hub"
)
_END_OF_TEXT = ("<|endoftext|>", "[SEP]", "</s>")  # GPT-2, BERT, many others
_PIECE = 1 << 16  # characters per piece; pieces are encoded in parallel


class Tokenizer(Protocol):
    """Interface of a tokenizer for the trainer and the generator."""

    name: str

    @property
    def vocab_size(self) -> int:
        """Size V of the vocabulary; token ids are in [0, V)."""
        ...

    @property
    def end_of_text(self) -> int | None:
        """Id of the token after a document, which `encode` never returns; None if there is none."""
        ...

    def encode(self, text: str) -> Tensor:
        """Encode a text into ids, (N,) uint8 or int32. Raises ValueError for a lone surrogate."""
        ...

    def encode_batch(self, texts: list[str]) -> list[Tensor]:
        """Encode several texts, on all cores."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """Decode ids (N,); an incomplete UTF-8 sequence becomes U+FFFD, ids outside [0, V) are skipped."""
        ...

    def words(self) -> list[str]:
        """Return the word of each token id, (V,), without a leading space; "" for tokens that are not words."""
        ...

    def serialized(self) -> str:
        """Return the contents of its tokenizer.json."""
        ...

    def save(self, directory: Path) -> None:
        """Write `tokenizer.json`, from which `load_tokenizer` restores an equal tokenizer."""
        ...


class ByteTokenizer:
    """Tokenizer of UTF-8 bytes, V = 256. NUL, which no text contains (`data.read_text`), ends a document."""

    name = "bytes"
    vocab_size = 256
    end_of_text = 0

    def encode(self, text: str) -> Tensor:
        raw = bytearray(_utf8(text))
        return torch.frombuffer(raw, dtype=torch.uint8) if raw else torch.empty(0, dtype=torch.uint8)

    def encode_batch(self, texts: list[str]) -> list[Tensor]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Tensor) -> str:
        known = (token for token in tokens.tolist() if 0 <= token < self.vocab_size)
        return bytes(known).decode("utf-8", errors="replace")

    def words(self) -> list[str]:
        """Return the visible ASCII characters; "" for spaces, controls, and bytes of longer characters."""
        return [chr(byte) if 32 < byte < 127 else "" for byte in range(self.vocab_size)]

    def serialized(self) -> str:
        return json.dumps({"type": self.name})

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(self.serialized(), "utf-8")


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2) by the package `tokenizers`.

    Other tokenizers of that package, such as BERT's WordPiece, are supported too; they may be lossy.
    """

    def __init__(self, serialized: str | dict[str, Any]) -> None:
        """Load a tokenizer.json.

        Args:
            serialized: its text, or the parsed value.

        Raises:
            ValueError: it is not a tokenizer.json, or its work is not known to be bounded (`fastgpt.tokenizer_json`).
        """
        from tokenizers import Tokenizer as Engine
        from tokenizers.models import BPE

        value = loads(serialized) if isinstance(serialized, str) else serialized
        if not isinstance(value, dict):
            raise ValueError("the file is not a tokenizer.json")
        check_tokenizer(value)
        # Serialized again, so that `tokenizers` parses exactly what was checked, even if a key occurs twice.
        self.engine = guarded(Engine.from_str, json.dumps(value, allow_nan=False))
        check_ids(self.engine.get_vocab())
        self.engine.encode_special_tokens = True  # <|endoftext|> in a text is not a special token
        self.engine.no_truncation()
        self.engine.no_padding()
        if isinstance(self.engine.model, BPE):
            self.engine.model.dropout = None  # makes the encoding deterministic
        self.name = type(self.engine.model).__name__.lower()

    @classmethod
    def train(cls, documents: list[str], vocab_size: int) -> BPETokenizer:
        """Train on documents: the bytes, <|endoftext|>, and vocab_size - 257 merges (fewer for a small text).

        Raises ValueError for a vocab_size below 257 or above MOST_TOKENS.
        """
        from tokenizers import Tokenizer as Engine
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocab_size < 257:
            raise ValueError(
                "vocab_size must be at least 257 for bpe, for the bytes and the end of text, "
                f"not {vocab_size}"
            )
        if vocab_size > MOST_TOKENS:
            raise ValueError(f"vocab_size must be at most {MOST_TOKENS:,}, not {vocab_size:,}")
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        # Every merge shortens the encoded text, so there are at most as many as bytes.
        most_merges = sum(len(_utf8(document)) for document in documents)
        guarded(
            engine.train_from_iterator,
            documents,
            trainers.BpeTrainer(
                vocab_size=min(vocab_size, 257 + most_merges),
                initial_alphabet=alphabet,
                special_tokens=list(_END_OF_TEXT[:1]),
                show_progress=False,
            ),
        )
        return cls(engine.to_str())

    @functools.cached_property
    def vocab_size(self) -> int:  # ids may have gaps
        return max(self.engine.get_vocab().values(), default=-1) + 1

    @property
    def end_of_text(self) -> int | None:
        ids = (self.engine.token_to_id(token) for token in _END_OF_TEXT)
        return next((id for id in ids if id is not None), None)

    def encode(self, text: str) -> Tensor:
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: list[str]) -> list[Tensor]:
        for text in texts:
            _utf8(text)
        pieces = [_pieces(text) for text in texts]
        try:
            encodings = guarded(self.engine.encode_batch_fast, [*chain(*pieces)], add_special_tokens=False)
        except ValueError as error:
            raise ValueError(f"the tokenizer cannot encode the text: {error}") from None
        encoded = iter(encodings)
        none = np.empty(0, np.int32)
        return [
            torch.from_numpy(
                np.concatenate([none, *(np.array(next(encoded).ids, np.int32) for _ in of_text)])
            )
            for of_text in pieces
        ]

    def decode(self, tokens: Tensor) -> str:
        known = [token for token in tokens.tolist() if 0 <= token < self.vocab_size]
        return guarded(self.engine.decode, known, skip_special_tokens=False)

    def words(self) -> list[str]:
        """Return the decoded text of each token, stripped: "the" for both "Ġthe" and "the"."""
        ids = [[token] for token in range(self.vocab_size)]
        texts = guarded(self.engine.decode_batch, ids, skip_special_tokens=False)
        special = {token.content for token in self.engine.get_added_tokens_decoder().values()}
        return ["" if "\ufffd" in text or text in special else text.strip() for text in texts]

    def serialized(self) -> str:
        return self.engine.to_str()

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(self.serialized(), "utf-8")


def make_tokenizer(name: str, documents: list[str], vocab_size: int) -> Tokenizer:
    """Make the tokenizer that `--tokenizer` names; only "bpe" uses `documents` and `vocab_size`."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "bpe":
        return BPETokenizer.train(documents, vocab_size)
    return load_tokenizer(Path(name))


def matches_option(own: Tokenizer, name: str) -> bool:
    """Return True if `--tokenizer name` matches the tokenizer of a model or a dataset.

    "auto" always matches; "bpe", which trains a tokenizer, never does.
    """
    return name == "auto" or (name != "bpe" and make_tokenizer(name, [], 0).serialized() == own.serialized())


def load_tokenizer(path: Path) -> Tokenizer:
    """Load a tokenizer from a file, a directory, or a model on the Hub.

    Args:
        path: a tokenizer.json; a directory with one, with GPT-2's vocab.json and merges.txt, or with BERT's vocab.txt
            (lower case unless tokenizer_config.json sets otherwise); or the name of a model on the Hub.

    Raises:
        OSError: a file cannot be read (FileNotFoundError if there is none).
        ValueError: a file is not a supported tokenizer.
    """
    if is_hub_name(str(path)):
        path = download(str(path), TOKENIZER_FILES, "tokenizer")
    file = path / FILE if path.is_dir() else path
    try:
        if file.is_file():
            _check_kind(file)
            value = read_json(file)
            if value == {"type": "bytes"}:
                return ByteTokenizer()
            tokenizer = BPETokenizer(value)
            return ByteTokenizer() if _is_bytes(tokenizer.engine) else tokenizer
        for name, others, read in (("vocab.json", ["merges.txt"], _gpt2), ("vocab.txt", [], _bert)):
            file = path / name
            if all((path / needed).is_file() for needed in (name, *others)):
                return BPETokenizer(guarded(read, path).to_str())
        file = path / FILE if path.is_dir() else path
        for other in sorted(path.glob("*")) if path.is_dir() else ():
            _check_kind(other)
    except _KindError:
        raise
    except ValueError as error:
        reason = str(error).removeprefix(f"{file} ")
        raise ValueError(f"{file} is not a tokenizer: {reason}; {_SUPPORTED}") from None
    raise FileNotFoundError(f"tokenizer {file} does not exist; {_SUPPORTED}")


class _KindError(ValueError):
    """Error for a tokenizer of an unsupported kind."""


def _check_kind(file: Path) -> None:
    """Raise ValueError for a tokenizer of another library, with instructions to convert it."""
    kinds = {
        ".model": "a SentencePiece model",
        ".spm": "a SentencePiece model",
        ".tiktoken": "a file of tiktoken",
    }
    if file.suffix in kinds:
        raise _KindError(
            f"{file} is {kinds[file.suffix]}, which is not supported; {_SUPPORTED}. Convert it with transformers: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(OUT)"
        )


def byte_vocabulary() -> dict[str, int]:
    """Return the byte of each character of byte-level BPE.

    A byte with a visible character is written as that; the others are written as the characters from U+0100 on.
    """
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(256 + hidden.index(b)) if b in hidden else chr(b): b for b in range(256)}


def _is_bytes(engine: Any) -> bool:
    """Return True for byte-level BPE with bytes only: a byte tokenizer in the format of transformers."""
    from tokenizers import models, pre_tokenizers

    pre_tokenizer = engine.pre_tokenizer
    return (
        isinstance(engine.model, models.BPE)
        and engine.get_vocab() == byte_vocabulary()
        and not engine.get_added_tokens_decoder()
        and engine.normalizer is None
        and isinstance(pre_tokenizer, pre_tokenizers.ByteLevel)
        and not pre_tokenizer.add_prefix_space
    )


def _gpt2(directory: Path) -> Any:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, pre_tokenizers

    lines = (directory / "merges.txt").read_text("utf-8").removesuffix("\n").split("\n")
    merges: list[Any] = [
        tuple(line.removesuffix("\r").split(" ")) for line in lines if line and line[:8] != "#version"
    ]
    vocabulary = read_json(directory / "vocab.json")
    check_ids(vocabulary)
    check_tokenizer({"model": {"type": "BPE", "vocab": vocabulary, "merges": merges}})
    engine = Engine(models.BPE(vocabulary, merges))
    engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = decoders.ByteLevel()
    return _with_special(engine, _END_OF_TEXT[:1])


def _bert(directory: Path) -> Any:
    from tokenizers import Tokenizer as Engine
    from tokenizers import decoders, models, normalizers, pre_tokenizers

    file = directory / "tokenizer_config.json"
    config = read_json(file) if file.is_file() else {}
    engine = Engine(models.WordPiece.from_file(str(directory / "vocab.txt"), unk_token="[UNK]"))
    engine.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),
        lowercase=config.get("do_lower_case", True),
    )
    engine.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    engine.decoder = decoders.WordPiece()
    return _with_special(engine, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))


def _with_special(engine: Any, tokens: tuple[str, ...]) -> Any:
    """Mark those tokens of the list that are in the vocabulary as special; return the engine."""
    engine.add_special_tokens([token for token in tokens if engine.token_to_id(token) is not None])
    return engine


def _utf8(text: str) -> bytes:
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ValueError(f"the text contains {text[error.start]!r}, which is not a character") from None


def _pieces(text: str) -> list[str]:
    """Split a text after line ends into pieces of at least _PIECE characters."""
    pieces, start = [], 0
    while start < len(text):
        end = text.find("\n", start + _PIECE) + 1 or len(text)
        pieces.append(text[start:end])
        start = end
    return pieces
