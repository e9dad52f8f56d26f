"""The data contract: Arrow schemas, ids, versions. Every other module of the pipeline reads it."""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from pydantic import BaseModel, ConfigDict

SAMPLE_RATE_HZ = 16_000
BYTES_PER_SAMPLE = 2
STORE_VERSION = 2
DATASET_VERSION = 2
SPLITS = ("train", "valid", "test")

OnProgress = Callable[[int, int], None]
"""Called with (done, total) as a stage advances."""

Task = Mapping[str, Any]
"""What one shard is made of, as JSON can hold it."""
Work = Callable[[Task], None]
"""Makes one shard and commits it."""
Runner = Callable[[Sequence[Task], Work], None]
"""Does work on every task, in any order and anywhere: `tasks.run_tasks` on Ray."""


class Strict(BaseModel):
    """A frozen record that refuses unknown keys and wrong types."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


UTTERANCE = pa.schema(
    [
        ("utterance_id", pa.string()),  # content hash of the decoded segment
        ("source_id", pa.string()),  # what of the listing it was cut from
        ("speaker_id", pa.string()),  # "<corpus>/<speaker>"; for noise, the recording
        ("session_id", pa.string()),  # recording or chapter
        ("kind", pa.string()),  # speech | noise | room
        ("label_kind", pa.string()),  # given | pseudo
        ("split", pa.string()),
        ("gender", pa.string()),
        ("corpus", pa.string()),
        ("path", pa.string()),  # within the corpus root
        ("file_sha256", pa.string()),
        ("start_sample", pa.int64()),  # within the file, at SAMPLE_RATE_HZ
        ("num_samples", pa.int64()),
        ("level_dbfs", pa.float32()),  # of active frames
        ("snr_db", pa.float32()),
        ("clipped_share", pa.float32()),
        ("bandwidth_hz", pa.float32()),
        ("tonal_share", pa.float32()),  # power in partials that hold for half a second
    ]
)
STORED_UTTERANCE = UTTERANCE.append(pa.field("fingerprint", pa.binary())).append(
    pa.field("pcm", pa.large_binary())
)
"""A row of the utterance store; `pcm` is mono int16 at SAMPLE_RATE_HZ, little endian.

`fingerprint` is how it sounds, for finding near-duplicates.
"""

CATALOGUE = UTTERANCE.append(pa.field("shard", pa.int32())).append(pa.field("row", pa.int32()))
"""The store without its audio, and where the audio lies: what recipes are drawn from."""

LISTING = pa.schema(
    [
        ("source_id", pa.string()),  # hash of corpus, path and span
        ("corpus", pa.string()),
        ("path", pa.string()),  # within the corpus root
        ("num_bytes", pa.int64()),
        ("version", pa.string()),  # the object's ETag, or when the file was written
        ("kind", pa.string()),
        ("speaker_id", pa.string()),
        ("session_id", pa.string()),
        ("split", pa.string()),
        ("gender", pa.string()),
        ("label_kind", pa.string()),
        ("start_s", pa.float64()),  # of the span within the recording
        ("duration_s", pa.float64()),  # 0: to its end
    ]
)
"""What there is to read, known before any of it is opened."""

PLAN = LISTING.append(pa.field("shard", pa.int32()))
"""A listing, and where what was made of each source lies."""

REJECT = pa.schema(
    [
        ("source_id", pa.string()),
        ("corpus", pa.string()),
        ("path", pa.string()),
        ("start_sample", pa.int64()),  # within the file, at SAMPLE_RATE_HZ
        ("num_samples", pa.int64()),  # 0 where nothing could be decoded
        ("stage", pa.string()),  # read | decode | speech | quality | speaker | duplicates | forget
        ("reason", pa.string()),
        ("detail", pa.string()),
    ]
)

SOURCE = pa.struct(
    [
        ("condition", pa.int32()),
        ("slot", pa.int32()),  # 0 target, 1.. interferers, last noise
        ("utterance_id", pa.string()),
        ("speaker_id", pa.string()),
        ("shard", pa.int32()),
        ("row", pa.int32()),
        ("offset", pa.int64()),  # first sample taken from the utterance
        ("num_samples", pa.int32()),
        ("onset", pa.int32()),  # where it begins within the mixture
        ("utterance_dbfs", pa.float32()),  # level of the whole of it
        ("level_dbfs", pa.float64()),  # asked of its active speech; null where a gain was given
        ("gain_db", pa.float64()),  # that gives it this level
        ("room", pa.int32()),  # row of ROOMS_FILE, -1 for none
    ]
)
CONDITION = pa.struct(
    [
        ("sir_db", pa.float32()),  # asked for; null where there is nothing to ask
        ("snr_db", pa.float32()),
        ("overlap", pa.float32()),
        ("fixed", pa.bool_()),  # remixing takes nobody from it, and brings nobody to it
        ("realised_sir_db", pa.float32()),  # of the active speech that was taken
        ("realised_snr_db", pa.float32()),
        ("realised_overlap", pa.float32()),
    ]
)
LINE = pa.struct(
    [
        ("condition", pa.int16()),
        ("slot", pa.int16()),
        ("speaker", pa.int32()),  # row of SPEAKERS_FILE, or NOISE, or SEVERAL
        ("room", pa.int32()),
        ("fixed", pa.bool_()),  # as its mixture
        ("gain_db", pa.float32()),
        ("level_dbfs", pa.float32()),  # before the gain, as gains are set by it
    ]
)
"""A dry signal of an episode: one source, or several of the same slot added up (babble, MixIT)."""

NOISE, SEVERAL = -1, -2
EPISODE = pa.schema(
    [
        ("episode", pa.int64()),  # its number in the split
        ("anchor", pa.int32()),  # row of SPEAKERS_FILE
        ("mixit", pa.bool_()),  # slots are mixtures themselves, of speakers that count as unknown
        ("conditions", pa.list_(CONDITION)),
        ("sources", pa.list_(SOURCE)),
        ("lines", pa.list_(LINE)),
        ("checksum", pa.uint64()),  # XXH3 of pcm
        ("pcm", pa.large_binary()),
    ]
)
"""A recipe with its dry lines: int16, each as long as the mixture, one after another."""

SPEAKERS = pa.schema(
    [
        ("speaker_id", pa.string()),
        ("split", pa.string()),
        ("utterances", pa.int64()),  # in the whole split
    ]
)
ROOMS = pa.schema(
    [
        ("utterance_id", pa.string()),
        ("room", pa.string()),  # of which there may be several responses
        ("split", pa.string()),
        ("pcm", pa.large_binary()),  # int16, all of the same length
    ]
)
SPEAKERS_FILE, ROOMS_FILE = "speakers.parquet", "rooms.parquet"


def of_split(rows: pa.Table, split: str) -> pa.Table:
    """Return the rows of one split."""
    return rows.filter(pc.equal(rows["split"], split))


def speaker_id(corpus: str, speaker: str) -> str:
    """Return the id of a speaker, unique over all corpora."""
    return f"{corpus}/{speaker}"


def content_id(pcm: bytes) -> str:
    """Return the id of decoded audio: 128 bits of BLAKE2b, the same under any file name."""
    return hashlib.blake2b(pcm, digest_size=16).hexdigest()


def config_hash(value: Any) -> str:
    """Return a short hash of anything JSON can hold, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def stable_fraction(key: str) -> float:
    """Map a string to [0, 1), evenly and for ever the same."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
