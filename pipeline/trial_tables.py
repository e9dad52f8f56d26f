"""Trials as a table: a row for each trial under each condition, by utterance ids of a store.

Tab-separated, with a heading. Whoever has the same store has the same trials by it, whatever the
seed and the configuration that they were made with.
"""

import csv
import io
from typing import NoReturn

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from pyarrow import csv as arrow_csv
from pydantic import ValidationError

from pipeline.errors import CscError
from pipeline.strangers import Places
from pipeline.trials import (
    CLEAN,
    MAX_RIVALS,
    NONE,
    Condition,
    TrialConfig,
    Trials,
)
from pipeline.voices import MIN_SPEAKERS

COLUMNS = (
    "condition",
    "target",
    "enrolment",  # ids, comma-separated
    "test",
    "interferers",
    "sir_db",
    "noise",
    "snr_db",
    "room",
    "seconds",
)
OVER = {"interferers": "speech", "noise": "noise", "room": "room"}  # kinds of what lies over tests
FIRST_LINE = 2  # of the trials


def table(trials: Trials) -> str:
    """Write trials as a tab-separated table, a row for each trial under each condition."""
    sink = io.StringIO()
    writer = csv.writer(sink, delimiter="\t", lineterminator="\n")
    writer.writerow(COLUMNS)
    ids, noises, rooms = (
        part["utterance_id"].to_pylist()
        for part in (trials.utterances, trials.noises, trials.rooms)
    )
    enrolled = [",".join(ids[row] for row in own) for own in trials.enrolled.tolist()]
    for name, its in trials.conditions.items():
        for enrolment, test, target in zip(
            trials.enrolment.tolist(), trials.test.tolist(), trials.target.tolist(), strict=True
        ):
            rivals = trials.rivals[test, : its.interferers].tolist()
            noisy = its.snr_db is not None
            writer.writerow(
                (
                    name,
                    int(target),
                    enrolled[enrolment],
                    ids[test],
                    ",".join(ids[rival] for rival in rivals),
                    its.sir_db if rivals else "",
                    noises[trials.noise[test]] if noisy else "",
                    its.snr_db if noisy else "",
                    rooms[trials.room[test]] if its.room else "",
                    its.seconds or "",
                )
            )
    return sink.getvalue()


def trials_of_table(data: bytes, catalogue: pa.Table, where: str) -> Trials:
    """Return the trials of a table, of utterances that no training has heard.

    They are those that it was made of, but for what no score depends on (`Trials.reduced`).

    Raises:
        CscError: a column is missing, an utterance is none of this store, or a row contradicts
            another one or the store; the message says where.
    """
    told = _Told(data, catalogue, where)
    enrolled, test = told.places("enrolment", "speech"), told.places("test", "speech")[:, 0]
    over = {column: told.places(column, kind) for column, kind in OVER.items()}
    names, target = told.text("condition"), told.text("target") == "1"
    conditions = {name: told.condition(name, over) for name in dict.fromkeys(names.tolist())}
    try:
        TrialConfig(conditions=conditions)
    except ValidationError as error:
        raise CscError(f"{where}: {_reason(error)}") from None
    told.check_people(enrolled, test, target, over["interferers"])
    pairs = np.column_stack([enrolled, test, target])
    clean = pairs[names == CLEAN]
    for name in conditions:
        if not np.array_equal(pairs[names == name], clean):
            raise CscError(
                f"{where}: {name} has other trials than {CLEAN}: the same ones, in the same order, "
                "serve every condition"
            )
    rivals, noise, room = (told.laid(column, test, places) for column, places in over.items())
    groups, enrolment = np.unique(clean[:, :-2], axis=0, return_inverse=True)
    return Trials(
        conditions,
        {},
        told.utterances["speech"],
        told.utterances["noise"],
        told.utterances["room"],
        rivals,
        noise[:, 0],
        room[:, 0],
        groups,
        enrolment,
        clean[:, -2],
        clean[:, -1].astype(bool),
    ).reduced()


