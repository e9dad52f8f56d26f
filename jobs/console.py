"""What a person sees: live progress on a terminal, plain lines anywhere else."""

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

SECONDS_BETWEEN_LINES = 10.0

# Where there is no terminal, lines and tables are as wide as they need to be.
console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)

Advance = Callable[..., None]
"""Called with (done, total, note="")."""


def say(text: str) -> None:
    """Print a line; square brackets are text, not markup."""
    console.print(text, markup=False)


def show(table: Table) -> None:
    console.print(table)


def present(parts: Iterable[Table | str]) -> None:
    """Print lines and tables with room between them."""
    for part in parts:
        say("")
        say(part) if isinstance(part, str) else show(part)


def heading(stage: str, about: str) -> None:
    """Announce a stage."""
    console.print(f"[bold]{stage}[/bold]  {about}".rstrip())


@contextmanager
def progress(what: str) -> Iterator[Callable[..., None]]:
    """Give a callback `(done, total, note="")` that shows how far a stage is."""
    yield from (_bar(what) if console.is_terminal else _lines(what))


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
        say("  ".join(part for part in (f"  {what} {done}/{total}", note, left) if part))
        sys.stdout.flush()

    yield advance
