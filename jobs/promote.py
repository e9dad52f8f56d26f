"""The gate: a challenger becomes champion when it is not worse, and a champion can be taken back.

Judgement is by the same trials for both, paired, over speakers. What was decided is kept with the
run of the challenger, also a refusal.
"""

import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from csc_model import metrics
from csc_model.config import VARIANT
from jobs.config import Config
from jobs.console import say
from jobs.evaluate import CSC_NAME, SCORES_FILE, Evaluator, score_table
from jobs.extraction_gate import judge_extraction
from jobs.lineage import missing
from jobs.promotion_lock import Promotion, promotion, user
from jobs.register import evaluation_path
from jobs.registry import CHALLENGER, CHAMPION, TRIALS, Registry, Version
from pipeline.errors import CscError

WHEN, WHO, FROM, WHY = (f"csc.promoted_{key}" for key in ("when", "by", "from", "why"))
BACK_WHEN, BACK_WHY = "csc.rolled_back_when", "csc.rolled_back_why"
DECISION, DECIDED = "csc.decision", "csc.decision_when"
ALREADY = "it is champion already"


class Decision(NamedTuple):
    """What the gate said, and the numbers it said it by."""

    promoted: bool
    why: str
    version: Version
    differences: dict[str, dict[str, float]]  # in EER, challenger minus champion


def promote(
    registry: Registry, evaluator: Evaluator, *, forced: str = "", dry_run: bool = False
) -> Decision:
    """Judge the challenger and, if it passes, make it champion; the decision is kept either way.

    `forced`, a reason, promotes what the gate refuses. A champion that was scored on other trials
    is scored on the challenger's first. A dry run keeps nothing.

    Raises:
        CscError: there is no challenger, its trials are not those of this store and configuration,
            or another promotion came in between.
    """
    challenger, champion = registry.by_alias(CHALLENGER), registry.by_alias(CHAMPION)
    if challenger is None:
        raise CscError(
            f"no version of {registry.model} has the alias {CHALLENGER}: run csc register"
        )
    if champion is not None and champion.number == challenger.number:
        if not dry_run:
            _complete(registry, champion)
        return Decision(True, ALREADY, challenger, {})
    decision = _decide(registry, challenger, champion, evaluator, keep=not dry_run)
    if forced and not decision.promoted:
        why = f"forced: {forced}; the gate: {decision.why}"
        decision = decision._replace(promoted=True, why=why)
    if not dry_run:
        _keep(registry, decision, champion, evaluator.config)
    return decision


def rollback(registry: Registry, why: str) -> Version:
    """Make the champion's predecessor champion again, and return it.

    Another rollback goes on to the one before that.

    Raises:
        CscError: there is no champion, or none came before it.
    """
    champion = registry.by_alias(CHAMPION)
    if champion is None:
        raise CscError(f"{registry.model} has no champion: csc promote makes one")
    before = champion.tags.get(FROM, "none")
    if before == "none":
        raise CscError(f"version {champion.number} is the first champion: nothing to go back to")
    previous, now = registry.version(before), _now()
    record = {"rolled_back": champion.number, "to": previous.number, "why": why}
    told = f"rolled back from version {champion.number}: {why}"
    with promotion(registry) as held:
        _check_champion(registry, champion)
        _record(registry, champion.run_id, record, now)
        # Before the alias: otherwise a kill in between would leave a version that the gate lets in.
        registry.tag(champion, {BACK_WHY: why, BACK_WHEN: now})
        _crown(registry, held, previous, _traces(told, now))
    return previous


def _decide(
    registry: Registry,
    challenger: Version,
    champion: Version | None,
    evaluator: Evaluator,
    *,
    keep: bool,
) -> Decision:
    lacking = missing(challenger)
    if lacking:
        why = f"it does not say where it comes from ({', '.join(lacking)})"
        return Decision(False, why, challenger, {})
    if challenger.tags.get(BACK_WHEN):
        why = f"it was rolled back: {challenger.tags.get(BACK_WHY)}"
        return Decision(False, why, challenger, {})
    variant = challenger.tags.get("csc.variant")
    if variant != VARIANT:
        why = f"it is of variant {variant}, this program of {VARIANT}"
        return Decision(False, why, challenger, {})
    if champion is None:
        return Decision(True, "it is the first", challenger, {})
    ours, theirs = (
        scores_of(registry, version, challenger.tags[TRIALS], evaluator, keep=keep)
        for version in (challenger, champion)
    )
    decision = _judge(challenger, champion, ours, theirs, evaluator.config)
    kept, told = judge_extraction(challenger, champion, evaluator.config)
    if not decision.promoted or not told:
        return decision
    return decision._replace(promoted=kept, why=f"{decision.why}; {told}" if kept else told)


def _keep(registry: Registry, decision: Decision, champion: Version | None, config: Config) -> None:
    """Write a decision down, and move the alias if it says so."""
    challenger, now = decision.version, _now()
    record = {
        "challenger": challenger.number,
        "champion": champion.number if champion else None,
        "promoted": decision.promoted,
        "why": decision.why,
        "margin": config.promote.margin,
        "eer_challenger_minus_champion": decision.differences,
    }
    if not decision.promoted:
        _record(registry, challenger.run_id, record, now)
        registry.tag(challenger, {DECISION: decision.why, DECIDED: now})
        return
    with promotion(registry) as held:  # of two at once, the later one finds another champion
        _check_champion(registry, champion)
        _record(registry, challenger.run_id, record, now)
        # Before the alias: a champion can be taken back, and one that lacks the rest is seen.
        registry.tag(challenger, {FROM: champion.number if champion else "none", WHEN: ""})
        _crown(registry, held, challenger, _traces(decision.why, now))


