"""The command that looks at a workspace without touching it."""

import os
from typing import Annotated

import typer

from jobs.options import ConfigOption, SetOption, WorkspaceOption, configured

# A server that is down is to be told of soon: MLflow would ask it again for minutes.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


def status(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print all of it as one JSON document.")
    ] = False,
) -> None:
    """Say what a workspace holds, who is at work there, how far this configuration is, and costs.

    Reads only, also while a run is at work. Work that was killed counts as lost five minutes after
    its last sign of life; the command that did it goes on from where it was. Costs are the cores
    and GPUs that a stage could use, all of Ray's where it used Ray, times how long it had them.
    """
    for name, value in PATIENCE.items():
        os.environ.setdefault(name, value)
    from jobs import console
    from jobs.status import status as look
    from jobs.status import tables

    found = look(configured(config, set_, workspace))
    if as_json:
        typer.echo(found.model_dump_json(indent=None if console.as_json() else 2))
    else:
        console.present(tables(found))
