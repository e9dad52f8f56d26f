"""Verification trials under interference: who is compared with whom, and what lies over the test.

Enrolment is one clean utterance. The test side is another utterance, clean or with one interferer
at a stated SIR. The same pairs serve every condition, and the interferer of a test utterance is
never the enrolled speaker, so that nothing but the condition differs between two error rates.
"""

from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field

from pipeline.audio import Pcm
from pipeline.draws import Draws, stream_key
from pipeline.errors import CscError
from pipeline.mixing import TARGET_LEVEL_DBFS
from pipeline.schema import Strict, config_hash
from pipeline.shards import read_pcm
from pipeline.storage import Folder

TRIALS_VERSION = 1
MIN_SPEAKERS = 5  # fewer give no interval


class TrialConfig(Strict):
    """Which trials are made of a split."""

    sir_db: list[float] = Field([5.0, 0.0], description="interfered conditions besides clean")
    utterances_per_speaker: int = Field(8, ge=2)
    nontargets_per_test: int = Field(200, ge=1)

    @property
    def conditions(self) -> dict[str, float | None]:
        """Names of the conditions with their SIR, None for clean."""
        return {"clean": None} | {f"sir_{sir_db:g}_db": sir_db for sir_db in self.sir_db}


class Trials(NamedTuple):
    """Pairs of places in `utterances`, and the interferer of each utterance when it is a test."""

    utterances: pa.Table  # rows of the catalogue
    interferer: NDArray[np.int64]  # (utterance,)
    enrolment: NDArray[np.int64]  # (trial,)
    test: NDArray[np.int64]  # (trial,)
    target: NDArray[np.bool_]  # (trial,)

    @property
    def speakers(self) -> NDArray[np.object_]:
        return np.asarray(self.utterances["speaker_id"].to_pylist(), dtype=object)

    def hash(self, config: TrialConfig) -> str:
        """Return the hash of all that a score depends on besides the model."""
        ids = self.utterances["utterance_id"].to_pylist()
        pairs = [array.tolist() for array in (self.interferer, self.enrolment, self.test)]
        return config_hash([TRIALS_VERSION, list(config.conditions), ids, pairs])


def make_trials(catalogue: pa.Table, split: str, config: TrialConfig, seed: int) -> Trials:
    """Make the trials of a split: all target pairs, and non-targets drawn for each test.

    Raises:
        CscError: the split has fewer than MIN_SPEAKERS speakers, or none with two utterances.
    """
    rows = catalogue.filter(
        pc.and_(pc.equal(catalogue["split"], split), pc.equal(catalogue["kind"], "speech"))
    ).sort_by([("speaker_id", "ascending"), ("utterance_id", "ascending")])
    places = _first_of_each(rows["speaker_id"].to_pylist(), config.utterances_per_speaker)
    rows = rows.take(pa.array(places, pa.int64()))
    speakers = np.asarray(rows["speaker_id"].to_pylist(), dtype=object)
    distinct, count = np.unique(speakers, return_counts=True)
    if len(distinct) < MIN_SPEAKERS or max(count) < 2:
        raise CscError(
            f"split {split!r} has {len(distinct)} speaker(s); trials need {MIN_SPEAKERS}, one of "
            "them with two utterances: add recordings, or raise its share in ingest.splits"
        )
    interferer, pairs = [], []
    for test, speaker in enumerate(speakers):
        draws = Draws(stream_key(seed, "trials", split), test)
        strangers = np.flatnonzero(speakers != speaker)
        rival = int(strangers[draws.below(len(strangers))])
        interferer.append(rival)
        pairs += [(enrolment, test) for enrolment in _own(rows, speakers, test)]
        others = np.flatnonzero((speakers != speaker) & (speakers != speakers[rival]))
        chosen = draws.distinct(len(others), min(len(others), config.nontargets_per_test))
        pairs += [(int(others[place]), test) for place in sorted(chosen)]
    enrolment_of, test_of = np.array(pairs).T
    same = speakers[enrolment_of] == speakers[test_of]
    return Trials(rows, np.array(interferer), enrolment_of, test_of, same.astype(bool))


def _first_of_each(keys: list[str], most: int) -> list[int]:
    """Return the places of the first `most` of each run of equal keys."""
    places, run = [], 0
    for place, key in enumerate(keys):
        run = run + 1 if place and keys[place - 1] == key else 0
        if run < most:
            places.append(place)
    return places


def _own(rows: pa.Table, speakers: NDArray[np.object_], test: int) -> list[int]:
    """Return the same speaker's other utterances, of another session where there is one."""
    own = np.flatnonzero(speakers == speakers[test])
    others = [int(place) for place in own if place != test]
    sessions = rows["session_id"].to_pylist()
    apart = [place for place in others if sessions[place] != sessions[test]]
    return apart or others


class TrialAudio:
    """The utterances of some trials in memory, and the test mixtures made of them."""

    def __init__(self, store: Folder, trials: Trials) -> None:
        places = list(
            zip(
                trials.utterances["shard"].to_pylist(),
                trials.utterances["row"].to_pylist(),
                strict=True,
            )
        )
        wanted: dict[int, list[int]] = {}
        for shard, row in places:
            wanted.setdefault(shard, []).append(row)
        audio = read_pcm(store, wanted)
        self.pcm = [audio[place] for place in places]
        self.gain_db = TARGET_LEVEL_DBFS - trials.utterances["level_dbfs"].to_numpy()
        self.interferer = trials.interferer

    def sources(self, place: int, sir_db: float | None) -> tuple[Pcm, NDArray[np.float32]]:
        """Return the test side of an utterance for `render`: sources and gains.

        Shapes `(slot, time)` and `(slot,)` with slots target, interferer, noise (always empty). The
        interferer is repeated or cut to the length of the target: the overlap is full.
        """
        target, rival = self.pcm[place], int(self.interferer[place])
        sources = np.zeros((3, len(target)), "<i2")
        gains_db = np.full(3, -np.inf, np.float32)
        sources[0], gains_db[0] = target, self.gain_db[place]
        if sir_db is not None:
            sources[1] = np.resize(self.pcm[rival], len(target))
            gains_db[1] = self.gain_db[rival] - sir_db
        return sources, gains_db
