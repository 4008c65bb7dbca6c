"""Validation of tokenizer.json files, and a guard around the package `tokenizers`.

Such a file is a small program: a normalizer rewrites the text, and regular expressions split it. It may come from an
untrusted source. Therefore only known kinds of steps are accepted, the growth of the text is bounded, and a regular
expression must be one of a published tokenizer, or have no repetition, so that it cannot backtrack exponentially. The
package raises bare Exceptions, and a BaseException for its internal errors; `guarded` converts them to ValueErrors.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterator
from math import prod
from typing import Any

from fastgpt.json_io import shown

MOST_TOKENS = 1 << 24
_SHOWN = 200  # characters of a message of the package
_STEPS = 32  # steps per component
_GROWTH = 128  # factor by which all steps of a component may lengthen a text
_LONGEST = 64  # bytes of a prefix, and of the replacement of a character
_LONGEST_WORD = 1000  # characters; WordPiece takes quadratic time

_MODELS = ("BPE", "WordPiece", "WordLevel", "Unigram")
# Accepted kinds of steps, and the key of the steps of a sequence.
_KINDS = {
    "normalizer": (
        (
            *("BertNormalizer", "ByteLevel", "Lowercase", "NFC", "NFD", "NFKC", "NFKD", "Nmt", "Precompiled"),
            *("Prepend", "Replace", "Strip", "StripAccents"),
        ),
        "normalizers",
    ),
    "pre_tokenizer": (
        (
            *("BertPreTokenizer", "ByteLevel", "CharDelimiterSplit", "Digits", "Metaspace", "Punctuation"),
            *("Split", "UnicodeScripts", "Whitespace", "WhitespaceSplit"),
        ),
        "pretokenizers",
    ),
    "post_processor": (
        ("BertProcessing", "ByteLevel", "RobertaProcessing", "TemplateProcessing"),
        "processors",
    ),
    "decoder": (
        ("BPEDecoder", "ByteFallback", "ByteLevel", "Fuse", "Metaspace", "Replace", "Strip", "WordPiece"),
        "decoders",
    ),
}

# Regular expressions with repetition from published tokenizers; each takes linear time.
_END = r"|\s*[\r\n]+|\s+(?!\S)|\s+"
_REGEXES = {
    # GPT-2, CLIP, BLOOM
    r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+",
    r" ?[^(\s|[.,!?…。，、।۔،])]+",
    # GPT-4, Llama 3, Qwen 2 and 3.5
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*" + _END,
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    + _END,
    # GPT-4o, Mistral
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END,
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*" + _END,
    # DeepSeek
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"""
    + _END,
    # T5, ALBERT, Pegasus, DeBERTa, NLLB
    *(" {2,}", r"\s{2,}|[\n\r\t]", r"\s+", "^▁+$", r"\A▁"),
}
_WITHOUT_REPETITION = re.compile(
    r"(?:\\[^0-9A-Za-z]|\\[dDwWsSnrtvf]|\\[pP]\{\^?\w+\}|\[\^?(?:\\.|[^\\\[\]])+\]|[^\\.^$*+?{}()\[\]])++"
)


def check_tokenizer(value: dict[str, Any]) -> None:
    """Raise ValueError for a parsed tokenizer.json whose work is not known to be bounded."""
    for part, (kinds, _) in _KINDS.items():
        steps = list(_steps(value.get(part), part))
        for step in steps:
            if step.get("type") not in kinds:
                raise ValueError(f"its {part} has the unsupported type {shown(step.get('type'))}")
        if prod(map(_growth, steps)) > _GROWTH:
            raise ValueError(f"its {part} may lengthen a text more than {_GROWTH} times")
    model = value.get("model")
    # Old files lack the type.
    if not isinstance(model, dict) or model.get("type", "BPE") not in _MODELS:
        raise ValueError("it has no model of a supported type")
    longest = model.get("max_input_chars_per_word", 0)
    if type(longest) is not int or not 0 <= longest <= _LONGEST_WORD:
        raise ValueError(f"its max_input_chars_per_word is not an integer up to {_LONGEST_WORD}")
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        _size(model.get(name) or "", name)
    if isinstance(model.get("merges"), list):
        _check_merges(model["merges"], model.get("vocab"), model.get("continuing_subword_prefix") or "")


def _check_merges(merges: list[Any], vocabulary: Any, prefix: str) -> None:
    """Raise ValueError for a merge whose result is not a token; the package would read invalid memory."""
    for merge in merges:
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if not (
            isinstance(vocabulary, dict)
            and isinstance(pair, (list, tuple))
            and len(pair) == 2
            and all(isinstance(part, str) and part in vocabulary for part in pair)
            and pair[1].startswith(prefix)
            and pair[0] + pair[1][len(prefix) :] in vocabulary
        ):
            raise ValueError(f"its merge {shown(merge)} does not join two tokens to a third")


