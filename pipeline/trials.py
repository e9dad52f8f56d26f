"""Verification trials under interference: who is compared with whom, and what lies over the test.

Enrolment is clean. The test side is another utterance under one of several conditions. The same
pairs serve every condition, a test side has target and non-target trials or none, and whoever talks
over it is nobody it is compared with: nothing but the voice tells them apart, and nothing
but the condition two error rates.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pydantic import Field, field_validator

from pipeline.draws import Draws, stream_key
from pipeline.errors import CscError
from pipeline.schema import Strict, config_hash
from pipeline.strangers import Places
from pipeline.voices import Voices

TRIALS_VERSION = 3
SIDES_VERSION = 1  # of how test sides are rendered
MAX_RIVALS = 2
CLEAN = "clean"
NONE = -1


class Condition(Strict):
    """What is done to the test side of a trial; nothing that is left out."""

    interferers: int = Field(0, ge=0, le=MAX_RIVALS, description="who talk over all of it")
    sir_db: float = Field(0.0, description="level of the target over that of all of them")
    snr_db: float | None = Field(None, description="of a noise over all of it")
    room: bool = Field(False, description="put into a room, interferers too")
    seconds: float | None = Field(None, gt=0, description="that its middle is cut to")


def _standard() -> dict[str, Condition]:
    sirs = {f"sir_{sir_db}_db": float(sir_db) for sir_db in (10, 5, 0, -5)}
    return {
        CLEAN: Condition(),
        **{name: Condition(interferers=1, sir_db=sir_db) for name, sir_db in sirs.items()},
        "two_0_db": Condition(interferers=2, sir_db=0.0),
        "noise_10_db": Condition(snr_db=10.0),
        "noise_0_db": Condition(snr_db=0.0),
        "room": Condition(room=True),
        "short_2_s": Condition(seconds=2.0),
        "short_1_s": Condition(seconds=1.0),
    }


class TrialConfig(Strict):
    """Which trials are made of a split."""

    conditions: dict[str, Condition] = Field(
        default_factory=_standard, description="by name; `clean`, the first, is as it is"
    )
    utterances_per_speaker: int = Field(8, ge=2)
    enrolment_utterances: int = Field(1, ge=1, description="whose mean vector enrols a speaker")
    nontargets_per_test: int = Field(200, ge=1)
    same_gender_share: float = Field(
        0.5, ge=0, le=1, description="of the non-targets, as far as genders are known"
    )

    @field_validator("conditions")
    @classmethod
    def _first_is_clean(cls, conditions: dict[str, Condition]) -> dict[str, Condition]:
        if not conditions or next(iter(conditions)) != CLEAN:
            raise ValueError(f"the first of the conditions is {CLEAN}, in which speakers enrol")
        if conditions[CLEAN] != Condition():
            raise ValueError(f"nothing is done to what is {CLEAN}: give it no keys")
        bad = [name for name in conditions if not name.replace("-", "_").isidentifier()]
        if bad:
            raise ValueError(f"{bad[0]!r} cannot name a condition: use letters, digits, _ and -")
        return conditions


class Trials(NamedTuple):
    """Pairs of an enrolled speaker and a test side, and what lies over each test side.

    What is enrolled, and rivals, are places in `utterances`; `noise` and `room` are places in
    `noises` and `rooms`, NONE where there are none.
    """

    conditions: dict[str, Condition]
    skipped: dict[str, str]  # conditions that cannot be made of this data, and why
    utterances: pa.Table  # rows of the catalogue
    noises: pa.Table
    rooms: pa.Table
    rivals: Places  # (utterance, MAX_RIVALS)
    noise: Places  # (utterance,)
    room: Places  # (utterance,)
    enrolled: Places  # (enrolment, utterance)
    enrolment: Places  # (trial,)
    test: Places  # (trial,)
    target: NDArray[np.bool_]  # (trial,)

    def require(self, names: Iterable[str]) -> None:
        """Assert that conditions can be made.

        Raises:
            CscError: one cannot; the message says why.
        """
        for name in names:
            if name in self.skipped:
                raise CscError(
                    f"condition {name}: {self.skipped[name]}; ingest some, or name other conditions"
                )

    @property
    def speakers(self) -> NDArray[np.object_]:
        """Return who speaks in each utterance."""
        return np.asarray(self.utterances["speaker_id"].to_pylist(), dtype=object)

    @property
    def hash(self) -> str:
        """The hash of all that a score depends on besides the model."""
        its = self.reduced()
        ids = [
            table["utterance_id"].to_pylist() for table in (its.utterances, its.noises, its.rooms)
        ]
        drawn = (its.rivals, its.noise, its.room, its.enrolled, its.enrolment, its.test)
        conditions = {name: one.model_dump() for name, one in self.conditions.items()}
        versions = [TRIALS_VERSION, SIDES_VERSION]
        return config_hash([versions, conditions, ids, [array.tolist() for array in drawn]])

    def reduced(self) -> "Trials":
        """Return these trials without what no score of them depends on.

        Utterances that are neither enrolled nor tested nor heard over a test, and what was drawn
        for those that are no test, or for conditions that there are not.
        """
        asked = self.conditions.values()
        over = max(its.interferers for its in asked)
        tested = np.unique(self.test)
        drawn = [np.full_like(each, NONE) for each in (self.rivals, self.noise, self.room)]
        rivals, noise, room = drawn
        rivals[tested, :over] = self.rivals[tested, :over]
        if any(its.snr_db is not None for its in asked):
            noise[tested] = self.noise[tested]
        if any(its.room for its in asked):
            room[tested] = self.room[tested]
        groups, enrolment = np.unique(self.enrolment, return_inverse=True)
        enrolled = self.enrolled[groups]
        used, at = _numbered(len(self.utterances), tested, enrolled, rivals)
        noises, noise_at = _numbered(len(self.noises), noise)
        rooms, room_at = _numbered(len(self.rooms), room)
        return self._replace(
            utterances=self.utterances.take(pa.array(used)),
            noises=self.noises.take(pa.array(noises)),
            rooms=self.rooms.take(pa.array(rooms)),
            rivals=at[rivals[used]],
            noise=noise_at[noise[used]],
            room=room_at[room[used]],
            enrolled=at[enrolled],
            enrolment=enrolment,
            test=at[self.test],
        )


def _numbered(count: int, *places: Places) -> tuple[Places, Places]:
    """Return which of `count` places are used, and the number each has among them, or NONE."""
    used = np.unique(np.concatenate([each.ravel() for each in places]))
    used = used[used != NONE]
    number = np.full(count + 1, NONE)  # the last is that of NONE
    number[used] = np.arange(len(used))
    return used, number


def make_trials(catalogue: pa.Table, split: str, config: TrialConfig, seed: int) -> Trials:
    """Make the trials of a split: all target pairs, and non-targets drawn for each test.

    Conditions that need noise or rooms are left out where the split has none.

    Raises:
        CscError: the split has fewer than MIN_SPEAKERS speakers, or none with two utterances.
    """
    rows = catalogue.filter(pc.equal(catalogue["split"], split))
    rows = rows.sort_by([("speaker_id", "ascending"), ("utterance_id", "ascending")])
    speech, noises, rooms = (
        rows.filter(pc.equal(rows["kind"], kind)) for kind in ("speech", "noise", "room")
    )
    first = _first_of_each(speech["speaker_id"].to_pylist(), config.utterances_per_speaker)
    return trials_of(speech.take(pa.array(first, pa.int64())), noises, rooms, split, config, seed)


def trials_of(
    utterances: pa.Table,
    noises: pa.Table,
    rooms: pa.Table,
    split: str,
    config: TrialConfig,
    seed: int,
) -> Trials:
    """Make the trials of utterances that are sorted by speaker; see `make_trials`."""
    voices = Voices.of(utterances, split, config.enrolment_utterances)
    kinds = {"noise": len(noises), "room": len(rooms)}
    conditions, skipped = possible(config.conditions, kinds, f"split {split!r}")
    rivals, over, compared = [], [], []
    for test in range(len(utterances)):
        draws = Draws(stream_key(seed, "trials", split), test)
        rivals.append(voices.rivals(test, MAX_RIVALS, draws))
        over.append([draws.below(count) if count else NONE for count in kinds.values()])
        own = voices.own(test)
        most, share = config.nontargets_per_test, config.same_gender_share
        others = voices.others(test, rivals[-1], most, share, draws) if len(own) else own
        compared.append(np.concatenate([own, others]) if len(others) else others)
    enrolment = np.concatenate(compared)
    if not len(enrolment):
        raise CscError(
            f"split {split!r} has too few speakers who can be enrolled by "
            f"{config.enrolment_utterances} utterance(s): add recordings, or set "
            "evaluate.trials.enrolment_utterances lower"
        )
    noise_of, room_of = np.array(over, np.int64).T
    test_of = np.repeat(np.arange(len(utterances)), [len(each) for each in compared])
    speaker = voices.speaker
    target = speaker[voices.enrolled[enrolment, 0]] == speaker[test_of]
    return Trials(
        conditions,
        skipped,
        utterances,
        noises,
        rooms,
        np.array(rivals, np.int64),
        noise_of,
        room_of,
        voices.enrolled,
        enrolment,
        test_of,
        target,
    )


def possible(
    conditions: Mapping[str, Condition], kinds: Mapping[str, int], where: str
) -> tuple[dict[str, Condition], dict[str, str]]:
    """Part conditions into those that can be made, and those that cannot with the reason."""
    skipped = {}
    for name, condition in conditions.items():
        needed = {"noise": condition.snr_db is not None, "room": condition.room}
        for kind, is_needed in needed.items():
            if is_needed and not kinds[kind]:
                skipped[name] = f"{where} has no {kind}"
    return {name: its for name, its in conditions.items() if name not in skipped}, skipped


def _first_of_each(keys: list[str], most: int) -> list[int]:
    """Return the places of the first `most` of each run of equal keys."""
    places, run = [], 0
    for place, key in enumerate(keys):
        run = run + 1 if place and keys[place - 1] == key else 0
        if run < most:
            places.append(place)
    return places
