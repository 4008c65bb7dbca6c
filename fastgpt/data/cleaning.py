r"""Cleaning and filtering of raw text; every function is a pure function of the text.

The order is: strip markup, convert line ends to \n, remove control characters, normalize Unicode (at most 30
consecutive combining marks are kept). Then documents are dropped that are empty, too short, too long, or mostly
repetition. Time is linear in the length of the text.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from html import unescape
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

NORMALIZATIONS = ("NFC", "NFKC", "none")
MARKUP = ("auto", "strip", "keep")
REPETITION = ("auto", "gopher", "keep")
DROPPED = ("empty", "too short", "too long", "repeated lines", "repeated paragraphs", "repeated phrases")

# Gopher (Rae et al. 2021, table A1): largest fraction of a document's characters, or of its lines, that may repeat.
_LINES = 0.30
_LINES_CHARACTERS = 0.20
_MOST_COMMON = {2: 0.20, 3: 0.18, 4: 0.16}  # in the most common n-gram of words
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # in n-grams that occurred earlier
_FEWEST_WORDS = 50  # shorter documents repeat by chance; Gopher's rules drop them for their length

# All controls except tab and line feed (other line ends are converted first), byte order marks, noncharacters.
_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane * 0x10000 + last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)
_TERMINAL = re.compile("\x1b\\[[0-?]*+[ -/]*+[@-~]")  # escape sequences, such as colours (ECMA-48)
_MARKS = 30  # limit of the Stream-Safe Text Format (Unicode Standard Annex #15); no language needs more
_LAST_MARK = 0x1FFFF  # no combining mark has a larger code point
_ASCII = {code: None for code in (*range(32), 127)} | {9: 9, 10: 10, 11: 10, 12: 10, 13: 10}


@dataclass(frozen=True)
class Rules:
    """Options of `clean`.

    The rules for repetition were developed for prose; repetition="auto" skips them for programs.

    Attributes:
        normalization: one of NORMALIZATIONS.
        markup: one of MARKUP.
        min_chars: characters of the shortest document that is kept.
        max_chars: characters of the longest document that is kept; None for no limit.
        repetition: one of REPETITION.

    Raises:
        ValueError: a choice does not exist, or max_chars < min_chars.
    """

    normalization: str = "NFC"
    markup: str = "auto"
    min_chars: int = 1
    max_chars: int | None = None
    repetition: str = "auto"

    def __post_init__(self) -> None:
        for name, choices in (
            ("normalization", NORMALIZATIONS),
            ("markup", MARKUP),
            ("repetition", REPETITION),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, not {getattr(self, name)!r}")
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError(f"max_chars={self.max_chars} must be at least min_chars={self.min_chars}")


class Cleaned(NamedTuple):
    """Result of `clean`.

    Attributes:
        text: the clean text.
        changes: the steps that changed it, out of "markup", "control" and "unicode".
        dropped: the reason for dropping it, one of DROPPED, or None.
    """

    text: str
    changes: list[str]
    dropped: str | None


def clean(text: str, rules: Rules) -> Cleaned:
    """Clean a document, and decide whether to drop it."""
    changes = []
    if rules.markup == "strip" or (rules.markup == "auto" and is_markup(text)):
        before, text = text, strip_markup(text)
        changes += ["markup"] * (text != before)
    before, text = text, strip_control(text)
    changes += ["control"] * (text != before)
    if rules.normalization != "none":
        before, text = text, _normalized(text, rules.normalization)
        changes += ["unicode"] * (text != before)
    return Cleaned(text, changes, _reason(text, rules))


def _reason(text: str, rules: Rules) -> str | None:
    if not text or text.isspace():
        return "empty"
    if len(text) < rules.min_chars:
        return "too short"
    if rules.max_chars is not None and len(text) > rules.max_chars:
        return "too long"
    if rules.repetition == "keep" or (rules.repetition == "auto" and is_program(text)):
        return None
    return repetition(text)


def strip_control(text: str) -> str:
    r"""Convert line ends to \n, and remove characters that are not text.

    Removed are control characters except tabs, terminal escape sequences, byte order marks, surrogates and
    noncharacters.
    """
    if "\x1b" in text:
        text = _TERMINAL.sub("", text)
    if text.isascii():  # translate is many times faster than the regular expressions
        return text.replace("\r\n", "\n").translate(_ASCII)
    return _CONTROL.sub("", _LINE_END.sub("\n", text))


def _normalized(text: str, form: Any) -> str:
    """Normalize a text after truncating runs of more than _MARKS non-starters.

    `unicodedata.normalize` sorts such a run in quadratic time.
    """
    # Every run of more than _MARKS marks covers one of these positions.
    if not (text.isascii() or _marks()[1].isdisjoint(text[_MARKS :: _MARKS + 1])):
        text = _without_long_runs(text)
    return unicodedata.normalize(form, text)


def _without_long_runs(text: str) -> str:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    is_mark = _marks()[0][np.minimum(codes, _LAST_MARK)]
    positions = np.arange(len(codes), dtype=np.int32)
    last_starter = np.maximum.accumulate(np.where(is_mark, np.int32(-1), positions))
    kept = positions - last_starter <= _MARKS
    return text if kept.all() else codes[kept].tobytes().decode("utf-32-le", "surrogatepass")


@functools.cache
def _marks() -> tuple[npt.NDArray[np.bool_], frozenset[str]]:
    """Return the non-starters up to _LAST_MARK, as a mask over code points and as a set.

    Non-starters are characters that decompose to combining marks only.
    """
    decomposed = [unicodedata.normalize("NFKD", chr(code)) for code in range(_LAST_MARK + 1)]
    is_mark = [all(map(unicodedata.combining, characters)) for characters in decomposed]
    return np.array(is_mark), frozenset(chr(code) for code, found in enumerate(is_mark) if found)


# --- markup ---

_BLOCKS = {
    "address", "article", "aside", "blockquote", "body", "br", "caption", "center", "dd", "details",
    "div", "dl", "dt", "fieldset", "figcaption", "figure", "footer", "form", "h1", "h2", "h3", "h4",
    "h5", "h6", "head", "header", "hr", "html", "legend", "li", "main", "nav", "ol", "optgroup",
    "option", "p", "pre", "section", "select", "summary", "table", "tbody", "td", "tfoot", "th", "thead",
    "title", "tr", "ul",
}  # fmt: skip
_INLINE = {
    "a", "abbr", "acronym", "audio", "b", "base", "bdi", "bdo", "big", "button", "canvas", "cite",
    "code", "col", "colgroup", "data", "datalist", "del", "dfn", "dialog", "em", "embed", "font", "i",
    "iframe", "img", "input", "ins", "kbd", "label", "link", "map", "mark", "meta", "meter", "nobr",
    "noscript", "object", "output", "param", "picture", "progress", "q", "rp", "rt", "ruby", "s", "samp",
    "script", "small", "source", "span", "strike", "strong", "style", "sub", "sup", "svg", "template",
    "textarea", "time", "track", "tt", "u", "var", "video", "wbr",
}  # fmt: skip
_INVISIBLE = {"script", "style", "svg", "template"}
_FLAGS = {  # attributes that have no value
    "allowfullscreen", "async", "autofocus", "autoplay", "checked", "controls", "default", "defer",
    "disabled", "download", "hidden", "ismap", "loop", "multiple", "muted", "nomodule", "noshade",
    "novalidate", "nowrap", "open", "readonly", "required", "reversed", "selected",
}  # fmt: skip
_DOCUMENT = re.compile(r"\s*(?:<!doctype\b|<html[\s>]|<\?xml\b)", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[a-zA-Z][a-zA-Z0-9]{1,31});")
# Possessive quantifiers keep the time linear for texts that consist of unfinished tags.
_ATTRIBUTE = r"\s++([\w:.-]++)(?:\s*+=\s*+(?:\"[^\"<]*+\"|'[^'<]*+'|[^\s\"'<>=`]++))?+"
_ATTRIBUTES = re.compile(_ATTRIBUTE)
_MARK = re.compile(
    rf"<!--|<!\[CDATA\[|<[!?][^<>]*+>|<(/?)([a-zA-Z][\w:.-]*+)((?:{_ATTRIBUTE.replace('(', '(?:', 1)})*+)\s*+/?>"
)
_EMPTY_LINES = re.compile(r"\n(?:[ \t]*+\n){2,}+")
_BEFORE_A_STRING = "\"'`"
# A line that is typical of programs and rare in prose: it ends like a statement or begins with a keyword.
_CODE_LINE = re.compile(
    r"^[ \t]*+(?:#include\b|@\w|(?:def|class|fn|func|function|public|private|static|import|from|return|const|let|var|"
    r"namespace|using|package)\b(?:.*[:;{(=.]|[ ]\w+$)|[\w.]++(?:\[[^]\n]*+\])?+ [-+*/|&]?= |[\w.]++\(.*\)$)|"
    r"[;{}][ \t]*+$",
    re.MULTILINE,
)
_CODE_SHARE = 0.1


def is_program(text: str) -> bool:
    """Return True if at least a tenth of the nonblank lines look like lines of a program."""
    lines = sum(1 for line in text.split("\n") if line and not line.isspace())
    return sum(1 for _ in _CODE_LINE.finditer(text)) >= _CODE_SHARE * max(1, lines)


def is_markup(text: str) -> bool:
    """Return True for HTML or XML, or text with remnants of it, but not for programs.

    A text is markup if it begins like an HTML or XML document. Otherwise it must contain a pair of HTML tags, a single
    tag such as <br>, a comment or an entity, not preceded by a quote, and must not be a program: `a < b`, `List<int>`,
    `#include <x>` and HTML in the strings of a program are not markup.
    """
    return bool(_DOCUMENT.match(text)) or (_has_remnant(text) and not is_program(text))


def _has_remnant(text: str) -> bool:
    if any(unescape(match[0]) != match[0] for match in _unquoted(_ENTITY, text)):
        return True
    opened = set()
    last_comment_end = text.rfind("-->")
    for mark in _unquoted(_MARK, text):
        if mark[0] == "<!--" and mark.end() <= last_comment_end:
            return True
        if mark[2] and _is_html(mark):
            name = mark[2].lower()
            if name in ("br", "hr", "img") or (mark[1] and name in opened):
                return True
            opened.add(name)
    return False


def _unquoted(pattern: re.Pattern[str], text: str) -> Iterator[re.Match[str]]:
    for match in pattern.finditer(text):
        if match.start() == 0 or text[match.start() - 1] not in _BEFORE_A_STRING:
            yield match


def _is_html(mark: re.Match[str]) -> bool:
    """Return True if a match is an HTML tag; in `a<b and c>d` the "attributes" have no values."""
    name = mark[2].lower()
    return (name in _BLOCKS or name in _INLINE) and all(
        "=" in attribute[0] or attribute[1].lower() in _FLAGS for attribute in _ATTRIBUTES.finditer(mark[3])
    )


def strip_markup(text: str) -> str:
    """Extract the text of HTML or XML.

    Tags, comments, scripts and styles are removed, entities are decoded, and block elements start new lines. If the
    text does not begin like an HTML or XML document, only HTML tags are removed.
    """
    whole = bool(_DOCUMENT.match(text))
    parts: list[str] = []
    unclosed: set[str] = (
        set()
    )  # end patterns that the rest lacks: repeated searches would take quadratic time
    position = 0

    def find_end(pattern: str) -> tuple[int, int] | None:
        """Return the span of the end of the element opened at `position`; None if it is not closed."""
        found = None if pattern in unclosed else re.compile(pattern, re.IGNORECASE).search(text, position)
        if found is None:
            unclosed.add(pattern)
        return found.span() if found else None

    while mark := _MARK.search(text, position):
        parts.append(_decoded(text[position : mark.start()]))
        position = mark.end()
        name = (mark[2] or "").lower()
        if mark[0] == "<!--" or mark[0] == "<![CDATA[":
            end = find_end("-->" if mark[0] == "<!--" else r"\]\]>")
            if end is None:
                parts.append(mark[0])
            else:
                if mark[0] == "<![CDATA[":
                    parts.append(text[position : end[0]])
                position = end[1]
        elif not name or (not whole and not _is_html(mark)):
            parts.append("" if whole else mark[0])
        elif (
            name in _INVISIBLE
            and not mark[1]
            and not mark[0].endswith("/>")
            and (end := find_end(rf"</{name}\s*>"))
        ):
            position = end[1]
        elif name in _BLOCKS:
            parts.append("\n")
    parts.append(_decoded(text[position:]))
    return _EMPTY_LINES.sub("\n\n", "".join(parts)) if len(parts) > 1 else parts[0]


def _decoded(text: str) -> str:
    return _ENTITY.sub(lambda entity: unescape(entity[0]), text) if "&" in text else text


# --- repetition ---


def repetition(text: str) -> str | None:
    """Return why a document is too repetitive by Gopher's rules, or None; under 50 words it never is."""
    words = text.split()
    if len(words) < _FEWEST_WORDS:
        return None
    if _repeats(line for line in text.split("\n") if line.strip()):
        return "repeated lines"
    if _repeats(part for part in re.split(r"\n\s*\n", text) if part.strip()):
        return "repeated paragraphs"
    return "repeated phrases" if _repeats_phrases(words) else None


