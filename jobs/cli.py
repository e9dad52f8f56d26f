"""The command `csc`. Heavy libraries are imported inside of commands: help must come at once."""

import json
import shlex
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.cli_arrays import beamform
from jobs.cli_cluster import jobs_app, submit
from jobs.cli_datasets import check, export, import_app, show
from jobs.cli_models import compare, lineage, models, promote, register
from jobs.cli_schedule import OVERLAP, ScheduleOption, schedule_app
from jobs.cli_status import status
from jobs.cli_store import forget, trials
from jobs.cli_tryouts import try_app
from jobs.cli_using import ModelOption, embed, enrol, extract, identify, onnx, separate
from jobs.console import LogFormat, as_json, complain, log_as, say
from jobs.options import (
    ConfigOption,
    FreshOption,
    SetOption,
    WorkspaceOption,
    configured,
    interruptible,
)
from pipeline.errors import CscError

if TYPE_CHECKING:
    from jobs.run import Run

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_show_locals=False,
    help="From recordings to a speaker encoder that holds up when people talk over each other.\n\n"
    "[bold]csc run[/bold] goes the whole way on the sample that is shipped: start there. Every "
    "stage is a command of its own, sees to the stages it needs, and goes on where it stopped.",
)


@app.callback()
def said_as(
    context: typer.Context,
    log: Annotated[
        LogFormat,
        typer.Option("--log", envvar="CSC_LOG", help="json: one object in a line, for log stores."),
    ] = LogFormat.TEXT,
) -> None:
    log_as(log, context.invoked_subcommand or "")


@contextmanager
def _run(
    source: str,
    overrides: list[str] | None,
    workspace: str | None,
    fresh: bool,
    refine: str | None = None,
    against: Sequence[str] = (),
    given: "tuple[Path, Path | None] | None" = None,
    schedule: str = "",
    if_new: bool = False,
) -> Iterator["Run"]:
    config = configured(source, overrides, workspace)
    from jobs.nightly import OverlapError, alone
    from jobs.run import Run, refined
    from pipeline.storage import Folder

    if refine is not None:
        config = refined(config, refine)
    guard = alone(Folder.at(config.workspace), schedule) if schedule else nullcontext()
    run = Run(config, fresh=fresh, against=against, given=given, if_new=if_new)
    try:
        with interruptible(), guard, run:
            yield run
    except OverlapError as error:
        complain(f"error: {error}")
        raise typer.Exit(OVERLAP) from None


def _arguments(source: str, overrides: list[str] | None, workspace: str | None) -> str:
    """Return the options of this call, for the commands that are suggested after it."""
    words = [] if source == "demo" else ["--config", source]
    words += [word for text in overrides or [] for word in ("--set", text)]
    words += [] if workspace is None else ["--workspace", workspace]
    return "".join(f" {shlex.quote(word)}" for word in words)


@app.command("run")
def run_all(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
    fresh: FreshOption = False,
    if_new: Annotated[
        bool,
        typer.Option(
            "--if-new",
            envvar="CSC_IF_NEW",
            help="End at once where the corpora and the settings are those that a registered "
            "version was made and judged by.",
        ),
    ] = False,
    schedule: ScheduleOption = "",
) -> None:
    """Go the whole way: ingest, build, train, evaluate, register, promote.

    What an earlier run finished is not done again.

    For a run every night, --if-new ends it where there is nothing to do. With train.init_from set
    to models:/NAME@champion it goes on from the champion, or from scratch while there is none; that
    the champion moved is no reason for another run. On one machine, a line of a crontab does it:

    0 3 * * * cd FOLDER && csc run --if-new --schedule nightly --config mine.toml

    On a cluster, csc schedule does.
    """
    if fresh and if_new:
        raise typer.BadParameter("--fresh does all again: leave one of the two out")
    with _run(config, set_, workspace, fresh, schedule=schedule, if_new=if_new) as run:
        if if_new and (made := run.nothing_new()):
            say(f"nothing new since version {made.number} was made: nothing was done")
            return
        run.promoted()
        from jobs.run_summary import summary

        summary(run, _arguments(config, set_, workspace))


def _stage_command(stage: str, about: str) -> None:
    def command(
        config: ConfigOption = "demo",
        set_: SetOption = None,
        workspace: WorkspaceOption = None,
        fresh: FreshOption = False,
        schedule: ScheduleOption = "",
    ) -> None:
        with _run(config, set_, workspace, fresh, schedule=schedule) as run:
            getattr(run, stage)

    app.command(stage, help=about)(command)


@app.command()
def ingest(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
    fresh: FreshOption = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be read, and read nothing.")
    ] = False,
    schedule: ScheduleOption = "",
) -> None:
    """Read the corpora into the utterance store; what is not kept has its reason listed.

    What an earlier ingest read and has not changed since is not read again.
    """
    if dry_run and fresh:
        raise typer.BadParameter("--fresh would read everything: leave one of the two out")
    with _run(config, set_, workspace, fresh, schedule=schedule) as run:
        from jobs.console import present
        from jobs.ingest_report import summary
        from jobs.run_summary import dry_run as say_what_would_be_done

        if dry_run:
            say_what_would_be_done(run)
        else:
            present(summary(run.ingest[1]))


