"""Commands about recurring jobs: make one, list them, suspend and resume them, remove them."""

from enum import StrEnum
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from jobs.options import ConfigOption, SetOption, WorkspaceOption, configured

OVERLAP = 4  # exit code where another run of the schedule is at work

ScheduleOption = Annotated[
    str,
    typer.Option(
        "--schedule",
        metavar="NAME",
        envvar="CSC_SCHEDULE",
        help="Say what recurring job this is a run of: where another run of it is at work in the "
        "workspace, this one ends with exit code 4; one that was killed it waits for, up to five "
        "minutes, until that counts as lost.",
    ),
]
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Of the schedule.")]
NamespaceOption = Annotated[
    str, typer.Option("--namespace", "-n", help="Of Kubernetes; without it, that of your context.")
]


class Kind(StrEnum):
    """What starts the runs."""

    CRONJOB = "cronjob"
    RAYCRONJOB = "raycronjob"


class Stage(StrEnum):
    """What can recur: a command of `csc`."""

    RUN = "run"
    INGEST = "ingest"
    BUILD = "build"
    TRAIN = "train"
    EVALUATE = "evaluate"


class _AddByDefault(TyperGroup):
    """Takes a first word that is no command for the name of a schedule to add."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and not args[0].startswith("-"):
            args = ["add", *args]
        return super().parse_args(ctx, args)


schedule_app = typer.Typer(
    cls=_AddByDefault,
    no_args_is_help=True,
    subcommand_metavar='NAME --cron "0 3 * * *" STAGE | COMMAND',
    help="Run a command again and again on a cluster: recurring jobs in Kubernetes.\n\n"
    '[bold]csc schedule nightly --cron "0 3 * * *" run --config mine.toml[/bold] is short for '
    "csc schedule add. Without Kubernetes, a crontab does the same: see csc run --help.",
)


@schedule_app.command()
def add(
    name: NameArgument,
    stage: Annotated[Stage, typer.Argument(help="The command to run.")],
    cron: Annotated[
        str,
        typer.Option(
            "--cron",
            help='Minute, hour, day of the month, month, day of the week: "30 2 * * mon-fri".',
        ),
    ],
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
    time_zone: Annotated[
        str, typer.Option("--time-zone", help="That the times are meant in, as Europe/Berlin.")
    ] = "Etc/UTC",
    kind: Annotated[
        Kind,
        typer.Option(
            help="cronjob: submits to a cluster that stands. raycronjob: a cluster of its own for "
            "each run (KubeRay 1.7 or later, with its feature gate RayCronJob on)."
        ),
    ] = Kind.CRONJOB,
    cluster: Annotated[
        str, typer.Option("--cluster", help="Job server of the cluster, as pods reach it.")
    ] = "http://csc-head-svc:8265",
    image: Annotated[
        str,
        typer.Option(
            "--image",
            envvar="CSC_IMAGE",
            help="For all pods, with CUDA where a raycronjob has GPUs; without it, csc-cpu, and "
            "csc-cuda for pods with GPUs.",
        ),
    ] = "",
    cpus: Annotated[
        float, typer.Option("--cpus", min=1, help="Of each pod of a raycronjob.")
    ] = 4.0,
    memory: Annotated[
        str, typer.Option("--memory", help="Of each pod of a raycronjob, as 16Gi.")
    ] = "16Gi",
    deadline_hours: Annotated[
        float,
        typer.Option(
            "--deadline-hours",
            min=0.01,
            help="After which a raycronjob ends its run, and a cronjob waits no longer for it.",
        ),
    ] = 24.0,
    retries: Annotated[
        int,
        typer.Option(
            "--retries",
            min=0,
            help="Of a cronjob's run that failed, not of one that was stopped: each goes on from "
            "there. A raycronjob leaves that to its next run.",
        ),
    ] = 3,
    token_secret: Annotated[
        str, typer.Option("--token-secret", help="Secret whose auth_token opens the cluster.")
    ] = "csc-ray-token",
    env_secret: Annotated[
        str,
        typer.Option(
            "--env-secret",
            help="Secret with variables for the pods of a raycronjob, such as "
            "MLFLOW_TRACKING_PASSWORD; it need not be there.",
        ),
    ] = "csc-env",
    namespace: NamespaceOption = "",
    render: Annotated[
        bool, typer.Option("--render", help="Print the objects as YAML, and apply nothing.")
    ] = False,
) -> None:
    """Make a recurring job, or change one (a suspended one stays so).

    The configuration is checked here and kept in a ConfigMap; it must hold no password. The
    recurring [bold]run[/bold] is csc run --if-new: it ends at once where nothing is new. Runs of
    one schedule do not overlap.
    """
    resolved = configured(config, set_, workspace)
    from jobs.console import say
    from jobs.kubectl import Kubectl, as_yaml
    from jobs.recurring import Schedule, objects

    schedule = Schedule(
        name=name,
        cron=cron,
        stage=stage.value,
        kind=kind.value,
        cluster=cluster,
        time_zone=time_zone,
        namespace=namespace,
        image=image,
        token_secret=token_secret,
        env_secret=env_secret,
        deadline_hours=deadline_hours,
        retries=retries,
        cpus=cpus,
        memory=memory,
    )
    manifests = objects(schedule, resolved)
    if render:
        typer.echo(as_yaml(manifests), nl=False)
        return
    say(Kubectl(namespace).apply(manifests).rstrip())


@schedule_app.command("list")
def list_schedules(namespace: NamespaceOption = "") -> None:
    """List the recurring jobs: when they run, what, and when they last did."""
    from rich.table import Table

    from jobs.console import show
    from jobs.kubectl import Kubectl

    table = Table("name", "cron", "time zone", "runs", "by", "last run", "last success", "state")
    for one in Kubectl(namespace).schedules():
        times = (one.cron, one.time_zone)
        state = "suspended" if one.suspended else "active"
        last = (one.last_run, one.last_success)
        table.add_row(one.name, *times, f"csc {one.stage}", one.kind, *last, state)
    show(table)


@schedule_app.command()
def suspend(name: NameArgument, namespace: NamespaceOption = "") -> None:
    """Have a recurring job start no more runs; one that is under way goes on."""
    from jobs.console import say
    from jobs.kubectl import Kubectl

    Kubectl(namespace).suspend(name, suspended=True)
    say(f"{name}: suspended; csc schedule resume {name} has it go on")


@schedule_app.command()
def resume(name: NameArgument, namespace: NamespaceOption = "") -> None:
    """Have a suspended recurring job start runs again."""
    from jobs.console import say
    from jobs.kubectl import Kubectl

    Kubectl(namespace).suspend(name, suspended=False)
    say(f"{name}: resumed")


@schedule_app.command()
def remove(name: NameArgument, namespace: NamespaceOption = "") -> None:
    """Remove a recurring job; a run that a CronJob submitted goes on (csc jobs)."""
    from jobs.console import say
    from jobs.kubectl import Kubectl

    Kubectl(namespace).remove(name)
    say(f"{name}: removed")
