"""Raw text to clean text, or to the reason why a document is dropped. Pure functions of the text.

In this order: markup is stripped, line ends become \\n, control characters go, Unicode is normalized (of more than 30
combining marks in a row the first 30 stay); then documents are dropped that are empty, too short, too long, or mostly
repetition. Everything takes time in proportion to the text.
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

# Gopher (Rae et al. 2021, table A1): the largest share of a document's characters, or of its lines, that may repeat.
_LINES = 0.30
_LINES_CHARACTERS = 0.20
_MOST_COMMON = {2: 0.20, 3: 0.18, 4: 0.16}  # in the most common n-gram of words
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}  # in n-grams that stood before
_FEWEST_WORDS = 50  # shorter documents, which Gopher has none of, repeat themselves by chance

# Controls but tab and line feed, which other ends of lines become; the byte order mark; what is no character.
_LINE_END = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_CONTROL = re.compile(
    "[\0-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\ufeff\ud800-\udfff\ufdd0-\ufdef"
    + "".join(chr(plane * 0x10000 + last) for plane in range(17) for last in (0xFFFE, 0xFFFF))
    + "]"
)
_TERMINAL = re.compile("\x1b\\[[0-?]*+[ -/]*+[@-~]")  # colours and the like (ECMA-48)
_MARKS = 30  # in a row, of a stream-safe text (Unicode Standard Annex #15): more than any language has
_LAST_MARK = 0x1FFFF  # there are none beyond
_ASCII = {code: None for code in (*range(32), 127)} | {9: 9, 10: 10, 11: 10, 12: 10, 13: 10}


@dataclass(frozen=True)
class Rules:
    """What `clean` does. Raises ValueError for a choice that there is not.

    The rules about repetition were found on prose; "auto" applies them to what is no program.
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
            raise ValueError(f"max_chars={self.max_chars} must not be below min_chars={self.min_chars}")


class Cleaned(NamedTuple):
    """A clean text; what changed it, of "markup", "control" and "unicode"; why to drop it, of DROPPED, or None."""

    text: str
    changes: list[str]
    dropped: str | None


def clean(text: str, rules: Rules) -> Cleaned:
    """Clean a document, and judge what is left."""
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
    """Text whose lines end in \\n, without control characters (tabs stay), terminal colours, byte order marks,
    surrogates and noncharacters.
    """
    if "\x1b" in text:
        text = _TERMINAL.sub("", text)
    if text.isascii():  # many times as fast
        return text.replace("\r\n", "\n").translate(_ASCII)
    return _CONTROL.sub("", _LINE_END.sub("\n", text))


def _normalized(text: str, form: Any) -> str:
    """Normalize a text, with at most _MARKS non-starters in a row: `normalize` sorts a run in quadratic time."""
    # A longer run has a character at one of these places.
    if not (text.isascii() or _marks()[1].isdisjoint(text[_MARKS :: _MARKS + 1])):
        text = _without_long_runs(text)
    return unicodedata.normalize(form, text)


def _without_long_runs(text: str) -> str:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    is_mark = _marks()[0][np.minimum(codes, _LAST_MARK)]
    places = np.arange(len(codes), dtype=np.int32)
    before = np.maximum.accumulate(
        np.where(is_mark, np.int32(-1), places)
    )  # the last starter up to each place
    kept = places - before <= _MARKS
    return text if kept.all() else codes[kept].tobytes().decode("utf-32-le", "surrogatepass")


@functools.cache
def _marks() -> tuple[npt.NDArray[np.bool_], frozenset[str]]:
    """Which code points up to _LAST_MARK are non-starters, characters that decompose to combining marks alone."""
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
# Possessive, so that a text made of beginnings takes no longer than another.
_ATTRIBUTE = r"\s++([\w:.-]++)(?:\s*+=\s*+(?:\"[^\"<]*+\"|'[^'<]*+'|[^\s\"'<>=`]++))?+"
_ATTRIBUTES = re.compile(_ATTRIBUTE)
_MARK = re.compile(
    rf"<!--|<!\[CDATA\[|<[!?][^<>]*+>|<(/?)([a-zA-Z][\w:.-]*+)((?:{_ATTRIBUTE.replace('(', '(?:', 1)})*+)\s*+/?>"
)
_EMPTY_LINES = re.compile(r"\n(?:[ \t]*+\n){2,}+")
_BEFORE_A_STRING = "\"'`"
# A line as programs have it and prose has not: it ends like a statement or begins with a keyword.
_CODE_LINE = re.compile(
    r"^[ \t]*+(?:#include\b|@\w|(?:def|class|fn|func|function|public|private|static|import|from|return|const|let|var|"
    r"namespace|using|package)\b(?:.*[:;{(=.]|[ ]\w+$)|[\w.]++(?:\[[^]\n]*+\])?+ [-+*/|&]?= |[\w.]++\(.*\)$)|"
    r"[;{}][ \t]*+$",
    re.MULTILINE,
)
_CODE_SHARE = 0.1


