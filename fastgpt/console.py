r"""Output of the commands, on streams with any encoding that the reader may close at any time.

stdout and stderr escape characters that their encoding lacks. A stream that is closed at the start is replaced by the
null device. If the reader closes the stream, as `head` does, a command ends without a message; `fastgpt train` saves
first.

Model output and file names may come from an untrusted source, and terminals execute control characters: they set the
title and the clipboard, and can answer as if the user typed. On a terminal they are therefore escaped (\x1b), as are
characters that override the direction of text (\u202e), which disguise what a line contains. Pipes and files receive
them unmodified.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import select
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from tqdm import tqdm

from fastgpt.json_io import dumps

READER_GONE = 141  # 128 + SIGPIPE, a shell's status of a program that writes to a closed pipe
# C0 except tab and line feed, DEL, C1; embeddings, overrides and isolates of the bidirectional algorithm, not marks.
_CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_GONE = (errno.EPIPE, errno.EIO)  # a pipe without a reader, a terminal that was closed


def run_command(command: Callable[[], int]) -> int:
    """Run a command that prints; return its exit status, or READER_GONE if the reader has closed the output."""
    set_up_streams()
    try:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("always", Note)
                warnings.showwarning = _warning_printer()
                return command()
        finally:
            sys.stdout.flush()  # an error in the flush at exit could not be handled
            sys.stderr.flush()
    except OSError as error:
        if not give_up_broken_streams():
            raise
        if error.errno in _GONE:
            return READER_GONE
        show(f"fastgpt: error: standard output: {error.strerror}", file=sys.stderr)
        return 2


def set_up_streams() -> None:
    """Make stdout and stderr accept every text, even if they were closed when the program started."""
    _occupy_standard_descriptors()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, _null())
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def reader_is_gone(error: BaseException) -> bool:
    """Return True if an error comes from stdout or stderr after the reader has closed it."""
    return isinstance(error, OSError) and error.errno in _GONE and bool(_broken_streams())


def give_up_broken_streams() -> bool:
    """Redirect stdout and stderr to the null device if they cannot be written; return True if one was."""
    broken = _broken_streams()
    for name in broken:
        _point_to_null(name, getattr(sys, name))
    return bool(broken)


def _broken_streams() -> list[str]:
    broken = []
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        try:
            if stream is not None:
                stream.flush()
                if _has_no_reader(stream.fileno()):
                    broken.append(name)
        except io.UnsupportedOperation:  # the stream has no descriptor
            continue
        except (OSError, ValueError):  # ValueError: it was closed in this process
            broken.append(name)
    return broken


def _has_no_reader(descriptor: int) -> bool:
    """Return True for a pipe without a reader, or a closed terminal; an unbuffered stream does not report it."""
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def show(text: str, *, end: str = "\n", file: TextIO | None = None) -> None:
    """Print a text to stdout or another stream, and flush."""
    stream = file or sys.stdout
    print(_CONTROL.sub(_escape, text) if _is_terminal(stream) else text, end=end, file=stream, flush=True)


def print_json(value: Any) -> None:
    """Print a value as one line of JSON, in ASCII if stdout cannot encode all of its characters."""
    text = dumps(value, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        text = dumps(value)
    if _is_terminal(sys.stdout):
        text = _CONTROL.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    print(text, flush=True)


def _is_terminal(stream: Any) -> bool:
    """Return True for a terminal; replacements of stdout in other programs may lack `isatty`."""
    return hasattr(stream, "isatty") and not getattr(stream, "closed", False) and stream.isatty()


def _escape(found: re.Match[str]) -> str:
    return found[0].encode("unicode_escape").decode("ascii")


class Note(UserWarning):
    """Warning with information for the user that is not an error; the commands print it as a line."""


def note(text: str) -> None:
    """Issue a note as a warning; in a distributed run only the first process does."""
    if os.environ.get("RANK", "0") == "0":
        warnings.warn(text, Note, stacklevel=3)


def _warning_printer() -> Callable[..., None]:
    """Make a function that prints each note once, as a line, and passes on other warnings."""
    show_other, shown = warnings.showwarning, set()

    def show_warning(message: Any, category: type[Warning], *location: Any, **more: Any) -> None:
        if not issubclass(category, Note):
            show_other(message, category, *location, **more)
        elif str(message) not in shown:
            shown.add(str(message))
            show(f"fastgpt: note: {message}", file=sys.stderr)

    return show_warning


class Progress:
    """Progress bar on stderr, if that is a terminal, and lines on stdout beside it.

    Errors of the streams are not raised.

    Args:
        shown: False for a process that prints nothing.
        reader_gone: called when the reader of stdout or stderr has closed it.
        **options: options of `tqdm`.
    """

    def __init__(
        self, *, shown: bool = True, reader_gone: Callable[[], object] = lambda: None, **options: Any
    ) -> None:
        self._shown, self._reader_gone = shown, reader_gone
        self._warned: set[str] = set()
        self._bar: tqdm | None = None
        if sys.stderr is not None:
            with self._tolerant():
                self._bar = tqdm(disable=None if shown else True, file=sys.stderr, **options)

    def advance(self, count: float = 1) -> None:
        """Advance the bar."""
        with self._tolerant():
            if self._bar is not None:
                self._bar.update(count)

    def describe(self, text: str) -> None:
        """Show a text before the bar."""
        with self._tolerant():
            if self._bar is not None:
                self._bar.set_description(text)

    def note(self, text: str) -> None:
        """Show a text next to the bar."""
        with self._tolerant():
            if self._bar is not None:
                self._bar.set_postfix_str(text)

    def line(self, text: str) -> None:
        """Print a line to stdout."""
        if self._shown:
            with self._tolerant(), self._beside_the_bar():
                show(_encodable(text))

    def warn_once(self, subject: str, text: str) -> None:
        """Print the first warning about a subject to stderr."""
        if self._shown and subject not in self._warned:
            self._warned.add(subject)
            with self._tolerant(), self._beside_the_bar():
                show(f"fastgpt: warning: {text}", file=sys.stderr)

    def close(self) -> None:
        """Close the bar."""
        with self._tolerant():
            if self._bar is not None:
                self._bar.close()

    def _beside_the_bar(self) -> contextlib.AbstractContextManager[None]:
        if self._bar is None or self._bar.disable:
            return contextlib.nullcontext()
        return tqdm.external_write_mode()

    @contextlib.contextmanager
    def _tolerant(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            if self._bar is not None:
                self._bar.disable = True
            give_up_broken_streams()
            if getattr(error, "errno", None) in _GONE:
                self._reader_gone()
            else:
                self.warn_once(
                    "output",
                    f"the output could not be written ({one_line(error)}); continuing without output",
                )


def one_line(error: BaseException) -> str:
    """Format an error on one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _occupy_standard_descriptors() -> None:
    """Open the null device on those of the descriptors 0 to 2 that are closed.

    Otherwise a file that is opened later would get the number, and what C libraries print to stderr.
    """
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)


def _encodable(text: str) -> str:
    """Escape the characters that stdout cannot encode, because a caller's stream may not do so."""
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def _null() -> TextIO:
    return open(os.devnull, "w", encoding="utf-8")


def _point_to_null(name: str, stream: TextIO) -> None:
    """Redirect the stream's descriptor to the null device, so that its buffered data go there at exit."""
    try:
        descriptor = stream.fileno()
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, descriptor)
        os.close(null)
        stream.flush()
    except (OSError, ValueError):
        setattr(sys, name, _null())
