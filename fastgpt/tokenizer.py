"""Text to token ids and back, without loss: raw bytes, or byte-level BPE.

Both know every text: a byte is a token of the first kind, and the fallback of the second.
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
TOKENIZER_FILES = (
    "tokenizer*",
    "vocab.json",
    "*.txt",
    "*.model",
    "*.spm",
    "*.tiktoken",
)  # of a model on the Hub
_TAKEN = (
    "--tokenizer takes bytes, bpe or a tokenizer.json, a directory with one, vocab.json and merges.txt, or vocab.txt, "
    "or a model's name on the Hub"
)
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

    def encode_batch(self, texts: list[str]) -> list[Tensor]:
        """`encode` of each text, on all cores."""
        ...

    def decode(self, tokens: Tensor) -> str:
        """The text of ids (N,); an incomplete UTF-8 sequence becomes U+FFFD, an id outside [0, V) no text."""
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

    def encode_batch(self, texts: list[str]) -> list[Tensor]:
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Tensor) -> str:
        known = (token for token in tokens.tolist() if 0 <= token < self.vocab_size)
        return bytes(known).decode("utf-8", errors="replace")

    def words(self) -> list[str]:
        """A character of ASCII that can be seen; "" for spaces, controls, and the bytes of longer characters."""
        return [chr(byte) if 32 < byte < 127 else "" for byte in range(self.vocab_size)]

    def serialized(self) -> str:
        return json.dumps({"type": self.name})

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(self.serialized(), "utf-8")


class BPETokenizer:
    """Byte-level byte-pair encoding (Sennrich et al. 2016; bytes as in GPT-2) by the package `tokenizers`.

    What else that package reads, BERT's WordPiece for one, works too; it need not be without loss.
    """

    def __init__(self, serialized: str | dict[str, Any]) -> None:
        """`serialized` is a tokenizer.json, its text or its value. Raises ValueError if it is not one, and for one
        whose work is not known to be bounded (`fastgpt.tokenizer_json`).
        """
        from tokenizers import Tokenizer as Engine
        from tokenizers.models import BPE

        value = loads(serialized) if isinstance(serialized, str) else serialized
        if not isinstance(value, dict):
            raise ValueError("this is not a tokenizer.json")
        check_tokenizer(value)
        # Written again, so that what is read is what was checked, also where a key comes twice.
        self.engine = guarded(Engine.from_str, json.dumps(value, allow_nan=False))
        check_ids(self.engine.get_vocab())
        self.engine.encode_special_tokens = True  # a text that spells <|endoftext|> does not end by it
        self.engine.no_truncation()
        self.engine.no_padding()
        if isinstance(self.engine.model, BPE):
            self.engine.model.dropout = None  # the same text, the same tokens
        self.name = type(self.engine.model).__name__.lower()

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
        if vocab_size > MOST_TOKENS:
            raise ValueError(f"vocab_size must be at most {MOST_TOKENS:,}, not {vocab_size:,}")
        engine = Engine(models.BPE())
        engine.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        engine.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        learned = sum(
            len(_utf8(document)) for document in documents
        )  # a merge needs two symbols to be in the text
        guarded(
            engine.train_from_iterator,
            documents,
            trainers.BpeTrainer(
                vocab_size=min(vocab_size, 257 + learned),
                initial_alphabet=alphabet,
                special_tokens=list(_END_OF_TEXT[:1]),
                show_progress=False,
            ),
        )
        return cls(engine.to_str())

    @functools.cached_property
    def vocab_size(self) -> int:  # an id may be missing below the largest
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
            every = guarded(self.engine.encode_batch_fast, [*chain(*pieces)], add_special_tokens=False)
        except ValueError as error:
            raise ValueError(f"the tokenizer cannot encode the text: {error}") from None
        encoded = iter(every)
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
        """As the decoder writes each token by itself: "the" for both "Ġthe" and "the"; "" for spaces and for part of
        a character.
        """
        ids = [[token] for token in range(self.vocab_size)]
        texts = guarded(self.engine.decode_batch, ids, skip_special_tokens=False)
        special = {token.content for token in self.engine.get_added_tokens_decoder().values()}
        return ["" if "\ufffd" in text or text in special else text.strip() for text in texts]

    def serialized(self) -> str:
        return self.engine.to_str()

    def save(self, directory: Path) -> None:
        (directory / FILE).write_text(self.serialized(), "utf-8")


def make_tokenizer(name: str, documents: list[str], vocab_size: int) -> Tokenizer:
    """The tokenizer that `--tokenizer` names; `documents` and `vocab_size` matter to "bpe" alone."""
    if name == "bytes":
        return ByteTokenizer()
    if name == "bpe":
        return BPETokenizer.train(documents, vocab_size)
    return load_tokenizer(Path(name))


def matches_option(own: Tokenizer, name: str) -> bool:
    """Whether `--tokenizer name` means the tokenizer that a model or a dataset has: "auto" always does, "bpe", which
    learns one, never.
    """
    return name == "auto" or (name != "bpe" and make_tokenizer(name, [], 0).serialized() == own.serialized())


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, or in a directory that has one, GPT-2's vocab.json and merges.txt, or BERT's
    vocab.txt (lower case unless tokenizer_config.json says otherwise); or that of a model on the Hub. Raises
    FileNotFoundError, OSError and ValueError.
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
        raise ValueError(f"{file} is not a tokenizer: {reason}; {_TAKEN}") from None
    raise FileNotFoundError(f"there is no tokenizer {file}; {_TAKEN}")


class _KindError(ValueError):
    """A file is a tokenizer of a kind that is not read."""


def _check_kind(file: Path) -> None:
    """Raise ValueError for a tokenizer of another library, with the way to one that is read."""
    kinds = {
        ".model": "a SentencePiece model",
        ".spm": "a SentencePiece model",
        ".tiktoken": "a file of tiktoken",
    }
    if file.suffix in kinds:
        raise _KindError(
            f"{file} is {kinds[file.suffix]}, which is not read; {_TAKEN}. transformers writes a tokenizer.json: "
            "AutoTokenizer.from_pretrained(DIR).save_pretrained(OUT)"
        )


def byte_vocabulary() -> dict[str, int]:
    """Each byte under the character that byte-level BPE writes for it: its own where that can be seen, else the next
    one from U+0100 on.
    """
    seen = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in seen]
    return {chr(256 + hidden.index(b)) if b in hidden else chr(b): b for b in range(256)}


def _is_bytes(engine: Any) -> bool:
    """Whether it is byte-level BPE that knows the bytes and nothing else: a byte tokenizer as transformers reads it."""
    from tokenizers import models, pre_tokenizers

    before = engine.pre_tokenizer
    return (
        isinstance(engine.model, models.BPE)
        and engine.get_vocab() == byte_vocabulary()
        and not engine.get_added_tokens_decoder()
        and engine.normalizer is None
        and isinstance(before, pre_tokenizers.ByteLevel)
        and not before.add_prefix_space
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
    """The engine, which is told that these tokens, where the vocabulary has them, are special."""
    engine.add_special_tokens([token for token in tokens if engine.token_to_id(token) is not None])
    return engine


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