def _crown(registry: Registry, held: Promotion, version: Version, traces: dict[str, str]) -> None:
    """Move the alias, which is what counts, and only then say on the version that it was moved."""
    held.check()
    registry.move_alias(CHAMPION, version)
    try:
        registry.tag(version, traces)
    except CscError as error:
        say(f"version {version.number} is champion, but this is not noted on it: {error}")


def _complete(registry: Registry, champion: Version) -> None:
    """Say on a champion that it is, where one was killed between the alias and that."""
    if champion.tags.get(WHEN):
        return
    with promotion(registry):  # who made it champion may be about to say so
        now = registry.by_alias(CHAMPION)
        if now and not now.tags.get(WHEN):
            registry.tag(now, _traces(ALREADY, _now()))


def _traces(why: str, now: str) -> dict[str, str]:
    """Return what a champion says of itself; since when comes last, as it stands for all."""
    return {WHO: user(), WHY: why, BACK_WHEN: "", WHEN: now}


def _check_champion(registry: Registry, judged: Version | None) -> None:
    now = registry.by_alias(CHAMPION)
    if (now and now.number) != (judged and judged.number):
        raise CscError(
            f"another promotion came in between, the champion is version {now.number if now else 0}"
            ": look at it with csc models, and run again"
        )


def _record(registry: Registry, run_id: str, record: dict[str, Any], now: str) -> None:
    name = f"decisions/{now.replace(':', '-')}.json"
    registry.log_decision(run_id, record | {"who": user(), "when": now}, name)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _judge(
    challenger: Version, champion: Version, ours: pa.Table, theirs: pa.Table, config: Config
) -> Decision:
    gaps = differences(ours, theirs, config.promote.guarded, config)
    worse = [
        f"{condition} {gap.value:+.2%} [{gap.low:+.2%}, {gap.high:+.2%}]"
        for condition, gap in gaps.items()
        if gap.low > 0 or gap.value > config.promote.margin
    ]
    why = f"not worse than version {champion.number} on {', '.join(config.promote.guarded)}"
    if worse:
        why = f"worse than version {champion.number} in EER at {'; '.join(worse)}"
    told = {condition: gap._asdict() for condition, gap in gaps.items()}
    return Decision(not worse, why, challenger, told)


def scores_of(
    registry: Registry,
    version: Version,
    trials_hash: str,
    evaluator: Evaluator,
    *,
    keep: bool = True,
) -> pa.Table:
    """Fetch the scores of a version on some trials; make and keep them if there are none yet.

    Raises:
        CscError: there are none, and the trials at hand are others.
    """
    below = evaluation_path(trials_hash)
    with tempfile.TemporaryDirectory(prefix="csc-scores-") as scratch:
        found = registry.fetch(version.run_id, f"{below}/{SCORES_FILE}", Path(scratch))
        if found is not None:
            return pq.read_table(found)
        if evaluator.trials.hash != trials_hash:
            raise CscError(
                f"version {version.number} has no scores on trials {trials_hash}, and the trials "
                "of this data and configuration are others: give those of its evaluation"
            )
        model = registry.model_of(version, Path(scratch) / "version")
        system = evaluator.test.add_model(CSC_NAME, model)
        scores = {CSC_NAME: evaluator.scores(system).scores}
        table = score_table(scores, evaluator.trials)
        if keep:
            kept = Path(scratch) / "evaluation"
            kept.mkdir()
            pq.write_table(table, kept / SCORES_FILE)
            registry.log_folder(version.run_id, kept, below)
        return table


def differences(
    ours: pa.Table, theirs: pa.Table, conditions: Sequence[str], config: Config
) -> dict[str, metrics.Interval]:
    """Return by how much the EER of one table of scores is above another's, by condition.

    Paired: both are of the same trials, and the same speakers are drawn for both.

    Raises:
        CscError: a condition has no scores.
    """
    for table in (ours, theirs):
        absent = [name for name in conditions if f"{CSC_NAME}.{name}" not in table.column_names]
        if absent:
            raise CscError(
                f"there are no scores under {', '.join(absent)}: the trials have no such "
                "condition; set promote.guarded to others, or evaluate with them"
            )
    names = np.concatenate([ours["enrolment_speaker"], ours["test_speaker"]])
    distinct, speaker = np.unique(names, return_inverse=True)
    draws = metrics.draw_speakers(len(distinct), config.evaluate.bootstrap_replicates, config.seed)
    sides = np.split(speaker, 2)
    return {name: _difference(ours, theirs, name, sides, draws) for name in conditions}


def _difference(
    ours: pa.Table,
    theirs: pa.Table,
    condition: str,
    sides: Sequence[np.ndarray[Any, np.dtype[np.int64]]],
    draws: np.ndarray[Any, np.dtype[np.int64]],
) -> metrics.Interval:
    rates, replicates = [], []
    for table in (ours, theirs):
        score, target = table[f"{CSC_NAME}.{condition}"].to_numpy(), table["target"].to_numpy()
        rates.append(metrics.eer(score, target))
        replicates.append(metrics.eer_replicates(metrics.Trials(score, target, *sides), draws))
    return metrics.interval(rates[0] - rates[1], replicates[0] - replicates[1])
