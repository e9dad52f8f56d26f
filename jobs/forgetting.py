"""Taking speakers and recordings out of a workspace, and naming what was made of them."""

from collections.abc import Sequence

from jobs.console import say
from jobs.lineage import flag_forgotten
from jobs.run import Run
from pipeline.forget import forget as forget_sources
from pipeline.forget import index_ids
from pipeline.shards import INDEX
from pipeline.storage import Folder


def forget(run: Run, speakers: Sequence[str], recordings: Sequence[str]) -> None:
    """Take speakers and recordings out of all stores of the workspace, and name what they made."""
    names = [*speakers, *recordings]
    before = _stores(run)
    mixtures = run.workspace.mixtures
    count = forget_sources(_store_roots(run), names)
    say(f"  {count} recording(s) or span(s) removed; no later ingest reads them")
    left = _stores(run)
    for file in mixtures.list():
        folder, _, name = file.name.rpartition("/")
        if name == INDEX and mixtures.read_json(file.name)["store"] not in {None, *left}:
            say(
                f"  built before, and may hold their audio: {mixtures.path(folder)}; remove it, "
                "and what was trained on it"
            )
    for made in (run.workspace.evaluations, run.workspace.embeddings):
        if next(iter(made.list()), None) is not None:
            say(f"  may hold their voices or vectors: {made.uri}; remove it, it is made again")
    if run.config.mlflow.uri or run.workspace.folder.exists("mlflow.db"):
        flagged = flag_forgotten(run.registry, speakers, recordings, before - left)
        if flagged:
            say(f"  flagged in the registry, as trained with them: version {', '.join(flagged)}")


def _stores(run: Run) -> set[str]:
    """Return the ids of all generations of all stores of the workspace."""
    return {name for root in _store_roots(run) for name in index_ids(root)}


def _store_roots(run: Run) -> list[Folder]:
    utterances = run.workspace.utterances
    roots = sorted({file.name.partition("/")[0] for file in utterances.list() if "/" in file.name})
    return [utterances.child(root) for root in roots]
