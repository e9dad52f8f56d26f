"""One speaker at a time: what a model hears decides, in segments and over a recording."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
from numpy.typing import NDArray

from csc_model.mfcc import mfcc_statistics
from pipeline.audio import Samples
from pipeline.corpora import CorpusConfig, IngestConfig, list_corpora
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.segments import Piece
from pipeline.shards import read_catalogue
from pipeline.speakers import SpeakerCheck
from pipeline.storage import Folder
from pipeline.store import ingest, plan_ingest
from tests.conftest import serially, voice


class MfccEar:
    """Tells a man from a child: enough to test what is done with the answer."""

    name = "mfcc"

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def __call__(self, samples: Samples) -> NDArray[np.float32]:
        return mfcc_statistics(samples, SAMPLE_RATE_HZ).astype(np.float32)


def piece(samples: Samples, start: int = 0) -> Piece:
    return Piece(start, len(samples), samples, 20.0)


@pytest.fixture(scope="module")
def pair() -> tuple[int, int, float]:
    """Two speakers who sound unlike each other, and a threshold between."""
    ear = MfccEar(0.0)
    vectors = np.stack([ear(voice(speaker, 0, 4.0)) for speaker in range(20)])
    first, second = divmod(int(np.argmin(vectors @ vectors.T)), 20)
    parts = [ear(voice(who, turn, 2.0)) for who in (first, second) for turn in range(4)]
    cosines = np.stack(parts) @ np.stack(parts).T
    within = min(cosines[:4, :4].min(), cosines[4:, 4:].min())
    across = cosines[:4, 4:].max()
    assert within > across
    return first, second, float(within + across) / 2


def test_a_segment_of_two_speakers_is_found(pair: tuple[int, int, float]) -> None:
    first, second, threshold = pair
    check = SpeakerCheck(MfccEar(threshold), "given")
    assert check.fault(piece(voice(first, 0, 4.0))) is None
    both = np.concatenate([voice(first, 0, 2.0), voice(second, 0, 2.0)])
    fault = check.fault(piece(both))
    assert fault is not None
    assert fault.reason == "several_speakers"
    assert "by model mfcc" in fault.detail
    assert check.others() == []  # a given label is not doubted


def test_the_largest_group_of_an_unlabelled_recording_is_kept(
    pair: tuple[int, int, float], tmp_path: Path
) -> None:
    first, second, threshold = pair
    silence = np.zeros(16_000, np.float32)
    turns = [(second, 0), (first, 0), (first, 1), (second, 1), (first, 2)]
    parts = [part for who, turn in turns for part in (voice(who, turn, 4.0), silence)]
    (tmp_path / "c").mkdir()
    soundfile.write(tmp_path / "c" / "talk.flac", np.concatenate(parts), SAMPLE_RATE_HZ)
    config = IngestConfig(
        corpora=[CorpusConfig(name="c", root=str(tmp_path / "c"), layout="unlabelled")]
    )
    root = Folder.at(tmp_path / "store")
    planned = plan_ingest(root, config, list_corpora(config))
    index = ingest(root, planned, config, serially, MfccEar(threshold))
    catalogue = read_catalogue(planned.store)
    turn_of = [start // (5 * SAMPLE_RATE_HZ) for start in catalogue["start_sample"].to_pylist()]
    assert {turns[turn][0] for turn in turn_of} == {first}
    rejects = pq.read_table(planned.store.path("rejects.parquet")).to_pylist()
    others = [row for row in rejects if row["reason"] == "other_speaker"]
    assert {turns[row["start_sample"] // (5 * SAMPLE_RATE_HZ)][0] for row in others} == {second}
    assert index["seconds_in"] == pytest.approx(25.0)
