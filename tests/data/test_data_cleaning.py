"""Cleaning: planted markup is removed, similar text is kept, and time is linear."""

from __future__ import annotations

import sys
import time
import unicodedata
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastgpt import data
from fastgpt.data import cleaning
from fastgpt.data.cleaning import DROPPED, Rules, clean, is_markup, is_program, repetition, strip_markup

PROSE = (
    "The ship left the harbour before dawn, and nobody on the quay waved. Later the mate would say that he had seen "
    "a light on the hill, but the captain, who had looked at nothing but his charts, denied it. They sailed for nine "
    "days without a word about home; on the tenth it rained, and somebody laughed at last.\n"
)
PROGRAM = """#include <vector>
#include "list.h"
template <typename T> struct Pair { T a, b; };
List<int> f(std::map<a, b> m, vector<string> &s) {
  if (a<b && c>d || x < y) { return List<i>(s[0] << 2); }
  printf("<b>%s</b> &amp; <br>", s);  // <p>no paragraph</p>
}
"""
PYTHON = '''import html

def page(title: str) -> str:
    """Returns <p>the page</p>."""
    body = html.escape(title) + "&lt;br&gt;"
    return f"<html><body>{body}</body></html>"
'''


@pytest.mark.parametrize(
    "text",
    [
        PROSE,
        PROGRAM,
        PYTHON,
        "a < b and c > d, or a<b and c>d; also x<y>z.",
        "List<int> and #include <stdio.h> and Map<String, a> are types, and an <unknown> word",
        "I <3 you, R&D, AT&T, fish & chips; ?a=1&copy=2",
        "Write \"<b>\" or `<br>` or '&amp;' to see it.",
        "Only an opening <b> that nothing closes",
        "e-mail <someone@example.org>, see <https://example.org/a?b=c>",
        "日本語 ｆｕｌｌ ﬁ — “quotes”, é, 👩‍👩‍👧, नमस्ते\u200c, \u00a0nbsp\t tab\n\n\n\nlines  \n",
    ],
)
def test_what_is_clean_stays_as_it_is(text: str):
    assert clean(text, Rules()) == (text, [], None)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a <b>bold</b> word", "a bold word"),
        ("un<i>believ</i>able", "unbelievable"),
        ("one<br>two<BR/>three<br />four", "one\ntwo\nthree\nfour"),
        (
            "fish &amp; chips &lt;3 caf&eacute; &#233; &#xE9; &nosuch; &amp",
            "fish & chips <3 café é é &nosuch; &amp",
        ),
        ("x <!-- not\nthis --> y", "x  y"),
        ('see <a href="http://a.b/?c=d&amp;e" target=_blank>this</a>', "see this"),
        ("<p>One</p>\n\n\n<p>Two &ndash; 2</p>", "\nOne\n\n\nTwo – 2\n"),
        (
            "<div><img src='a.png' alt='>'>text</div> and List<int>, a<b and c>d",
            "\ntext\n and List<int>, a<b and c>d",
        ),
        (
            "<!DOCTYPE html>\n<html><head><title>T</title><style>p { color: red }</style>"
            "<script>if (a < b) { x('</p>') }</script></head><body><custom-tag>B</custom-tag></body></html>",
            "\n\n\nT\n\n\nB\n\n",
        ),
        ("<?xml version='1.0'?>\n<r:a b='c'><d/>x &amp; y<![CDATA[<z> &amp;]]></r:a>", "\nx & y<z> &amp;"),
        ("<b>open comment</b> <!-- never closed &amp; so on", "open comment <!-- never closed & so on"),
    ],
)
def test_markup_goes(text: str, expected: str):
    assert is_markup(text)
    cleaned = clean(text, Rules())
    squeezed = [line for line in expected.split("\n") if line]
    assert [line for line in cleaned.text.split("\n") if line] == squeezed
    assert cleaned.changes == ["markup"] and cleaned.dropped is None
    assert clean(text, Rules(markup="keep")).text == text


