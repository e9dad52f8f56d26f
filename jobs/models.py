"""Tables of the registry: its versions, and two of them side by side."""

from collections.abc import Iterator, Sequence

from rich.table import Table
from rich.text import Text

from csc_model.metrics import eer
from jobs.evaluate import CSC_NAME, Evaluator
from jobs.promote import (
    BACK_WHEN,
    BACK_WHY,
    DECIDED,
    DECISION,
    FROM,
    WHEN,
    WHO,
    WHY,
    differences,
    scores_of,
)
from jobs.registry import CHAMPION, FORGOTTEN, TRIALS, Registry, Version
from jobs.report import percent
from pipeline.errors import CscError

EER = "eer."


def versions_table(registry: Registry, conditions: Sequence[str]) -> Table:
    """Return all versions with their aliases and error rates, the newest first.

    Raises:
        CscError: there are none.
    """
    versions = registry.versions()
    if not versions:
        raise CscError(f"{registry.model} has no version yet: csc run, or csc register, makes one")
    table = Table(title=f"{registry.model}: EER % [95 % interval]", title_justify="left")
    for heading in ("version", "alias", "trials", *conditions, "what became of it"):
        table.add_column(heading)
    for version in sorted(versions, key=lambda one: int(one.number), reverse=True):
        table.add_row(
            version.number,
            ", ".join(registry.aliases_of(version)),
            version.tags.get(TRIALS, "")[:8],
            *(_rate(version.tags.get(f"{EER}{name}", "")) for name in conditions),
            Text("\n".join(_history(version))),  # what people wrote, not markup
        )
    return table


def _rate(tag: str) -> str:
    """Write the tag of an error rate in per cent."""
    numbers = tag.replace("[", "").replace("]", "").replace(",", "").split()
    if len(numbers) != 3:
        return ""
    value, low, high = (100 * float(number) for number in numbers)
    return f"{value:.1f} [{low:.1f}, {high:.1f}]"


def _history(version: Version) -> Iterator[str]:
    tags = version.tags
    if tags.get(WHEN):
        yield f"promoted {tags[WHEN][:16]} by {tags.get(WHO, '?')}: {tags.get(WHY, '')}"
    if tags.get(DECIDED):
        yield f"refused {tags[DECIDED][:16]}: {tags.get(DECISION, '')}"
    if tags.get(BACK_WHEN):
        yield f"rolled back {tags[BACK_WHEN][:16]}: {tags.get(BACK_WHY, '')}"
    if tags.get(FORGOTTEN):
        yield f"knows forgotten speakers: {tags[FORGOTTEN]}"


def champion_line(registry: Registry) -> str:
    """Say who is champion, since when and why."""
    champion = registry.by_alias(CHAMPION)
    if champion is None:
        return "no champion yet: csc promote makes one"
    tags = champion.tags
    return (
        f"champion: version {champion.number} since {tags.get(WHEN) or '?'}, after version "
        f"{tags.get(FROM, '?')}; {tags.get(WHY, '')}"
    )


def comparison_table(registry: Registry, names: tuple[str, str], evaluator: Evaluator) -> Table:
    """Return the error rates of two versions on the first one's trials, and their differences."""
    first, second = (registry.version(name) for name in names)
    trials = first.tags.get(TRIALS, "")
    ours, theirs = (scores_of(registry, version, trials, evaluator) for version in (first, second))
    prefix = f"{CSC_NAME}."
    conditions = [
        name.removeprefix(prefix) for name in ours.column_names if name.startswith(prefix)
    ]
    gaps = differences(ours, theirs, conditions, evaluator.config)
    table = Table(
        title=f"EER % on trials {trials[:8]}, difference [95 % interval over speakers]",
        title_justify="left",
    )
    heads = (f"version {first.number}", f"version {second.number}", "difference", "verdict")
    for heading in ("condition", *heads):
        table.add_column(heading)
    for name, gap in gaps.items():
        rates = [
            eer(scores[f"{prefix}{name}"].to_numpy(), scores["target"].to_numpy())
            for scores in (ours, theirs)
        ]
        verdict = "better" if gap.high < 0 else "worse" if gap.low > 0 else "not told apart"
        shown = (f"{100 * rate:.1f}" for rate in rates)
        table.add_row(name, *shown, percent(gap._asdict(), "+"), verdict)
    return table
