"""Material that the benchmarks of build, loader and levels share; mixing from files, as others do.

Peers are imported where they are used: a benchmark says which are missing and goes on.
"""

import time
import warnings
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import soundfile
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.build import build
from pipeline.corpora import CorpusConfig, IngestConfig
from pipeline.distributions import BuildConfig
from pipeline.schema import SAMPLE_RATE_HZ, STORED_UTTERANCE, content_id
from pipeline.shards import (
    CATALOGUE_FILE,
    INDEX,
    audio_of,
    encode,
    open_shard,
    read_catalogue,
    read_pcm,
    shard_writer,
    store_shard_name,
)
from pipeline.storage import Folder
from tests.conftest import make_store, serially

SECONDS = 4.0
LENGTH = round(SECONDS * SAMPLE_RATE_HZ)
CONDITIONS = 2


class Spent(NamedTuple):
    """Seconds that something took: on the clock, and of this process on all its threads."""

    wall: float
    cpu: float

    @property
    def core(self) -> float:
        """Seconds of one core: threads that run at once count, and so does waiting."""
        return max(self)


def spent(work: Callable[[], Any]) -> Spent:
    wall, cpu = time.perf_counter(), time.process_time()
    work()
    return Spent(time.perf_counter() - wall, time.process_time() - cpu)


def versions(*names: str) -> str:
    """Return the versions of packages for the head of a table."""
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} missing")
    return ", ".join(found)


def sample_store(root: Path, given: str | None = None) -> Folder:
    """Return a store of the shipped sample, made below `root`, or the one that is given."""
    if given:
        return Folder.at(given)
    corpora = [
        CorpusConfig(name=name, root=f"sample:{name}", manifest="manifest.csv", kind=kind)
        for name, kind in (("speechocean762", "speech"), ("librispeech", "speech"))
    ]
    corpora.append(
        CorpusConfig(name="esc10", root="sample:esc10", manifest="manifest.csv", kind="noise")
    )
    return make_store(root, IngestConfig(corpora=corpora, source_mb_per_shard=3.0))


def store_hours(store: Folder) -> float:
    """Return the hours of speech in a store, all splits together."""
    rows = read_catalogue(store)
    speech = np.array(rows["kind"].to_pylist()) == "speech"
    return float(rows["num_samples"].to_numpy()[speech].sum()) / SAMPLE_RATE_HZ / 3600


def grown(store: Folder, root: Path, copies: int) -> Folder:
    """Write a store with all of another, as often as asked, each time of new speakers.

    One sample of each utterance is another, so that its content id is another too.
    """
    whole, audio = Folder.at(root).child("generation-00001"), audio_of(store)
    into, catalogues, count = audio_of(whole), [], 0
    numbers = sorted(set(read_catalogue(store)["shard"].to_pylist()))
    for copy in range(copies):
        for number in numbers:
            file = open_shard(audio, store_shard_name(number))
            path = Path(into.path(store_shard_name(count)))
            path.parent.mkdir(parents=True, exist_ok=True)
            rows = 0
            with shard_writer(str(path), STORED_UTTERANCE) as writer:
                for group in range(file.num_row_groups):
                    table = _renamed(file.read_row_group(group), copy)
                    writer.write_table(table, row_group_size=len(table))
                    catalogues.append(_catalogued(table, count, rows))
                    rows += len(table)
            count += 1
    catalogue = pa.concat_tables(catalogues)
    whole.put(CATALOGUE_FILE, encode(catalogue, len(catalogue)))
    whole.put_json(INDEX, store.read_json(INDEX) | {"id": f"grown-{copies}"})
    return whole


def _renamed(table: pa.Table, copy: int) -> pa.Table:
    """Return rows of other speakers with other content ids: the last sample is changed."""
    for name in ("speaker_id", "session_id", "source_id", "path"):
        values = [f"{value}-{copy}" for value in table[name].to_pylist()]
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    cells = [bytearray(cell) for cell in table["pcm"].to_pylist()]
    for cell in cells:
        cell[-2:] = copy.to_bytes(2, "little")
    ids = [content_id(bytes(cell)) for cell in cells]
    for name, values in (("pcm", [bytes(cell) for cell in cells]), ("utterance_id", ids)):
        field = STORED_UTTERANCE.field(name)
        table = table.set_column(
            table.schema.get_field_index(name), field, pa.array(values, field.type)
        )
    return table.cast(STORED_UTTERANCE)


def _catalogued(table: pa.Table, shard: int, first: int) -> pa.Table:
    numbers = pa.array(np.full(len(table), shard, np.int32))
    rows = pa.array(np.arange(first, first + len(table), dtype=np.int32))
    table = table.drop_columns(["fingerprint", "pcm"])
    return table.append_column("shard", numbers).append_column("row", rows)


