"""Bring mixtures in that other tools describe, and say what came of it."""

from jobs.config import Config
from jobs.console import heading, progress, say
from jobs.options import interruptible
from jobs.workspace import Workspace
from pipeline.exchange.librimix import import_librimix
from pipeline.exchange.librimix_metadata import LibriMix
from pipeline.shards import INDEX


def bring_in(mixtures: LibriMix, config: Config) -> None:
    """Make a dataset of LibriMix metadata in the workspace, or find the one that is there."""
    place, split = Workspace(config), mixtures.config.split
    with interruptible(), place.locked():
        dataset = place.mixtures.child(mixtures.id)
        heading("import librimix", "finished before" if dataset.exists(INDEX) else "")
        with progress("mixtures") as advance:
            index = import_librimix(dataset, mixtures, advance)
    megabytes = sum(shard["bytes"] for shard in index["shards"]) / 1e6
    say(
        f"  {index['episodes'][split]} {split} mixtures of {len(mixtures.speakers)} speakers; "
        f"{len(index['shards'])} shards, {megabytes:.1f} MB"
    )
    if mixtures.num_samples is None:
        say("  of their own lengths: the training loader needs an import with --seconds")
    say(f"  {dataset.uri}")
