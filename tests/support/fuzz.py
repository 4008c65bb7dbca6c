"""Damage to files, as disks, people and attackers do it, and what a reader may answer.

    for case in cases({"a.json": valid}, count=100):        # seeded by the test's name and --seed
        case.write(tmp_path)
        check(lambda: read(tmp_path), case)

A reader gives a result, or raises one of the errors that a command prints as one line: ValueError and OSError and what
is derived from them. It ends soon, and takes no more memory than `MEMORY`.
"""

import contextlib
import json
import random
import re
import resource
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

Files = dict[str, bytes]
MEMORY = 1 << 30  # bytes beyond what the process has
SECONDS = 20  # for one case: far more than any takes
ONE_LINE = (ValueError, OSError)

_NUMBERS = (
    0,
    1,
    -1,
    2,
    255,
    1 << 16,
    (1 << 31) - 1,
    1 << 31,
    1 << 32,
    1 << 53,
    1 << 63,
    10**15,
    10**30,
    -(10**30),
)
_NESTED = '{"a": ' * 400 + "1" + "}" * 400
_VALUES = (
    *("null", "true", "false", "1.5", "-0.0", "1e308", "1e999", "NaN", "-Infinity", '""', '"a"', '"\\u0000"'),
    *(
        '"../a"',
        '"/etc/passwd"',
        '"\\ud800"',
        '"a\\nb"',
        f'"{"x" * 5000}"',
        "[]",
        "{}",
        "[[]]",
        '[{"a": null}]',
    ),
    *(_NESTED, "[" * 400 + "]" * 400, "[" * 100_000, *map(str, _NUMBERS), "9" * 5000),
)
_VALUE = re.compile(rb'"(?:[^"\\]|\\.)*"(?!\s*:)|-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?|true|false|null')


class Hang(BaseException):
    """A reader did not end."""


@dataclass(frozen=True)
class Case:
    """Damaged files, and what was done to them."""

    files: Files
    done: list[str]

    def write(self, directory: Path) -> None:
        """Put the files into a directory, in the place of all that it holds."""
        shutil.rmtree(directory, ignore_errors=True)
        for name, content in self.files.items():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            (directory / name).write_bytes(content)


def cases(valid: Files, count: int, others: Files | None = None) -> Iterator[Case]:
    """Cases of one to three damages each; `others` are files whose content may take the place of a valid one's."""
    for _ in range(count):
        draw = random.Random(random.getrandbits(64))
        files, done = dict(valid), []
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            name = draw.choice(sorted(files))
            damage = draw.choice(DAMAGES)
            before = files[name]
            damage(files, name, draw, (others or {}) | valid)
            done.append(
                f"{damage.__name__.strip('_')} {name}: {len(before)} -> {len(files.get(name, b''))} bytes"
            )
        yield Case(files, done)


def check(
    read: Callable[[], object], case: Case, errors: tuple[type[BaseException], ...] = ONE_LINE
) -> object:
    """Call a reader. Return its result, or None where it raised an error that it may raise; all else fails a test."""
    try:
        with _bounded():
            return read()
    except errors as error:
        assert "\n" not in str(error).strip(), (case.done, str(error))
        assert len(str(error)) < 2000, (case.done, len(str(error)))
        return None
    except (Exception, Hang) as error:
        raise AssertionError(f"{type(error).__name__}: {error} after {case.done}") from error