def _repeats(parts: Iterable[str]) -> bool:
    """Return True if too many parts, or too many of their characters, repeat earlier parts."""
    seen: set[str] = set()
    count = repeated = characters = repeated_characters = 0
    for part in parts:
        count += 1
        characters += len(part)
        if part in seen:
            repeated += 1
            repeated_characters += len(part)
        seen.add(part)
    return repeated > _LINES * count or repeated_characters > _LINES_CHARACTERS * characters


def _repeats_phrases(words: list[str]) -> bool:
    number: dict[str, int] = {}
    ids = np.array([number.setdefault(word, len(number)) for word in words], np.uint64)
    length = np.array([len(word) for word in words])
    before = np.concatenate([[0], np.cumsum(length)])
    total = int(before[-1])
    for n, share in _MOST_COMMON.items():
        _, first, count = np.unique(_ngrams(ids, n), return_index=True, return_counts=True)
        characters = (before[first + n] - before[first]) * count
        if characters[count > 1].max(initial=0) > share * total:
            return True
    for n, share in _REPEATED.items():
        _, first = np.unique(_ngrams(ids, n), return_index=True)
        again = np.ones(len(ids) - n + 1, bool)
        again[first] = False
        # A word counts once, even if several repeated n-grams contain it.
        covered = np.cumsum(np.bincount(np.flatnonzero(again), minlength=len(ids) + 1))
        covered[n:] -= covered[:-n].copy()
        repeated = int(length[covered[:-1] > 0].sum())
        if repeated > share * total:
            return True
        if repeated <= min(_REPEATED.values()) * total:
            return False  # longer repeated n-grams are contained in these
    return False


def _ngrams(ids: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.uint64]:
    """Hash each n-gram to 64 bits, (len(ids) - n + 1,): a polynomial in the word ids modulo 2^64."""
    hashes = np.zeros(len(ids) - n + 1, np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - n + 1 + i]
    return hashes
