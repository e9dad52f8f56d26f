"""What a run says at its end, and what an ingest would do."""

import os
import shlex

from jobs.console import present, say
from jobs.extraction_report import tables
from jobs.registry import masked
from jobs.run import Run
from pipeline.corpora import SAMPLE
from pipeline.plan import changes, source_bytes
from pipeline.store import unread

JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # Ray sets it for what was submitted


def summary(run: Run, arguments: str) -> None:
    """Print what a whole run made, its metrics, and what to try next."""
    present(tables(run.evaluate.about))
    pair = shlex.join(str(path) for path in sorted(SAMPLE.glob("speechocean762/soc0005/*"))[:2])
    say(f"\nMade in {run.workspace.folder.uri}:")
    for what, folder in (
        ("utterance store", run.ingest[0]),
        ("mixture shards", run.build[0]),
        ("model", run.train.folder),
        ("evaluation", run.evaluate.folder),
    ):
        say(f"  {what:16} {folder.uri}")
    address = masked(run.workspace.mlflow_uri)
    say(f"  {'runs, registry':16} {address}")
    if JOB_VARIABLE in os.environ:  # nobody is there to try anything next
        return
    say("\nNext:")
    say(f"  csc verify{arguments} {pair}")
    say(f"  csc run{arguments} --set train.steps={2 * run.config.train.steps}")
    served = address.startswith("http")
    say(f"  {address}" if served else f"  mlflow ui --backend-store-uri {shlex.quote(address)}")


def dry_run(run: Run) -> None:
    """Say what an ingest would do, and do nothing."""
    planned = run.plan
    if planned.finished:
        say(f"  nothing new: generation {planned.number} holds all of it, {planned.store.uri}")
        return
    todo = unread(run.store_root, planned, run.config.ingest)
    new = changes(run.store_root, planned)
    say(
        f"  generation {planned.number}: {new.new} new, {new.changed} changed, {new.gone} gone, "
        f"{new.unchanged} unchanged"
    )
    gigabytes, shards = source_bytes(todo).sum() / 1e9, len(set(todo["shard"].to_pylist()))
    say(f"  to be read: {len(todo)} recordings or spans, {gigabytes:.2f} GB, in {shards} shards")
    say("  dry run: nothing was written")
