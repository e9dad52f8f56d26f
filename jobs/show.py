"""The command `csc show`: a dataset in numbers, or one episode to be read, heard and seen."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table

from jobs.config import Config
from jobs.console import present, say, show
from jobs.datasets import Found, find_dataset
from jobs.show_files import slot_name, write_files
from pipeline.audit.census import MOST, Census, Spread, census, seconds_of
from pipeline.audit.excerpt import Excerpt, read_excerpt
from pipeline.datasets import Dataset, read_dataset
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ, SPEAKERS_FILE
from pipeline.shards import read_catalogue, read_table

NOTHING = "\N{EN DASH}"
ASKED = (("SIR", "sir_db", " dB"), ("SNR", "snr_db", " dB"), ("overlap", "overlap", ""))


def show_dataset(name: str | None, split: str | None, config: Config) -> None:
    """Print what a dataset is, and what its mixtures came to be.

    Raises:
        CscError: there is no such dataset, or it is damaged.
    """
    found = find_dataset(name, config)
    dataset = read_dataset(found.folder)
    splits = [one for one, count in dataset.episodes.items() if count]
    if split is not None and split not in splits:
        raise CscError(f"{dataset.id} has no split {split!r}: choose from {', '.join(splits)}")
    wanted = splits if split is None else [split]
    say("\n".join(_about(dataset, found)))
    present(_mixtures(census(dataset, wanted, _genders(dataset, found)), wanted))


def _about(dataset: Dataset, found: Found) -> Iterator[str]:
    records, mixing = dataset.records, dataset.config.mixing
    each = "each as long as it is"
    if dataset.num_samples is not None:
        each = f"of {dataset.num_samples / SAMPLE_RATE_HZ:g} s"
    mixtures = sum(record.rows for record in records) * mixing.conditions
    size = sum(record.bytes for record in records)
    passes = len({turn for _, turn in dataset.places})
    yield f"dataset {dataset.id}  {dataset.folder.uri}"
    counts = ", ".join(f"{count} {split}" for split, count in dataset.episodes.items() if count)
    yield f"  episodes of a pass: {counts}; passes: {passes}"
    yield (
        f"  mixtures: {mixtures} {each}, {mixing.conditions} in an episode, "
        f"{seconds_of(dataset) / 3600:.2f} h; {len(records)} shards, {size / 1e6:,.1f} MB"
    )
    names = read_table(dataset.folder, SPEAKERS_FILE)["split"].to_pylist()
    yield "  speakers: " + ", ".join(f"{names.count(one)} {one}" for one in dict.fromkeys(names))
    yield from _origin(dataset, found)


def _origin(dataset: Dataset, found: Found) -> Iterator[str]:
    if dataset.store is None:
        yield "  imported, not built from a store"
        return
    where = found.store.uri if found.store is not None else "not in the workspace any more"
    yield f"  store {dataset.store}: {where}; seed {dataset.seed}"
    ingest = dataset.about["config"].get("ingest") or {}
    for corpus in ingest.get("corpora", ()):
        yield f"    {corpus['name']} ({corpus['kind']}): licence {corpus['licence']}"


def _genders(dataset: Dataset, found: Found) -> dict[int, str]:
    """Return the gender of each row of the speakers' table for which the store knows it."""
    if found.store is None:
        return {}
    rows = read_catalogue(found.store).group_by("speaker_id").aggregate([("gender", "max")])
    pairs = zip(*(rows[key].to_pylist() for key in ("speaker_id", "gender_max")), strict=True)
    known = {speaker: gender for speaker, gender in pairs if gender}
    names = read_table(dataset.folder, SPEAKERS_FILE)["speaker_id"].to_pylist()
    return {row: known[name] for row, name in enumerate(names) if name in known}


