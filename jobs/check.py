"""The command `csc check`: what a check found, for a person."""

from jobs.config import Config
from jobs.console import progress, say
from jobs.datasets import find_dataset
from pipeline.audit.check import check


def check_dataset(name: str | None, sample: int | None, config: Config) -> bool:
    """Check a dataset and print what is found; return whether all is as it should be.

    Raises:
        CscError: there is no such dataset, or it has no index that can be read.
    """
    found = find_dataset(name, config)
    say(f"  {found.folder.uri}")
    with progress("checked") as advance:
        report = check(
            found.folder,
            found.store,
            forgotten=found.forgotten,
            sample=sample,
            on_progress=advance,
        )
    for note in report.notes:
        say(f"  note: {note}")
    for finding in report.findings:
        say(f"  {finding}")
    about = f"{report.shards} shards, {report.episodes} episodes, {report.remade} shards made anew"
    count = len(report.findings)
    say(f"{about}: {f'{count} finding(s)' if count else 'all as it should be'}")
    return not count
