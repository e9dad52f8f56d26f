"""What a person sees: live progress on a terminal, plain lines anywhere else; or lines of JSON.

As JSON, every line on stdout is an object with `time`, `level`, `stage`, `run` and `message`;
progress has `done` and `total` as well, and a table its `rows`.
"""

import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, NamedTuple, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0

# Where there is no terminal, lines and tables are as wide as they need to be.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)

Advance = Callable[..., None]
"""Called with (done, total, note="")."""


class LogFormat(StrEnum):
    """How the command line says what it has to say."""

    TEXT = "text"
    JSON = "json"


class _Work(NamedTuple):
    """What is at hand: every line of JSON tells it."""

    stage: str = ""
    run: str = ""  # the id of what is made
    on_progress: Callable[[int, int], None] | None = None


_format, _work = LogFormat.TEXT, _Work()


def log_as(log_format: LogFormat, command: str) -> None:
    """Say everything in this format from now on; outside of stages, the stage is the command."""
    global _format, _work
    _format, _work = log_format, _Work(command)


def as_json() -> bool:
    return _format is LogFormat.JSON


@contextmanager
def working(
    stage: str, run: str = "", on_progress: Callable[[int, int], None] | None = None
) -> Iterator[None]:
    """Have all that is said meanwhile, from any thread, belong to a stage and the id it makes.

    `on_progress` is called with (done, total) of whatever shows progress.
    """
    global _work
    before = _work
    _work = _Work(stage, run, on_progress)
    try:
        yield
    finally:
        _work = before


def say(text: str) -> None:
    """Print a line; square brackets are text, not markup."""
    if not as_json():
        console.print(text, markup=False)
    elif text.strip():
        _write(sys.stdout, "info", text.strip())


def show(table: Table) -> None:
    if as_json():
        _write(sys.stdout, "info", _plain(table.title or ""), rows=_rows(table))
    else:
        console.print(table)


def present(parts: Iterable[Table | str]) -> None:
    """Print lines and tables with room between them."""
    for part in parts:
        say("")
        say(part) if isinstance(part, str) else show(part)


def heading(stage: str, about: str) -> None:
    """Announce a stage."""
    if as_json():
        say(f"{stage}: {about or 'begins'}")
    else:
        console.print(f"[bold]{stage}[/bold]  {about}".rstrip())


def complain(text: str, **more: Any) -> None:
    """Print what went wrong on stderr; further fields are for JSON alone."""
    if as_json():
        _write(sys.stderr, "error", text.removeprefix("error: "), **more)
    else:
        print(text, file=sys.stderr, flush=True)


def _write(stream: TextIO, level: str, message: str, **more: Any) -> None:
    line = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "level": level,
        "stage": _work.stage,
        "run": _work.run,
        "message": message,
        **more,
    }
    stream.write(json.dumps(line) + "\n")  # in one piece, whatever the thread
    stream.flush()


def _rows(table: Table) -> list[dict[str, str]]:
    """Return the cells of each row by the headings of their columns."""
    headings = [_plain(column.header) for column in table.columns]
    columns = [[_plain(cell) for cell in column.cells] for column in table.columns]
    return [dict(zip(headings, row, strict=True)) for row in zip(*columns, strict=True)]


def _plain(cell: Any) -> str:
    return (cell if isinstance(cell, Text) else Text.from_markup(str(cell))).plain


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Give a callback `(done, total, note="")` that shows how far a stage is."""
    shown = _bar if console.is_terminal and not as_json() else _lines
    with shown(what) as show_it:

        def advance(done: int, total: int, note: str = "") -> None:
            if _work.on_progress is not None:
                _work.on_progress(done, total)
            show_it(done, total, note)

        yield advance


@contextmanager
def _bar(what: str) -> Iterator[Callable[..., None]]:
    columns = (
        TextColumn("  {task.description}"),
        BarColumn(bar_width=8),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=console, transient=True) as bars:
        task = bars.add_task(what, total=None, note="")

        def advance(done: int, total: int, note: str = "") -> None:
            bars.update(task, completed=done, total=total, note=note)

        yield advance


@contextmanager
def _lines(what: str) -> Iterator[Callable[..., None]]:
    last = time.monotonic()
    first: tuple[float, int] | None = None  # a resumed stage begins somewhere in the middle

    def advance(done: int, total: int, note: str = "") -> None:
        nonlocal first, last
        now = time.monotonic()
        first = first or (now, done)
        if done < total and now - last < SECONDS_BETWEEN_LINES:
            return
        last, left = now, ""
        if first[1] < done < total:
            pace_s = (now - first[0]) / (done - first[1])
            left = f"about {pace_s * (total - done):.0f} s left"
        if as_json():
            message = "  ".join(part for part in (what, note, left) if part)
            _write(sys.stdout, "info", message, done=done, total=total)
            return
        say("  ".join(part for part in (f"  {what} {done}/{total}", note, left) if part))
        sys.stdout.flush()

    yield advance
