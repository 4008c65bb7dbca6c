"""Example sets generated from the Python installation: no download, deterministic for one version of Python.

summarize  a function of the standard library without its docstring -> the docstring's first line
answer     a function's signature and a question about it -> the answer
code       the head of a function -> its body
translate  a number in one notation -> the same in another: words, Roman numerals, digits of several scripts

The key of an item identifies its subject; held-out and training items have different subjects.
"""

from __future__ import annotations

import ast
import functools
import random
import sysconfig
import textwrap
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastgpt.data.corpus import stdlib_files

_LONGEST_SUMMARIZED = 320  # characters of a function
_SUMMARY = (12, 80)  # characters of the first line of its docstring, at least and at most
_PARAMETERS, _LONGEST_SIGNATURE = (2, 6), 100
_LONGEST_HEAD, _LONGEST_BODY = 100, 140
_NUMBERS = range(1, 4000)  # range of Roman numerals
_PAIRS = 3  # pairs of notations per number
_SCRIPTS = {"Arabic-Indic": "\u0660", "Devanagari": "\u0966", "Thai": "\u0e50"}  # digit zero of each script


class Item(NamedTuple):
    """An example, and a key that identifies its subject."""

    key: str
    input: str
    output: str


def embedded(task: str) -> list[Item]:
    """Return the embedded examples of a task, without duplicates. Raises ValueError if it has none."""
    if task not in _SETS:
        raise ValueError(f"{task} has no embedded examples; give a JSON Lines file")
    return list(dict.fromkeys(_SETS[task]()))


class _Function(NamedTuple):
    """A function of the standard library: first line of its docstring, and source without docstring in two parts."""

    name: str
    arguments: ast.arguments
    summary: str
    head: str
    body: str


@functools.lru_cache(maxsize=1)
def _functions() -> tuple[_Function, ...]:
    """List the functions of the standard library whose head and body are on separate lines."""
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for file in sorted(stdlib_files(root)):
        try:
            source = file.read_text("utf-8")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # invalid escapes in strings
                tree = ast.parse(source)
        except (ValueError, SyntaxError):
            continue
        lines = source.split("\n")
        found += [made for node in _definitions(tree) if (made := _function(node, lines)) is not None]
    return tuple(found)


def _definitions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Yield the functions of a module and the methods of its classes."""
    for node in tree.body:
        for inner in node.body if isinstance(node, ast.ClassDef) else [node]:
            if isinstance(inner, ast.FunctionDef):
                yield inner


def _function(node: ast.FunctionDef, lines: list[str]) -> _Function | None:
    docstring = ast.get_docstring(node) or ""
    body = node.body[1:] if docstring else node.body
    text = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno]))
    if not body or body[0].lineno == node.lineno or not text.startswith("def "):
        return None
    last_of_head = node.body[0].lineno - 1
    head, rest = _cut(text, last_of_head - node.lineno + 1)
    if docstring:
        rest = _cut(rest, (node.body[0].end_lineno or 0) - last_of_head)[1]
    return _Function(node.name, node.args, docstring.partition("\n")[0].strip(), head, rest.strip("\n"))


def _cut(text: str, count: int) -> tuple[str, str]:
    """Split a text after `count` lines; the first part keeps its line ends."""
    lines = text.split("\n")
    return "".join(f"{line}\n" for line in lines[:count]), "\n".join(lines[count:])


def _summarize() -> Iterator[Item]:
    shortest, longest = _SUMMARY
    found: dict[str, str] = {}
    for function in _functions():
        source = function.head + function.body
        if len(source) <= _LONGEST_SUMMARIZED and shortest <= len(function.summary) <= longest:
            found.setdefault(source, function.summary)
    for source, summary in found.items():
        yield Item(summary, source, summary)


def _answer() -> Iterator[Item]:
    fewest, most = _PARAMETERS
    for function in _functions():
        arguments = function.arguments
        names = [argument.arg for argument in (*arguments.posonlyargs, *arguments.args)]
        if not fewest <= len(names) <= most:
            continue
        signature = f"def {function.name}({ast.unparse(arguments)})"
        if len(signature) > _LONGEST_SIGNATURE:
            continue
        rng = random.Random(signature)
        before = rng.randrange(len(names) - 1)
        absent = rng.choice(("value", "name", "path", "other", "key", "data"))
        queried = absent if absent not in names and rng.random() < 0.5 else rng.choice(names)
        exists = queried in [
            argument.arg for argument in ast.walk(arguments) if isinstance(argument, ast.arg)
        ]
        for question, answer in (
            ("What is the function's name?", function.name),
            ("What are its parameters?", ", ".join(names)),
            (f"Which parameter follows {names[before]}?", names[before + 1]),
            (f"Is there a parameter {queried}?", "yes" if exists else "no"),
        ):
            yield Item(signature, f"{signature}\n{question}", answer)


def _code() -> Iterator[Item]:
    for function in _functions():
        head, body = function.head, function.body
        if len(head) > _LONGEST_HEAD or len(body) > _LONGEST_BODY or body.strip() == "pass":
            continue
        yield Item(head, head, body)


def _translate() -> Iterator[Item]:
    for number in _NUMBERS:
        rng = random.Random(number)
        for _ in range(_PAIRS):
            source, target = rng.sample(sorted(_NOTATIONS), 2)
            text = f"{_NOTATIONS[source](number)} in {target}"
            yield Item(str(number), text, _NOTATIONS[target](number))


def _words(number: int) -> str:
    """Write a number below 10,000 in English, with words from Unicode character names."""
    tens = number % 100
    parts = [number // 1000 * 1000, number % 1000 // 100 * 100]
    parts += [tens] if 10 < tens < 20 else [tens // 10 * 10, tens % 10]
    return " ".join(_names()[part] for part in parts if part)


@functools.lru_cache(maxsize=1)
def _names() -> dict[int, str]:
    """Return English numerals from Unicode character names.

    Aegean numbers give "ten", "three hundred" and so on, circled numbers give 11 to 19.
    """
    characters = [*range(0x10107, 0x10134), *range(0x246A, 0x2473)]
    return {
        int(unicodedata.numeric(chr(code))): unicodedata.name(chr(code)).partition(" NUMBER ")[2].lower()
        for code in characters
    }


def _roman(number: int) -> str:
    """Write Roman numerals with subtraction, as in 1994 = MCMXCIV."""
    written = ""
    for value, letters in zip(
        (1000, 900, 500, 400, 100, 90, 50, 40, 10, 9, 5, 4, 1),
        ("M", "CM", "D", "CD", "C", "XC", "L", "XL", "X", "IX", "V", "IV", "I"),
        strict=True,
    ):
        count, number = divmod(number, value)
        written += letters * count
    return written


def _digits_from(zero: str) -> Callable[[int], str]:
    """Make a function that writes numbers with the ten consecutive digits of a script."""
    return lambda number: "".join(chr(ord(zero) + int(digit)) for digit in str(number))


_NOTATIONS: dict[str, Callable[[int], str]] = {
    "digits": str,
    "words": _words,
    "Roman numerals": _roman,
    **{f"{script} digits": _digits_from(zero) for script, zero in _SCRIPTS.items()},
}

_SETS: dict[str, Callable[[], Iterator[Item]]] = {
    "answer": _answer,
    "code": _code,
    "summarize": _summarize,
    "translate": _translate,
}