def test_a_program_is_stripped_only_when_told_to():
    assert is_program(PROGRAM) and is_program(PYTHON) and not is_program(PROSE * 20)
    assert "</p>" not in clean(PROGRAM, Rules(markup="strip")).text
    assert "List<int> f(std::map<a, b> m, vector<string>" in clean(PROGRAM, Rules(markup="strip")).text


def test_the_standard_library_is_no_markup_and_little_of_it_repetition():
    documents = data.load_corpus("stdlib").train[:150]
    cleaned = [clean(text, Rules()) for text in documents]
    assert not any("markup" in each.changes for each in cleaned)
    assert sum(each.dropped is not None for each in cleaned) <= 1


@given(st.text(max_size=300))
def test_no_control_character_is_left_and_nothing_else_is_lost(text: str):
    cleaned = clean(text, Rules(markup="keep", normalization="none", repetition="keep")).text
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\t\n" for c in cleaned)
    visible = [
        c for c in text if unicodedata.category(c) not in ("Cc", "Cn", "Cs", "Zl", "Zp") and c != "\ufeff"
    ]
    assert [c for c in cleaned if unicodedata.category(c) not in ("Cc", "Cn")] == visible


@given(st.text(alphabet=st.sampled_from("<>/!-&;bpr =\"'a[]?\n \x1b\x00é"), max_size=60))
def test_cleaning_ends_and_cleaning_again_changes_no_control_character(text: str):
    for rules in (Rules(), Rules(markup="strip", repetition="gopher"), Rules("NFKC")):
        once = clean(text, rules).text
        assert clean(once, Rules(rules.normalization, markup="keep"))[:2] == (once, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\0b\x07c\x7fd\x9fe", "abcde"),
        (
            "one\r\ntwo\rthree\x0cfour\x0bfive\x85six\u2028seven\u2029eight",
            "one\ntwo\nthree\nfour\nfive\nsix\nseven\neight",
        ),
        ("one\r\ntwo\rthree\x0cfour\x0bfive", "one\ntwo\nthree\nfour\nfive"),
        ("\ufeffmark\ud800ed\ufffe\U0010ffff", "marked"),
        ("\x1b[1;31mred\x1b[0m", "red"),
        ("tab\tstays\n", "tab\tstays\n"),
    ],
)
def test_control_characters_go_and_line_ends_are_one(text: str, expected: str):
    assert clean(text, Rules()).text == expected


def test_unicode_is_composed_and_on_request_made_compatible():
    text = "e\u0301 ﬁ ｆ ①"
    assert clean(text, Rules()) == ("é ﬁ ｆ ①", ["unicode"], None)
    assert clean(text, Rules("NFKC")).text == "é fi f 1"
    assert clean(text, Rules("none")).text == text


def test_lengths_are_characters():
    rules = Rules(min_chars=3, max_chars=5)
    dropped = {
        text: clean(text, rules).dropped for text in ("", " \n\t", "\0\0\0", "éé", "ééé", "ééééé", "éééééé")
    }
    assert list(dropped.values()) == ["empty", "empty", "empty", "too short", None, None, "too long"]
    assert set(dropped.values()) - {None} <= set(DROPPED)


def words(count: int, start: int = 0) -> str:
    return " ".join(f"w{i}" for i in range(start, start + count))


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (words(200), None),
        ("la " * 49, None),  # too short to judge
        ("la " * 50, "repeated phrases"),
        ("\n".join(["the same line again"] * 20), "repeated lines"),
        (
            "\n".join(["Refrain!"] * 5 + [words(9, 9 * i) for i in range(16)]),
            None,
        ),  # 4 of 21 lines, few characters
        ("\n".join(["Refrain!"] * 9 + [words(9, 9 * i) for i in range(16)]), "repeated lines"),  # 8 of 25
        (
            "\n".join([words(9, 9 * i) for i in range(9)] + [words(60, 100)] * 2),
            "repeated lines",
        ),  # its characters
        (words(100) + " " + words(30), "repeated phrases"),
        (words(1000) + " " + words(30), None),
        (" ".join(f"so it goes w{i}" for i in range(40)), "repeated phrases"),
    ],
)
def test_repetition_by_gophers_rules(text: str, reason: str | None):
    assert repetition(text) == reason
    assert reason is None or reason in DROPPED