class _Told:
    """What the rows of a table say, of the utterances of a store."""

    def __init__(self, data: bytes, catalogue: pa.Table, where: str) -> None:
        self.where, self.rows = where, _rows(data, where)
        unheard = catalogue.filter(pc.not_equal(catalogue["split"], "train")).sort_by(
            [("speaker_id", "ascending"), ("utterance_id", "ascending")]
        )
        self.utterances = {
            kind: unheard.filter(pc.equal(unheard["kind"], kind)) for kind in OVER.values()
        }
        self.heard = set(
            catalogue.filter(pc.equal(catalogue["split"], "train"))["utterance_id"].to_pylist()
        )

    def fail(self, row: int, why: str) -> NoReturn:
        raise CscError(f"{self.where}, line {row + FIRST_LINE}: {why}")

    def text(self, column: str) -> NDArray[np.object_]:
        return np.asarray(self.rows[column].to_numpy(), dtype=object)

    def places(self, column: str, kind: str) -> Places:
        """Return where in its kind each named utterance is, `(row, name)`, NONE where are fewer."""
        place = {name: row for row, name in enumerate(self.ids(kind))}
        said = self.rows[column].combine_chunks().dictionary_encode()
        which = said.indices.to_numpy()
        lists = [text.split(",") if text else [] for text in said.dictionary.to_pylist()]
        found = np.full((len(lists), max(1, *map(len, lists))), NONE)
        for number, names in enumerate(lists):
            for slot, name in enumerate(names):
                if name not in place:
                    self.fail(int(np.argmax(which == number)), self._unknown(name, kind))
                found[number, slot] = place[name]
        return found[which]

    def ids(self, kind: str) -> list[str]:
        return list(self.utterances[kind]["utterance_id"].to_pylist())

    def _unknown(self, name: str, kind: str) -> str:
        if name in self.heard:
            return f"{name} is of the split train, which models have heard: leave it out"
        return (
            f"the store has no {kind} {name!r} in its splits valid and test: the table is of "
            "another store, or the recording was taken out since"
        )

    def condition(self, name: str, over: dict[str, Places]) -> Condition:
        """Return what is done under a condition, which all of its rows must say alike."""
        rows = np.flatnonzero(self.text("condition") == name)
        row = int(rows[0])
        counts = {column: (places != NONE).sum(1) for column, places in over.items()}
        texts = {column: self.text(column) for column in ("sir_db", "snr_db", "seconds")}
        for column, said in (counts | texts).items():
            other = rows[said[rows] != said[row]]
            if len(other):
                self.fail(
                    int(other[0]),
                    f"{column} of condition {name} is another than in line {row + FIRST_LINE}: "
                    "give it a name of its own",
                )
        asked = {column: said[row] or None for column, said in texts.items()}
        if (asked["snr_db"] is None) != (counts["noise"][row] == 0):
            self.fail(row, "noise and snr_db go together")
        try:
            return Condition(
                interferers=int(counts["interferers"][row]),
                sir_db=float(asked["sir_db"] or 0.0),
                snr_db=asked["snr_db"] and float(asked["snr_db"]),
                room=bool(counts["room"][row]),
                seconds=asked["seconds"] and float(asked["seconds"]),
            )
        except ValidationError as error:
            self.fail(row, _reason(error))
        except ValueError as error:
            self.fail(row, str(error))

    def check_people(
        self, enrolled: Places, test: Places, target: NDArray[np.bool_], rivals: Places
    ) -> None:
        """Assert that labels are the store's, and that nobody is heard in what they enrol for."""
        speech = self.utterances["speech"]
        names, speaker = np.unique(speech["speaker_id"].to_pylist(), return_inverse=True)
        speaker = np.append(speaker, NONE)  # of NONE
        whose = speaker[enrolled]
        known = {
            "no utterance is enrolled, or fewer than in other rows": (enrolled == NONE).any(1),
            "nothing is tested": test == NONE,
            "enrolled are several people": (whose != whose[:, :1]).any(1),
            "the test is enrolled too": (enrolled == test[:, None]).any(1),
            "the store says otherwise of who is target": target != (whose[:, 0] == speaker[test]),
            "an interferer is the test's speaker, or the enrolled one": (
                (speaker[rivals] == speaker[test][:, None]) | (speaker[rivals] == whose[:, :1])
            ).any(1),
        }
        for why, wrong in known.items():
            if wrong.any():
                self.fail(int(np.argmax(wrong)), why)
        people = names[np.unique(np.append(whose, speaker[test]))]
        if len(people) < MIN_SPEAKERS or target.all() or not target.any():
            raise CscError(
                f"{self.where}: {len(people)} speaker(s), {target.sum()} target and "
                f"{(~target).sum()} other trials: {MIN_SPEAKERS} speakers and trials of both kinds "
                "are needed"
            )

    def laid(self, column: str, test: Places, places: Places) -> Places:
        """Return what lies over each utterance, `(utterance, slot)`: the same wherever it is."""
        most = MAX_RIVALS if column == "interferers" else 1
        if places.shape[1] > most:
            self.fail(int(np.argmax(places[:, most] != NONE)), f"more than {most} {column}")
        into = np.full((len(self.utterances["speech"]), most), NONE)
        for slot, said in enumerate(places.T):
            rows = np.flatnonzero(said != NONE)
            into[test[rows], slot] = said[rows]
            other = rows[into[test[rows], slot] != said[rows]]
            if len(other):
                self.fail(
                    int(other[0]), f"{column} over this test side is another than in another row"
                )
        return into


def _rows(data: bytes, where: str) -> pa.Table:
    """Read a table as texts."""
    try:
        rows = arrow_csv.read_csv(
            io.BytesIO(data),
            arrow_csv.ReadOptions(use_threads=False),  # then errors name the row
            arrow_csv.ParseOptions(delimiter="\t"),
            arrow_csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string())),
        )
    except pa.ArrowInvalid as error:
        raise CscError(f"{where}: {error}; give a table as csc trials writes it") from None
    missing = [column for column in COLUMNS if column not in rows.column_names]
    if missing:
        raise CscError(
            f"{where}: no column {', '.join(missing)}; give a table as csc trials writes it, or "
            "--audio FOLDER with a list of files"
        )
    if not len(rows):
        raise CscError(f"{where}: there are no trials in it")
    return rows


def _reason(error: ValidationError) -> str:
    return str(error.errors()[0]["msg"].removeprefix("Value error, "))
