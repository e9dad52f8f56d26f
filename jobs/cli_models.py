"""Commands about the registry: what is there, how two versions compare, where one comes from."""

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