def test_repeated_paragraphs_are_found_where_their_lines_are_no_share():
    poem = [f"verse {i} of {i * i} and {i + 7}\n  and some more {i}" for i in range(10)]
    text = "\n\n".join([*poem, "Ah!", "Ah!", "Ah!", "Ah!", "Ah!", "Ah!"])
    assert repetition(text) == "repeated paragraphs"


def test_a_program_may_repeat_itself():
    text = "\n".join(["    return None;"] * 40)
    assert clean(text, Rules()).dropped is None
    assert clean(text, Rules(repetition="gopher")).dropped == "repeated lines"
    assert clean(text, Rules(repetition="keep")).dropped is None


@pytest.mark.parametrize(
    "piece",
    ["<!--", "<a ", "<![CDATA[", "<script>", "</", "<", "&", "<a href='", "<!", "<?", " a", "<b>", "\n", " \n", "def ",
     " ", "&amp;", "import ", "{ ", "(", "x", "\x1b[", "\x1b[1", "1", "a.b(", "a[", "=", "- ", '"', "\r"],
)  # fmt: skip
def test_no_text_takes_long(piece: str):
    """A quadratic algorithm would take minutes for these texts."""
    started = time.perf_counter()
    for before in ("", "<html>", "<b>a</b>", "<a"):
        text = before + piece * (200_000 // len(piece))
        clean(text, Rules(repetition="gopher"))
        strip_markup(text)
    assert time.perf_counter() - started < 10


def test_rules_that_there_are_not_are_refused():
    for wrong in ({"normalization": "NFX"}, {"markup": "no"}, {"repetition": "yes"}):
        with pytest.raises(ValueError, match="must be one of"):
            Rules(**wrong)
    with pytest.raises(ValueError, match="must be at least"):
        Rules(min_chars=5, max_chars=4)


def longest_run(text: str) -> int:
    """Count the longest run of non-starters after compatibility decomposition (Unicode Standard Annex #15)."""
    longest = run = 0
    for character in text:
        run = run + 1 if all(map(unicodedata.combining, unicodedata.normalize("NFKD", character))) else 0
        longest = max(longest, run)
    return longest


MARKS = "\u0301\u0323\u0344\u0f73\u0f75\u0f81\uff9e\u309a\U0001d165\U0001e94a"
CHARACTERS = st.sampled_from("ae漢각\u1100\u1161\u11a8" + MARKS) | st.characters(exclude_categories=["Cs"])


@given(text=st.text(CHARACTERS, max_size=300))
@pytest.mark.parametrize("form", ["NFC", "NFKC"])
def test_a_text_without_long_runs_of_marks_is_normalized_as_unicode_says(text: str, form: str):
    text = cleaning.strip_control(text)
    if longest_run(text) <= 30:
        expected = unicodedata.normalize(form, text)
        assert clean(text, Rules(form, markup="keep", repetition="keep")).text == expected


@given(
    runs=st.lists(st.lists(st.sampled_from(MARKS), max_size=100), min_size=1, max_size=5),
    starter=st.sampled_from("aé漢😀 "),
)
def test_what_is_normalized_has_no_long_run_of_marks(runs: list[list[str]], starter: str):
    """Bound the runs that `unicodedata.normalize` sorts in quadratic time."""
    expected = starter.join("".join(run[:30]) for run in runs)
    with pytest.MonkeyPatch.context() as patch:
        given = []
        stand_in = SimpleNamespace(normalize=lambda form, text: given.append(text) or text)
        cleaning._marks()
        patch.setattr(cleaning, "unicodedata", stand_in)
        assert (
            clean(starter.join(map("".join, runs)), Rules(markup="keep", repetition="keep")).text == expected
        )
    assert given == [expected]


def test_every_non_starter_counts():
    marks = {chr(code) for code in range(sys.maxunicode + 1) if longest_run(chr(code))}
    assert cleaning._marks()[1] == marks