def _mixtures(found: Census, splits: list[str]) -> Iterator[Table | str]:
    first = f", the first {found.mixtures}" if found.mixtures >= MOST else ""
    table = Table(
        title=f"{found.mixtures} mixtures of {', '.join(splits)}{first}: what was asked for, and "
        "what active speech came to have",
        title_justify="left",
    )
    for column in ("", "", "mixtures", "mean", "sd", "5 %", "50 %", "95 %"):
        table.add_column(column, justify="right" if column else "left")
    for what, spreads in found.spreads.items():
        for kind, spread in spreads.items():
            table.add_row(what if kind == "asked" else "", kind, *_cells(spread))
    yield table
    shares = ", ".join(f"{name} {share:.1%}" for name, share in found.shares.items())
    yield f"  shares of the mixtures: {shares}"
    same, known = found.same_gender
    share = f"{same / known:.1%} of {known} interferers" if known else "not known of anyone"
    yield f"  same gender as the target: {share}"


def _cells(spread: Spread | None) -> list[str]:
    if spread is None:
        return ["0", *[NOTHING] * 5]
    values = (spread.mean, spread.deviation, *spread.quantiles)
    return [str(spread.number), *(f"{value:.2f}" for value in values)]


def show_episode(
    name: str | None, number: int, split: str, out: str | None, config: Config
) -> None:
    """Print the recipe of an episode, and write what it sounds and looks like.

    Raises:
        CscError: there is no such dataset or episode, or nothing can be written.
    """
    found = find_dataset(name, config)
    dataset = read_dataset(found.folder)
    excerpt = read_excerpt(dataset, split, number)
    folder = Path(out or f"csc-show-{dataset.id}-{number}").absolute()
    kind = ", mixtures of mixtures" if excerpt.row["mixit"] else ""
    say(f"episode {number} of {split}{kind}  {dataset.folder.path(excerpt.shard)}")
    places = _places(found, excerpt)
    for condition, about in enumerate(excerpt.row["conditions"]):
        say(f"\nmixture {condition}: {_realised(about)}")
        show(_sources(dataset, excerpt, condition, places))
    names = write_files(excerpt, folder)
    say(f"\n{len(names)} files in {folder}:")
    for file in names:
        say(f"  {file}")


def _realised(about: Mapping[str, Any]) -> str:
    parts = []
    for what, key, unit in ASKED:
        asked, realised = about[key], about[f"realised_{key}"]
        if asked is not None or realised is not None:
            values = (NOTHING if value is None else f"{value:.2f}" for value in (asked, realised))
            parts.append(f"{what} {' asked, '.join(values)}{unit} realised")
    return "; ".join(parts) or "one voice, nothing asked"


def _places(found: Found, excerpt: Excerpt) -> dict[str, str]:
    """Return by utterance the recording that it was cut from, where the store still says so."""
    if found.store is None:
        return {}
    shards = {source["shard"] for source in excerpt.row["sources"]}
    rows = read_catalogue(found.store, shards)
    used = pa.array({source["utterance_id"] for source in excerpt.row["sources"]})
    rows = rows.filter(pc.is_in(rows["utterance_id"], value_set=used))
    columns = ("utterance_id", "corpus", "path", "start_sample")
    return {
        utterance: f"{corpus}/{path} at {start / SAMPLE_RATE_HZ:.2f} s"
        for utterance, corpus, path, start in zip(
            *(rows[column].to_pylist() for column in columns), strict=True
        )
    }


def _sources(
    dataset: Dataset, excerpt: Excerpt, condition: int, places: Mapping[str, str]
) -> Table:
    table = Table(show_edge=False)
    for column in ("slot", "speaker", "from"):
        table.add_column(column, overflow="fold")
    for column in ("taken at s", "length s", "onset s", "gain dB", "dBFS"):
        table.add_column(column, justify="right")
    table.add_column("room")
    lines = excerpt.row["lines"]
    levels = {(line["condition"], line["slot"]): line["level_dbfs"] for line in lines}
    for source in excerpt.row["sources"]:
        if source["condition"] == condition:
            slot = source["slot"]
            table.add_row(
                slot_name(slot, dataset.config.mixing.num_slots - 1, excerpt.row["mixit"]),
                source["speaker_id"],
                places.get(source["utterance_id"], f"utterance {source['utterance_id']}"),
                *(f"{source[k] / SAMPLE_RATE_HZ:.2f}" for k in ("offset", "num_samples", "onset")),
                f"{source['gain_db']:.2f}",
                f"{levels[condition, slot]:.1f}",
                excerpt.rooms.get(source["room"], NOTHING),
            )
    return table
