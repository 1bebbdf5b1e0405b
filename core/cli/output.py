"""What commands print: safe for any terminal, file or pipe. Standard output is the command's, not its plugins'."""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from functools import wraps
from typing import Any, TextIO

import click

from ..errors import visible
from ..files import naming

STREAMS = ("stdout", "stderr")
_answers: list[TextIO] = []  # standard output, while a command runs


def prepare() -> None:
    """Let standard output and error take every text: a closed one swallows it, others escape what they can't encode."""
    for name in STREAMS:
        stream = getattr(sys, name)
        if stream is None:  # closed by the caller; without this, the next file would get its number
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def flush() -> None:
    """Write what is left for standard output and error; one that fails gets nothing more, or Python ends with 120."""
    for name in STREAMS:
        stream = getattr(sys, name)
        try:
            stream.flush()
        except OSError:
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, stream.fileno())
            os.close(nothing)


def answering(command: click.Command) -> click.Command:
    """A command during which standard output takes its answer alone; what plugins print goes to standard error."""
    inner: Callable[..., Any] = command.callback  # type: ignore[assignment]

    @wraps(inner)
    def callback(*args: Any, **kwargs: Any) -> Any:
        _answers.append(sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                return inner(*args, **kwargs)
        finally:
            _answers.pop()

    command.callback = callback
    return command


@contextmanager
def standard_output() -> Iterator[TextIO]:
    """Standard output for a command's answer. An OSError in the body names it."""
    with naming("standard output"):
        stream = _answers[-1] if _answers else sys.stdout
        yield stream
        stream.flush()


def echo(text: str = "", err: bool = False, nl: bool = True) -> None:
    """Print lines on standard output, or on standard error. Control characters in them are shown, not sent.

    A message on a terminal is folded at words; in a file it stays one line, for grep.
    """
    shown = re.sub(r"[^\n\t -~]+", lambda found: visible(found[0]), text)
    if err:
        if sys.stderr.isatty():
            width = shutil.get_terminal_size().columns
            shown = "\n".join(piece for line in shown.split("\n") for piece in folded(line, width))
        with suppress(OSError):  # a message that can't be shown changes nothing else
            click.echo(shown, file=sys.stderr, nl=nl)
    else:
        with standard_output() as stream:
            click.echo(shown, file=stream, nl=nl)


def folded(line: str, width: int) -> list[str]:
    """A line in lines of at most `width` columns, the later ones indented; a longer word, as a path, stays whole."""
    indent = " " * (len(line) - len(line.lstrip()))
    lines, inner = [""], indent + ("  " if len(line) > width else "")
    for word in line.split():
        tried = f"{lines[-1]} {word}" if lines[-1].strip() else (lines[-1] or indent) + word
        if len(tried) > width and lines[-1].strip():
            lines.append(inner + word)
        else:
            lines[-1] = tried
    return lines


def echo_json(value: Any, indent: int | None = None) -> None:
    """Print JSON on standard output: as it is read by people, but for what a terminal would obey or can't show."""
    with standard_output() as stream:
        unicode = (getattr(stream, "encoding", None) or "utf-8").lower().startswith("utf")
        text = json.dumps(value, indent=indent, allow_nan=False, ensure_ascii=not unicode)
        click.echo(re.sub(r"[^\n -~]", _escaped, text), file=stream)


def _escaped(found: re.Match[str]) -> str:
    return found[0] if found[0].isprintable() else json.dumps(found[0])[1:-1]