def is_program(text: str) -> bool:
    """Whether at least a tenth of the lines that hold anything look like those of a program."""
    lines = sum(1 for line in text.split("\n") if line and not line.isspace())
    return sum(1 for _ in _CODE_LINE.finditer(text)) >= _CODE_SHARE * max(1, lines)


def is_markup(text: str) -> bool:
    """Whether a text is HTML or XML, or holds remnants of it, and is no program.

    It is where it begins as such a document. Otherwise a pair of HTML's tags, a lone one such as <br>, a comment or an
    entity says so, unless a quote stands before it or the text is a program: `a < b`, `List<int>`, `#include <x>` and
    the HTML in a program's strings are no markup.
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
    """Whether what has the form of a tag is one of HTML's: in `a<b and c>d` the "attributes" have no values."""
    name = mark[2].lower()
    return (name in _BLOCKS or name in _INLINE) and all(
        "=" in attribute[0] or attribute[1].lower() in _FLAGS for attribute in _ATTRIBUTES.finditer(mark[3])
    )


def strip_markup(text: str) -> str:
    """The text of HTML or XML: tags, comments, scripts and styles gone, entities decoded, block elements on lines of
    their own. Of a text that does not begin as a document, only HTML's own tags go.
    """
    whole = bool(_DOCUMENT.match(text))
    parts: list[str] = []
    unclosed: set[str] = set()  # ends that the rest of the text lacks, not to be looked for again
    place = 0

    def upto(end: str) -> tuple[int, int] | None:
        """Where what opened at `place` ends; None if it never does."""
        found = None if end in unclosed else re.compile(end, re.IGNORECASE).search(text, place)
        if found is None:
            unclosed.add(end)
        return found.span() if found else None

    while mark := _MARK.search(text, place):
        parts.append(_decoded(text[place : mark.start()]))
        place = mark.end()
        name = (mark[2] or "").lower()
        if mark[0] == "<!--" or mark[0] == "<![CDATA[":
            end = upto("-->" if mark[0] == "<!--" else r"\]\]>")
            if end is None:
                parts.append(mark[0])
            else:
                if mark[0] == "<![CDATA[":
                    parts.append(text[place : end[0]])
                place = end[1]
        elif not name or (not whole and not _is_html(mark)):
            parts.append("" if whole else mark[0])
        elif (
            name in _INVISIBLE
            and not mark[1]
            and not mark[0].endswith("/>")
            and (end := upto(rf"</{name}\s*>"))
        ):
            place = end[1]
        elif name in _BLOCKS:
            parts.append("\n")
    parts.append(_decoded(text[place:]))
    return _EMPTY_LINES.sub("\n\n", "".join(parts)) if len(parts) > 1 else parts[0]


def _decoded(text: str) -> str:
    return _ENTITY.sub(lambda entity: unescape(entity[0]), text) if "&" in text else text


# --- repetition ---


def repetition(text: str) -> str | None:
    """Why a document is too repetitive by Gopher's rules, or None; one of fewer than 50 words never is."""
    words = text.split()
    if len(words) < _FEWEST_WORDS:
        return None
    if _repeats(line for line in text.split("\n") if line.strip()):
        return "repeated lines"
    if _repeats(part for part in re.split(r"\n\s*\n", text) if part.strip()):
        return "repeated paragraphs"
    return "repeated phrases" if _repeats_phrases(words) else None


def _repeats(parts: Iterable[str]) -> bool:
    """Whether too many parts, or too many characters of them, stood before in the same text."""
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
        # A word counts once, in however many repeated n-grams it stands.
        covered = np.cumsum(np.bincount(np.flatnonzero(again), minlength=len(ids) + 1))
        covered[n:] -= covered[:-n].copy()
        repeated = int(length[covered[:-1] > 0].sum())
        if repeated > share * total:
            return True
        if repeated <= min(_REPEATED.values()) * total:
            return False  # longer n-grams that repeat lie within these
    return False


def _ngrams(ids: npt.NDArray[np.uint64], n: int) -> npt.NDArray[np.uint64]:
    """A 64-bit hash of each n-gram, (len(ids) - n + 1,): a polynomial of the words' numbers, modulo 2^64."""
    hashes = np.zeros(len(ids) - n + 1, np.uint64)
    for i in range(n):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + ids[i : len(ids) - n + 1 + i]
    return hashes