app.command()(forget)
_stage_command(
    "build", "Mix utterances into shards of episodes: one speaker under interfering conditions."
)
app.command()(check)
app.command()(show)
app.add_typer(import_app, name="import")
app.command()(export)


app.add_typer(try_app, name="try")
app.add_typer(schedule_app, name="schedule")
for command in (embed, separate, extract, beamform, enrol, identify, onnx):
    app.command()(command)
app.command()(models)
app.command()(compare)
app.command()(lineage)
app.command()(status)
app.command()(submit)
app.add_typer(jobs_app, name="jobs")


@app.command()
def train(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
    fresh: FreshOption = False,
    refine: Annotated[
        str | None,
        typer.Option("--refine", help="MLflow run whose gradient norms give the schedule."),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="Train on this one: id of a dataset of the workspace or its beginning, or its "
            "address. Without it, on the one that csc build makes of the configuration.",
        ),
    ] = None,
    valid_dataset: Annotated[
        str | None,
        typer.Option(
            "--valid-dataset",
            help="Take valid mixtures from this one, where --dataset has none.",
        ),
    ] = None,
    schedule: ScheduleOption = "",
) -> None:
    """Train the CSC model; checkpoints let a stopped run go on.

    With --refine, the learning rate follows what the gradients of an earlier run speak for, with a
    warm-up and a decay of its own.

    A dataset that csc import made has train mixtures or valid ones, and no recordings to verify
    anybody by: two are needed, and what separates best is kept. --set train.remix=false takes its
    mixtures as they are; else each epoch draws other levels. On a cluster: csc submit train --set
    train.dataset=ID --set train.valid_dataset=ID.

    [bold]csc train --dataset 3f2a --valid-dataset 77c1 --set train.remix=false[/bold]
    """
    names = {"dataset": dataset, "valid_dataset": valid_dataset}
    extra = [f"train.{key}={json.dumps(name)}" for key, name in names.items() if name is not None]
    with _run(config, [*(set_ or []), *extra], workspace, fresh, refine, schedule=schedule) as run:
        _ = run.train


@app.command()
def evaluate(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
    fresh: FreshOption = False,
    against: Annotated[
        list[str] | None,
        typer.Option("--against", help="A registered version, as 3 or champion. May be repeated."),
    ] = None,
    trials: Annotated[
        Path | None,
        typer.Option(
            "--trials",
            help="A table of csc trials; or, with --audio, `label enrolment test` lines.",
        ),
    ] = None,
    audio: Annotated[
        Path | None,
        typer.Option("--audio", help="Folder of the files that a list in --trials names."),
    ] = None,
    schedule: ScheduleOption = "",
) -> None:
    """Measure error rates on unseen speakers by what lies over their voices.

    Beside plain references, and beside registered versions that are named. What was embedded
    before is not embedded again. A table of csc trials stands in for the trials of the test split.
    So does, with --audio, a list in VoxCeleb's format: speakers are the first folders of its paths,
    where its trials agree, and interferers are drawn from the list.
    """
    if audio is not None and trials is None:
        raise typer.BadParameter("--audio is of a list of files: give it with --trials")
    given = None if trials is None else (trials, audio)
    with _run(
        config, set_, workspace, fresh, against=against or (), given=given, schedule=schedule
    ) as run:
        from jobs.console import present
        from jobs.extraction_report import tables

        present(tables(run.evaluate.about))


app.command()(trials)
app.command()(register)
app.command()(promote)


@app.command()
def verify(
    enrolment: Annotated[str, typer.Argument(help="A clean recording of one speaker.")],
    test: Annotated[str, typer.Argument(help="A recording, with other voices in it or not.")],
    model: ModelOption = None,
    prior: Annotated[
        float,
        typer.Option(min=0.001, max=0.999, help="How probable one speaker is before listening."),
    ] = 0.5,
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Say whether the speaker of one file is heard in another (any format soundfile reads).

    The probability comes from scores that were calibrated on the validation trials of the model.
    """
    from jobs.verify import verify as verify_files

    verify_files(enrolment, test, model, prior, configured(config, set_, workspace))


@app.command("config")
def show_config(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Print the configuration with all its defaults, as JSON."""
    indent = None if as_json() else 2
    typer.echo(configured(config, set_, workspace).model_dump_json(indent=indent))


def main() -> None:
    """Run the command line; errors that a user can mend are one message, not a trace."""
    try:
        app()
    except CscError as error:
        complain(f"error: {error}")
        sys.exit(1)
    except OSError as error:
        complain(f"error: {error}; check free space, also in the temporary folder")
        sys.exit(1)
    except Exception as error:
        if not as_json():
            raise
        complain(repr(error), trace=traceback.format_exc())
        sys.exit(1)