@contextlib.contextmanager
def _bounded() -> Iterator[None]:
    def hang(*_: object) -> None:
        raise Hang(f"no answer in {SECONDS} s")

    limits = resource.getrlimit(resource.RLIMIT_DATA)
    before = signal.signal(signal.SIGALRM, hang)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    resource.setrlimit(resource.RLIMIT_DATA, (_data() + MEMORY, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, limits)
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _data() -> int:
    """The bytes that count for RLIMIT_DATA."""
    text = Path("/proc/self/status").read_text()
    return 1024 * sum(int(re.search(rf"{name}:\s+(\d+)", text)[1]) for name in ("VmData", "VmStk"))


# ---- damages: each changes `files[name]`, or what is beside it ----


def _cut(files: Files, name: str, draw: random.Random, others: Files) -> None:
    files[name] = files[name][: draw.randint(0, len(files[name]))]


def _flip(files: Files, name: str, draw: random.Random, others: Files) -> None:
    content = bytearray(files[name])
    for _ in range(draw.choice((1, 1, 4, 16)) if content else 0):
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    files[name] = bytes(content)


def _flip_in_the_beginning(files: Files, name: str, draw: random.Random, others: Files) -> None:
    content = bytearray(files[name])
    for _ in range(draw.choice((1, 2, 8)) if content else 0):
        content[draw.randrange(min(len(content), 64))] = draw.randrange(256)
    files[name] = bytes(content)


def _overwrite(files: Files, name: str, draw: random.Random, others: Files) -> None:
    content = files[name]
    start, size = draw.randint(0, len(content)), draw.choice((1, 4, 8, 64, 512))
    new = draw.choice((bytes(size), b"\xff" * size, b"\x80" * size, draw.randbytes(size), content[:size]))
    files[name] = content[:start] + new + content[start + draw.choice((0, size)) :]


def _remove(files: Files, name: str, draw: random.Random, others: Files) -> None:
    start = draw.randint(0, len(files[name]))
    files[name] = files[name][:start] + files[name][start + draw.choice((1, 8, 100)) :]


def _repeat(files: Files, name: str, draw: random.Random, others: Files) -> None:
    start, end = sorted(draw.randint(0, len(files[name])) for _ in range(2))
    files[name] = files[name][:end] + files[name][start:]


def _number(files: Files, name: str, draw: random.Random, others: Files) -> None:
    """Another number in a header, a table or a description."""
    found = list(re.finditer(rb"\d+", files[name][: 1 << 16]))
    if found:
        one = draw.choice(found)
        new = str(draw.choice(_NUMBERS)).encode()
        files[name] = files[name][: one.start()] + new + files[name][one.end() :]


def _value(files: Files, name: str, draw: random.Random, others: Files) -> None:
    """Another value in JSON or TOML, of another type, extreme or nested deep."""
    found = list(_VALUE.finditer(files[name][: 1 << 20]))
    if found:
        one = draw.choice(found)
        new = draw.choice(_VALUES).encode()
        files[name] = files[name][: one.start()] + new + files[name][one.end() :]


def _structure(files: Files, name: str, draw: random.Random, others: Files) -> None:
    """JSON without a key, with one more, or with a list where an object was."""
    try:
        value = json.loads(files[name])
    except (ValueError, RecursionError):
        return
    place = value
    while isinstance(place, (dict, list)) and place:
        key = draw.choice(sorted(place)) if isinstance(place, dict) else draw.randrange(len(place))
        if draw.random() < 0.4 or not isinstance(place[key], (dict, list)):
            change = draw.choice(("delete", "double", "list", "object", "null"))
            if change == "delete":
                del place[key]
            elif change == "double" and isinstance(place, list):
                place.append(place[key])
            else:
                place[key] = {"list": [place[key]], "object": {"a": place[key]}}.get(change)
            break
        place = place[key]
    files[name] = json.dumps(value).encode()


def _length(files: Files, name: str, draw: random.Random, others: Files) -> None:
    """Another number in the binary header."""
    size = draw.choice((2, 4, 8))
    start = draw.choice((0, 4, 8, draw.randrange(64)))
    new = (draw.choice(_NUMBERS) % (1 << 8 * size)).to_bytes(size, draw.choice(("little", "big")))
    files[name] = files[name][:start] + new + files[name][start + size :]


def _exchange(files: Files, name: str, draw: random.Random, others: Files) -> None:
    """The content of another file, or of none."""
    files[name] = draw.choice([*others.values(), b"", b"\0", b"{}", b"[]", b"\xff\xfe", draw.randbytes(64)])


def _lose(files: Files, name: str, draw: random.Random, others: Files) -> None:
    if len(files) > 1:
        del files[name]


DAMAGES = (
    *(_cut, _flip, _flip_in_the_beginning, _overwrite, _remove, _repeat, _number, _number, _value, _value),
    *(_structure, _structure, _length, _exchange, _lose),
)
