"""Commands about the registry: registration, promotion, and what is known of versions."""

from typing import Annotated

import typer

from jobs.options import (
    ConfigOption,
    SetOption,
    WorkspaceOption,
    configured,
    interruptible,
)

VersionArgument = Annotated[
    str, typer.Argument(help="A version, as 3 or v3, an alias, or a models:/ address.")
]


def models(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """List the registered versions: error rates, aliases, who is champion since when and why."""
    from jobs.console import present
    from jobs.models import champion_line, versions_table
    from jobs.workspace import registry_of

    resolved = configured(config, set_, workspace)
    registry = registry_of(resolved)
    present([versions_table(registry, resolved.promote.guarded), champion_line(registry)])


def compare(
    first: VersionArgument,
    second: VersionArgument,
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Compare two versions on the first one's trials: paired differences with intervals."""
    from jobs.console import show
    from jobs.models import comparison_table
    from jobs.run import Run

    with interruptible(), Run(configured(config, set_, workspace)) as run:
        show(comparison_table(run.registry, (first, second), run.evaluator))


def lineage(
    version: VersionArgument = "champion",
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Print where a version comes from: run, dataset, store, corpora with their licences."""
    from jobs.console import say
    from jobs.lineage import lines
    from jobs.workspace import registry_of

    registry = registry_of(configured(config, set_, workspace))
    for line in lines(registry, registry.version(version)):
        say(line)


def register(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
) -> None:
    """Register the evaluated model in MLflow as the challenger."""
    from jobs.run import Run

    with interruptible(), Run(configured(config, set_, workspace)) as run:
        _ = run.register


def promote(
    config: ConfigOption = "demo",
    set_: SetOption = None,
    workspace: WorkspaceOption = None,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Make the champion before this one champion again.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the gate says, and change nothing.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Promote also what the gate refuses; say --why.")
    ] = False,
    why: Annotated[str, typer.Option("--why", help="Reason that is kept with the version.")] = "",
) -> None:
    """Make the challenger champion if it is not worse; exit code 3 if it is refused.

    Challenger and champion are compared on the same trials, paired, with a bootstrap over speakers,
    on the conditions of promote.guarded. The decision is kept with the version, also a refusal.
    """
    if (force or rollback) and not why:
        raise typer.BadParameter("give a reason with --why")
    if rollback and (force or dry_run):
        raise typer.BadParameter("--rollback goes with --why only")
    from jobs.run import Run

    with interruptible(), Run(configured(config, set_, workspace)) as run:
        if rollback:
            run.rollback(why)
        elif not run.promoted(forced=why if force else "", dry_run=dry_run).promoted:
            raise typer.Exit(3)
