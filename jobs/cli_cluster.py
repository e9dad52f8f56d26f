"""Commands about a Ray cluster: have a stage run there, and see what became of it."""

import sys
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from jobs.options import (
    ConfigOption,
    SetOption,
    WorkspaceOption,
    configured,
    interruptible,
)
from pipeline.errors import CscError

if TYPE_CHECKING:
    from rich.table import Table

    from jobs.jobserver import Job, JobServer

ClusterOption = Annotated[
    str | None,
    typer.Option(
        "--cluster",
        metavar="URL",
        help="Job server of the cluster; without it, what RAY_API_SERVER_ADDRESS says, or "
        "RAY_ADDRESS where it begins with http, or http://127.0.0.1:8265.",
    ),
]
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="As csc jobs shows it.")]

jobs_app = typer.Typer(help="What csc submitted to a cluster: list it, read its log, stop it.")


class Stage(StrEnum):
    """What can be submitted: a command of `csc`."""

    RUN = "run"
    INGEST = "ingest"
    BUILD = "build"
    TRAIN = "train"
    EVALUATE = "evaluate"
    REGISTER = "register"
    PROMOTE = "promote"


def submit(
    stage: Annotated[Stage, typer.Argument(help="The command to run there.")],
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
    cluster: ClusterOption = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME",
            help="Variable to pass on, as AWS_ENDPOINT_URL; no secrets. May be repeated.",
        ),
    ] = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Print the job's id, and do not wait for its end.")
    ] = False,
    again: Annotated[
        bool, typer.Option("--again", help="Submit also what is under way already.")
    ] = False,
    attach: Annotated[
        bool, typer.Option("--attach", help="Follow what is under way already; else submit it.")
    ] = False,
) -> None:
    """Run a stage on a Ray cluster, from the same configuration as here.

    The configuration is checked here, and goes there with this very code; the cluster has the
    libraries. Workspace and corpora are to be where every node finds them, as in s3://, and
    credentials are the nodes' own. Shows the job's log and ends as the job does, with exit
    code 130 where somebody stopped it; Ctrl-C leaves the job running. A cluster that asks for a
    token has it from the file RAY_AUTH_TOKEN_PATH.
    """
    if again and attach:
        raise typer.BadParameter("--again submits what --attach would follow: leave one out")
    resolved = configured(config, set_, workspace)
    from jobs.console import say
    from jobs.jobserver import JobServer, server_url
    from jobs.submission import for_cluster, is_local, passed_on, under_way
    from jobs.submission import submit as submit_job

    wanted, variables = for_cluster(stage, resolved), passed_on(env or [])
    server = JobServer(server_url(cluster))
    job = None if again else under_way(server, stage, wanted)
    if job is not None and attach:
        job_id = job.id
        say(f"{job_id}: under way, submitted by {job.by}: nothing new is submitted")
    else:
        _check_new(server, job)
        if is_local(wanted.workspace):
            say(f"workspace {wanted.workspace}: every node of the cluster has to see this folder")
        job_id = submit_job(server, stage, wanted, variables, _warn)
        say(f"{job_id}: submitted to {server.url}")
    if detach:
        say(_hints(server, job_id))
    else:
        _follow(server, job_id)


def _check_new(server: "JobServer", job: "Job | None") -> None:
    """Ask whether to submit what is under way; where nobody can be asked, refuse."""
    if job is None:
        return
    same = f"{job.id}, submitted by {job.by}, has the same configuration and is {job.state}"
    if not sys.stdin.isatty():
        raise CscError(
            f"{same}; --attach follows it, --again submits it all the same\n"
            f"{_hints(server, job.id)}"
        )
    typer.confirm(f"{same}. Submit it again?", abort=True)


def _hints(server: "JobServer", job_id: str) -> str:
    from jobs.jobserver import DEFAULT_URL

    where = "" if server.url == DEFAULT_URL else f" --cluster {server.url}"
    return f"follow it: csc jobs logs -f {job_id}{where}\nstop it: csc jobs stop {job_id}{where}"


def _follow(server: "JobServer", job_id: str) -> None:
    """Show a job's log, and end as the job does."""
    from jobs.following import follow
    from jobs.jobserver import GO_ON

    with interruptible(f"detached: the job goes on\n{_hints(server, job_id)}"):
        job = follow(server, job_id, lambda text: typer.echo(text, nl=False), _warn)
    if job.state == "FAILED" and job.command_exit_code is None:
        _warn(job.message)  # of what came before the command, its log does not tell
    if job.lost:
        _warn(f"the process that watched it ended, with its node or for want of memory: {GO_ON}")
    _warn(f"{job.id}: {job.state} ({_took(job)})")
    raise typer.Exit(job.exit_code)


def _warn(text: str) -> None:
    typer.echo(text, err=True)


@jobs_app.callback(invoke_without_command=True)
def list_jobs(context: typer.Context, cluster: ClusterOption = None) -> None:
    """List what csc submitted to a cluster, the newest first."""
    if context.invoked_subcommand is not None:
        context.default_map = {name: {"cluster": cluster} for name in ("logs", "stop")}
        return
    from jobs.console import say, show

    server = _server(cluster)
    jobs = server.jobs()
    if jobs:
        show(_table(jobs))
    else:
        say(f"csc has submitted nothing to {server.url} yet")


@jobs_app.command()
def logs(
    job_id: IdArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Wait for more, and end as the job does.")
    ] = False,
    cluster: ClusterOption = None,
) -> None:
    """Print what a job has said."""
    server = _server(cluster)
    if follow:
        _follow(server, server.job(job_id).id)
    else:
        typer.echo(server.log(job_id), nl=False)


@jobs_app.command()
def stop(job_id: IdArgument, cluster: ClusterOption = None) -> None:
    """Stop a job, as Ctrl-C would: the same submission goes on from there."""
    from jobs.console import say

    server = _server(cluster)
    if not server.job(job_id).under_way:
        say(f"{job_id}: ended before")
    with interruptible("it was told to stop; csc jobs shows whether it has"):
        job = server.stop(job_id)
    say(f"{job.id}: {job.state} ({_took(job)})")


def _server(cluster: str | None) -> "JobServer":
    from jobs.jobserver import JobServer, server_url

    return JobServer(server_url(cluster))


def _table(jobs: "list[Job]") -> "Table":
    from rich.markup import escape
    from rich.table import Table

    table = Table()
    table.add_column("id", no_wrap=True)
    for name in ("stage", "state", "began", "took", "configuration"):
        table.add_column(name)
    table.add_column("workspace", overflow="fold")
    for job in jobs:
        began = "" if job.began is None else f"{job.began.astimezone():%Y-%m-%d %H:%M}"
        table.add_row(
            job.id, job.stage, job.state, began, _took(job), job.config, escape(job.workspace)
        )
    return table


def _took(job: "Job") -> str:
    """Return hours, minutes and seconds from a job's beginning to its end, or until now."""
    if job.began is None:
        return ""
    seconds = ((job.ended or datetime.now(UTC)) - job.began).total_seconds()
    return str(timedelta(seconds=max(0, round(seconds))))