def check_ids(vocabulary: dict[str, Any]) -> None:
    """Raise ValueError unless ids are distinct nonnegative integers without large gaps."""
    for token, number in vocabulary.items():
        if type(number) is not int or number < 0:
            raise ValueError(f"the id of {shown(token)} is {shown(number)}, not a nonnegative integer")
    largest = max(vocabulary.values(), default=0)
    if largest >= MOST_TOKENS or largest > 2 * len(vocabulary) + 1024:
        raise ValueError(f"it has {len(vocabulary):,} tokens with ids up to {largest:,}, too large a range")
    if len(set(vocabulary.values())) != len(vocabulary):
        raise ValueError("two of its tokens have the same id")


def guarded(function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """Call a function of the package `tokenizers`. Raises ValueError for any of its errors."""
    try:
        return function(*arguments, **options)
    except MemoryError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        message = " ".join(str(error)[: 2 * _SHOWN].split()) or type(error).__name__
        raise ValueError(message if len(message) <= _SHOWN else f"{message[:_SHOWN]}…") from None


def _steps(component: Any, part: str) -> Iterator[dict[str, Any]]:
    """Yield the steps of a component, with those of nested sequences."""
    pending = [] if component is None else [component]
    count = 0
    while pending:
        step = pending.pop()
        count += 1
        if not isinstance(step, dict) or count > _STEPS:
            raise ValueError(
                f"its {part} " + ("has too many steps" if count > _STEPS else "is not an object")
            )
        if step.get("type") != "Sequence":
            yield step
            continue
        inner = step.get(_KINDS[part][1])
        if not isinstance(inner, list):
            raise ValueError(f"its {part} has a sequence without steps")
        pending += inner


def _growth(step: dict[str, Any]) -> float:
    """Return the factor by which a step may lengthen a text, as far as the file determines it."""
    kind = step["type"]
    if kind == "Prepend":
        _size(step.get("prepend"), "prefix")
    if kind == "TemplateProcessing":
        _check_template(step)
    if kind == "Strip" and not all(step.get(name, 0) in range(_LONGEST) for name in ("start", "stop")):
        raise ValueError(f"its Strip must remove fewer than {_LONGEST} characters")
    if kind == "Precompiled":
        return _longest_replacement(step.get("precompiled_charsmap"))
    if kind not in ("Replace", "Split"):
        return 1
    pattern = step.get("pattern")
    (mode, text), *more = pattern.items() if isinstance(pattern, dict) and pattern else [("", "")]
    if more or mode not in ("String", "Regex") or not isinstance(text, str) or not text:
        raise ValueError(f"the pattern of its {kind} is neither a text nor a regular expression")
    if mode == "Regex" and text not in _REGEXES and not _WITHOUT_REPETITION.fullmatch(text):
        raise ValueError(f"its regular expression {shown(text)} is not supported")
    if kind == "Split":
        return 1
    shortest = len(text.encode("utf-8", "replace")) if mode == "String" else 1
    return max(1, _size(step.get("content"), "replacement") / shortest)


def _size(text: Any, name: str) -> int:
    """Return the size of a text in bytes. Raises ValueError above _LONGEST."""
    size = len(text.encode("utf-8", "replace")) if isinstance(text, str) else _LONGEST + 1
    if size > _LONGEST:
        raise ValueError(f"its {name} is not a text of at most {_LONGEST} bytes")
    return size


def _longest_replacement(table: Any) -> int:
    """Return the bytes of the longest replacement in a SentencePiece character table.

    The table consists of the size of a trie, the trie, and the replacements, each terminated by NUL.
    """
    try:
        raw = base64.b64decode(table, validate=True)
        texts = raw[4 + int.from_bytes(raw[:4], "little") :]
        texts.decode("utf-8")
    except (TypeError, ValueError):
        texts = b""
    longest = max(map(len, texts.split(b"\0")))
    if not texts.endswith(b"\0") or longest > _LONGEST:
        raise ValueError("its precompiled_charsmap is damaged, or has replacements that are too long")
    return max(1, longest)


def _check_template(step: dict[str, Any]) -> None:
    """Raise ValueError for a template that repeats the text."""
    for name, most in (("single", 1), ("pair", 2)):
        pieces = step.get(name)
        pieces = pieces if isinstance(pieces, list) else [None] * (_STEPS + 1)
        texts = sum(isinstance(piece, dict) and "Sequence" in piece for piece in pieces)
        if len(pieces) > _STEPS or texts > most:
            raise ValueError(f"its template {name!r} is too long or repeats the text")
