"""What commands have in common: their options, and how Ctrl-C ends them."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.console import complain

if TYPE_CHECKING:
    from jobs.config import Config

ConfigOption = Annotated[
    str,
    typer.Option("--config", "-c", help="A .toml or .json file, or the name of an embedded one."),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="Override a key: --set train.lr=1e-3. May be repeated."),
]
WorkspaceOption = Annotated[
    str | None, typer.Option("--workspace", "-w", help="Folder or s3:// address for all results.")
]
FreshOption = Annotated[
    bool,
    typer.Option(
        "--fresh", help="Do these stages again from the start; of ingest, all generations."
    ),
]


def configured(source: str, overrides: list[str] | None, workspace: str | None) -> "Config":
    """Return the configuration of a call."""
    from jobs.config import load_config

    extra = [] if workspace is None else [f"workspace={json.dumps(workspace)}"]
    return load_config(source, [*(overrides or []), *extra])


@contextmanager
def interruptible(said: str = "stopped; the same command goes on from here") -> Iterator[None]:
    """Have Ctrl-C end a command with a line, not a trace."""
    try:
        yield
    except KeyboardInterrupt:
        complain(said)
        raise typer.Exit(130) from None
