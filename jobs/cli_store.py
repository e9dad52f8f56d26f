"""Commands about who is in the utterance store: who is to be forgotten, who is compared."""

from pathlib import Path
from typing import Annotated

import typer

from jobs.options import (
    ConfigOption,
    SetOption,
    WorkspaceOption,
    configured,
    interruptible,
)


def forget(
    speaker: Annotated[
        list[str] | None, typer.Option("--speaker", help="CORPUS/SPEAKER. May be repeated.")
    ] = None,
    recording: Annotated[
        list[str] | None, typer.Option("--recording", help="CORPUS/PATH. May be repeated.")
    ] = None,
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Take a speaker or a recording out of the utterance store, for ever.

    The shards it lies in are written anew without it, and no later ingest reads it again.
    """
    if not speaker and not recording:
        raise typer.BadParameter("name at least one --speaker or --recording")
    from jobs.forgetting import forget as forget_names
    from jobs.run import Run

    with interruptible(), Run(configured(config, set_, workspace)) as run:
        forget_names(run, speaker or [], recording or [])


def trials(
    out: Annotated[Path, typer.Option("--out", "-o", help="Tab-separated file to write.")],
    split: Annotated[str, typer.Option("--split", help="test or valid.")] = "test",
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Write the trials of a split: who is compared with whom, and what lies over the test.

    By utterance ids of the store, a row for each trial under each condition of evaluate.trials.
    """
    from jobs.console import say
    from jobs.run import Run
    from pipeline.shards import read_catalogue
    from pipeline.storage import Folder
    from pipeline.trial_tables import table
    from pipeline.trials import make_trials

    with interruptible(), Run(configured(config, set_, workspace)) as run:
        settings = run.config.evaluate.trials
        made = make_trials(read_catalogue(run.ingest[0]), split, settings, run.config.seed)
        Folder.at(out.parent).put(out.name, table(made).encode())
        say(f"{out}: {len(made.target)} trials under {len(made.conditions)} conditions")
        for name, why in made.skipped.items():
            say(f"left out: {name}, as {why}")