def built(store: Folder, root: Path, config: BuildConfig, seed: int = 1) -> Folder:
    """Build a dataset without Ray."""
    dataset = Folder.at(root)
    build(dataset, store, config, seed, serially)
    return dataset


# Mixing from files, as others do it.


class Utterance(NamedTuple):
    """A recording of one speaker on disk."""

    path: Path
    speaker: str
    num_samples: int


def flac_files(store: Folder, root: Path) -> list[Utterance]:
    """Write the utterances of training as FLAC files."""
    rows = read_catalogue(store).to_pylist()
    rows = [row for row in rows if row["kind"] == "speech" and row["split"] == "train"]
    wanted: dict[int, set[int]] = {}
    for row in rows:
        wanted.setdefault(row["shard"], set()).add(row["row"])
    pcm, files = read_pcm(store, wanted), []
    root.mkdir(parents=True)
    for row in rows:
        path = root / f"{row['utterance_id']}.flac"
        soundfile.write(path, pcm[row["shard"], row["row"]], SAMPLE_RATE_HZ)
        files.append(Utterance(path, row["speaker_id"], row["num_samples"]))
    return files


def pairs(files: list[Utterance], count: int) -> Iterator[tuple[Utterance, Utterance]]:
    """Draw utterances of two speakers each."""
    rng = np.random.default_rng(0)
    for _ in range(count):
        one, other = (files[place] for place in rng.integers(len(files), size=2))
        while other.speaker == one.speaker:
            other = files[int(rng.integers(len(files)))]
        yield one, other


def lhotse_mixtures(files: list[Utterance], count: int) -> Iterator[Any]:
    """Mix cuts of at most SECONDS at an SNR with lhotse: cuts whose audio is not yet loaded."""
    from lhotse import CutSet, MonoCut, Recording

    recordings = {file.path: Recording.from_file(file.path) for file in files}
    cuts = CutSet.from_cuts(
        MonoCut(file.path.stem, 0, recordings[file.path].duration, 0, [], None, recordings[path])
        for path, file in ((file.path, file) for file in files)
    ).to_eager()
    rng = np.random.default_rng(1)
    for one, other in pairs(files, count):
        parts = []
        for file in (one, other):
            spare = max(file.num_samples - LENGTH, 0) / SAMPLE_RATE_HZ
            duration = min(SECONDS, file.num_samples / SAMPLE_RATE_HZ)
            cut = cuts[file.path.stem]
            parts.append(cut.truncate(offset=rng.uniform(0, spare), duration=duration))
        target, rival = sorted(parts, key=lambda cut: -cut.duration)
        yield target.mix(rival, snr=float(rng.uniform(-5, 10)))


def lhotse_in_memory(files: list[Utterance], count: int) -> None:
    for mixed in lhotse_mixtures(files, count):
        mixed.load_audio()


def lhotse_written(files: list[Utterance], count: int, root: Path) -> None:
    """Render the mixtures and write them with Shar, as uncompressed WAV in tar files."""
    from lhotse.shar import SharWriter

    root.mkdir(exist_ok=True)
    with SharWriter(str(root), fields={"recording": "wav"}, shard_size=1000) as writer:
        for place, mixed in enumerate(lhotse_mixtures(files, count)):
            mono = mixed.to_mono(encoding="wav")
            mono.id = f"mixture-{place}"
            writer.write(mono)


def dynamic_mixtures(files: list[Utterance], count: int, loudness: str) -> None:
    """Mix as the dynamic mixing of SpeechBrain's LibriMix recipe does.

    Both files are cropped to the shorter one, set to a random level between -33 and -25, by
    loudness (ITU-R BS.1770) or, cheaper, by power, added up and limited.
    """
    meter = None
    if loudness == "bs1770":
        import pyloudnorm

        meter = pyloudnorm.Meter(SAMPLE_RATE_HZ)
    rng = np.random.default_rng(1)
    for both in pairs(files, count):
        lengths = [soundfile.info(file.path).frames for file in both]
        shortest = min(*lengths, LENGTH)
        sources = []
        for file, length in zip(both, lengths, strict=True):
            start = int(rng.integers(length - shortest + 1))
            samples, _ = soundfile.read(file.path, shortest, start, dtype="float32")
            sources.append(_at_level(samples, rng.uniform(-33, -25), meter))
        stacked = torch.stack(sources)
        mixture = stacked.sum(0)
        weight = min(1.0, 0.9 / float(mixture.abs().max()))
        _ = mixture * weight, stacked * weight


def _at_level(samples: NDArray[np.float32], level_db: float, meter: Any) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if meter is None:
            now_db = 10 * np.log10(np.mean(samples**2) + 1e-12)
        else:
            now_db = meter.integrated_loudness(samples)
    scaled = samples * np.float32(10 ** ((level_db - now_db) / 20))
    peak = np.abs(scaled).max()
    return torch.from_numpy(scaled * np.float32(0.9 / peak) if peak >= 1 else scaled)
