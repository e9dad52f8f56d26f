"""Trials as a table: what is written is read as the same trials, and what is wrong is named."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest

from pipeline.errors import CscError
from pipeline.shards import read_catalogue
from pipeline.storage import Folder
from pipeline.trial_tables import COLUMNS, table, trials_of_table
from pipeline.trials import Condition, TrialConfig, Trials, make_trials

Edit = Callable[[list[dict[str, str]]], object]
CONFIG = TrialConfig(utterances_per_speaker=3, nontargets_per_test=4)


@pytest.fixture(scope="module")
def catalogue(store: Folder) -> pa.Table:
    """The store's, with a room in its test split."""
    known = read_catalogue(store)
    test = known.filter(pc.equal(known["split"], "test"))
    rooms = test.slice(0, 1).to_pylist()
    rooms[0] |= {"utterance_id": "room", "speaker_id": "rooms/one", "kind": "room"}
    return pa.concat_tables([known, pa.Table.from_pylist(rooms, known.schema)])


@pytest.fixture(scope="module")
def trials(catalogue: pa.Table) -> Trials:
    return make_trials(catalogue, "test", CONFIG, seed=1)


def test_the_table_says_all_that_a_side_is_made_of(trials: Trials) -> None:
    heading, *lines = (line.split("\t") for line in table(trials).splitlines())
    assert tuple(heading) == COLUMNS
    assert len(lines) == len(trials.target) * len(trials.conditions)
    ids = trials.utterances["utterance_id"].to_pylist()
    rows = [dict(zip(COLUMNS, line, strict=True)) for line in lines]
    for row, test in zip(rows, np.tile(trials.test, len(trials.conditions)), strict=True):
        its = trials.conditions[row["condition"]]
        assert row["test"] == ids[test]
        rivals = [ids[rival] for rival in trials.rivals[test, : its.interferers]]
        assert row["interferers"] == ",".join(rivals)
        assert bool(row["noise"]) == (its.snr_db is not None)
        assert row["seconds"] == ("" if its.seconds is None else str(its.seconds))
    assert sum(int(row["target"]) for row in rows) == trials.target.sum() * len(trials.conditions)


@pytest.mark.parametrize("together", [1, 2])
@pytest.mark.parametrize("conditions", [CONFIG.conditions, {"clean": Condition()}])
def test_a_table_is_read_as_the_trials_that_it_was_made_of(
    catalogue: pa.Table, together: int, conditions: dict[str, Condition]
) -> None:
    config = TrialConfig(
        conditions=conditions, enrolment_utterances=together, nontargets_per_test=4
    )
    made = make_trials(catalogue, "test", config, seed=2)
    read = trials_of_table(table(made).encode(), catalogue, "t.tsv")
    assert read.hash == made.hash
    reduced = made.reduced()
    assert read.conditions == reduced.conditions
    for name in ("utterances", "noises", "rooms"):
        assert getattr(read, name).equals(getattr(reduced, name))
    for name in ("rivals", "noise", "room", "enrolled", "enrolment", "test", "target"):
        np.testing.assert_array_equal(getattr(read, name), getattr(reduced, name))
    assert table(read) == table(made)


def test_what_no_score_depends_on_is_no_part_of_the_hash(
    catalogue: pa.Table, trials: Trials
) -> None:
    reduced = trials.reduced()
    again = reduced.reduced()
    assert reduced.hash == again.hash == trials.hash
    assert again.utterances.equals(reduced.utterances)
    other = trials.rivals.copy()
    other[trials.test[0]] = other[trials.test[0]][::-1]
    assert trials._replace(rivals=other).hash != trials.hash
    bare = trials._replace(conditions={"clean": Condition()})
    assert bare._replace(rivals=other).hash == bare.hash
    assert len(bare.reduced().rooms) == 0


def edited(column: str, value: Callable[[str], str], condition: str = "sir_0_db") -> Edit:
    """Return what changes a field of the second trial of a condition."""

    def edit(rows: list[dict[str, str]]) -> None:
        row = [row for row in rows if row["condition"] == condition][1]
        row[column] = value(row[column])

    return edit


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (edited("test", lambda _: "00ff"), r"line \d+: the store has no speech '00ff' in its"),
        (edited("noise", lambda _: "x", "noise_0_db"), "the store has no noise 'x'"),
        (edited("sir_db", lambda _: "3.0"), r"sir_db of condition sir_0_db is another than in"),
        (edited("interferers", lambda _: ""), "interferers of condition sir_0_db is another"),
        (edited("interferers", lambda ids: f"{ids},{ids}", "two_0_db"), "interferers of condition"),
        (edited("target", lambda label: str(1 - int(label)), "clean"), "who is target"),
        (lambda rows: rows.pop(), "short_1_s has other trials than clean"),
        (lambda rows: [rows.pop(0) for row in [*rows] if row["condition"] == "clean"], "the first"),
        (lambda rows: [row.pop("test") for row in rows], "no column test; give a table as csc"),
        (lambda rows: rows.clear(), "there are no trials in it"),
    ],
)
def test_a_table_that_contradicts_itself_or_the_store_is_refused(
    catalogue: pa.Table, trials: Trials, edit: Edit, said: str
) -> None:
    heading, *lines = (line.split("\t") for line in table(trials).splitlines())
    rows = [dict(zip(heading, line, strict=True)) for line in lines]
    edit(rows)
    columns = [name for name in heading if not rows or name in rows[0]]
    text = "".join("\t".join(row) + "\n" for row in (columns, *(row.values() for row in rows)))
    with pytest.raises(CscError, match=said) as refusal:
        trials_of_table(text.encode(), catalogue, "t.tsv")
    assert str(refusal.value).startswith("t.tsv")


@pytest.mark.parametrize("data", [b"", b"\xff\xfe", b"1 a.wav b.wav\n", b"condition\ttest\na\n"])
def test_what_is_no_table_is_explained(catalogue: pa.Table, data: bytes) -> None:
    with pytest.raises(CscError, match="give a table as csc trials writes it"):
        trials_of_table(data, catalogue, "t.tsv")


def test_a_table_of_another_store_or_of_training_speakers_is_refused(
    catalogue: pa.Table, trials: Trials
) -> None:
    text = table(trials).encode()
    where = catalogue.schema.get_field_index("split")
    tested = pc.equal(catalogue["split"], "test")
    heard = pc.if_else(tested, "train", catalogue["split"])
    with pytest.raises(CscError, match="is of the split train, which models have heard"):
        trials_of_table(text, catalogue.set_column(where, "split", heard), "t.tsv")
    with pytest.raises(CscError, match="the table is of another store"):
        trials_of_table(text, catalogue.filter(pc.invert(tested)), "t.tsv")


def test_nobody_is_heard_over_a_test_that_they_are_compared_with(
    catalogue: pa.Table, trials: Trials
) -> None:
    enrolled = trials.enrolled[trials.enrolment, 0]
    rivals = trials.rivals.copy()
    rivals[trials.test[0], 0] = enrolled[(trials.test == trials.test[0]) & ~trials.target][0]
    with pytest.raises(CscError, match="an interferer is the test's speaker, or the enrolled one"):
        trials_of_table(table(trials._replace(rivals=rivals)).encode(), catalogue, "t.tsv")
