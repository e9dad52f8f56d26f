"""A check finds whatever is not as it was built, names the file, and goes on to the rest."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from jobs.cli import main
from pipeline.audit.check import Report, check
from pipeline.build import build, dataset_id
from pipeline.commits import ShardRecord, commit_shard
from pipeline.corpora import CorpusConfig, IngestConfig
from pipeline.distributions import BuildConfig
from pipeline.episodes import Numbers
from pipeline.schema import EPISODE
from pipeline.shards import encode, read_catalogue
from pipeline.storage import Folder
from tests.conftest import BUILD, make_store, serially
from tests.test_librimix import write_files
from tests.test_responses import write_rooms

FIRST, SECOND, VALID = (
    "train-000-00000.parquet",
    "train-000-00001.parquet",
    "valid-000-00000.parquet",
)
Rows = list[dict[str, Any]]
Csc = Callable[..., tuple[int, str, str]]


@pytest.fixture
def copy(dataset: Folder, tmp_path: Path) -> Folder:
    """A dataset that may be damaged."""
    return copied(dataset, tmp_path)


def copied(dataset: Folder, root: Path) -> Folder:
    there = Folder.at(root).child(Path(dataset.uri).name)
    shutil.copytree(dataset.uri, there.uri)
    return there


def said(report: Report) -> str:
    return "\n".join(map(str, report.findings))


def edit_index(folder: Folder, edit: Callable[[Any], None]) -> None:
    index = folder.read_json("index.json")
    edit(index)
    folder.put_json("index.json", index)


def rewrite(folder: Folder, name: str, edit: Callable[[Rows], None]) -> None:
    """Edit the rows of a shard, and make its record and the index agree with that."""
    rows = pq.read_table(folder.open_input(name)).to_pylist()
    edit(rows)
    table = pa.Table.from_pylist(rows, schema=EPISODE)
    about = {"numbers": Numbers.of(table).checksum()}
    data = encode(table, BUILD.episodes_per_group)
    identity = folder.read_json("index.json")["id"]
    record = commit_shard(folder, name, data, len(rows), identity, about)
    edit_index(folder, lambda index: replace_record(index, record))


def replace_record(index: Any, record: ShardRecord) -> None:
    places = [place for place, one in enumerate(index["shards"]) if one["name"] == record.name]
    index["shards"][places[0]] = record.as_json()


def test_an_intact_dataset_passes(store: Folder, dataset: Folder) -> None:
    seen: list[tuple[int, int]] = []
    report = check(dataset, store, on_progress=lambda *counts: seen.append(counts))
    shards = len(dataset.read_json("index.json")["shards"])
    assert report == Report([], [], shards, 32, 3)
    assert seen == [(done, shards + 3) for done in range(1, shards + 4)]
    assert check(dataset, store, sample=None) == report._replace(remade=shards)


def test_every_kind_of_mixture_passes(store: Folder, tmp_path: Path) -> None:
    mixing = BUILD.mixing.model_dump() | {
        "absent_share": 0.3,
        "babble_share": 0.5,
        "noise_share": 0.7,
        "mixit_share": 0.2,
        "overlap_min": 0.3,
    }
    config = BuildConfig.model_validate(BUILD.model_dump() | {"passes": 2, "mixing": mixing})
    folder = Folder.at(tmp_path).child(dataset_id(store.read_json("index.json"), config, 5))
    build(folder, store, config, 5, serially)
    report = check(folder, store, sample=None)
    assert (said(report), report.episodes) == ("", 24 * 2 + 8)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
    derandomize=True,
)
@given(where=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
@example(where=0.0, flip=1)
@example(where=1 - 1e-12, flip=1)
def test_a_flipped_byte_anywhere_is_found(
    dataset: Folder, tmp_path_factory: pytest.TempPathFactory, where: float, flip: int
) -> None:
    folder = copied(dataset, tmp_path_factory.mktemp("flip"))
    data = bytearray(folder.read(FIRST))
    data[int(where * len(data))] ^= flip
    folder.put(FIRST, bytes(data))
    (finding,) = check(folder, None).findings
    assert finding.where == folder.path(FIRST)
    assert "damaged" in finding.what
    assert "csc build" in finding.remedy


def test_missing_and_short_shards_are_all_named(store: Folder, copy: Folder) -> None:
    copy.remove_file(FIRST)
    copy.put(VALID, copy.read(VALID)[:-100])
    copy.remove_file(f"{SECOND}.done.json")
    report = check(copy, store)
    findings = {Path(one.where).name: one.what for one in report.findings}
    assert findings[FIRST] == "is missing"
    assert "bytes, the index says" in findings[VALID]
    assert findings[f"{SECOND}.done.json"] == "is missing"
    assert len(report.findings) == 3
    assert report.remade == 3  # of those that are whole


def test_swapped_shards_are_told_apart(copy: Folder) -> None:
    one, other = copy.read(FIRST), copy.read(SECOND)
    copy.put(FIRST, other)
    copy.put(SECOND, one)
    findings = [(Path(one.where).name, one.what) for one in check(copy, None).findings]
    assert findings == [
        (FIRST, f"holds what should be in {SECOND}"),
        (SECOND, f"holds what should be in {FIRST}"),
    ]


def test_foreign_records_and_stray_files_are_named(copy: Folder) -> None:
    record = copy.read_json(f"{FIRST}.done.json")
    copy.put_json(f"{FIRST}.done.json", record | {"config": "0" * 16, "rows": 1})
    copy.put("train-000-00099.parquet", b"left over")
    text = said(check(copy, None))
    assert f"{FIRST}.done.json: foreign config: {'0' * 16}" in text
    assert f"{FIRST}.done.json: says rows 1, the index" in text
    assert "train-000-00099.parquet: belongs to nothing" in text


@pytest.mark.parametrize("with_store", [True, False])
def test_an_index_with_another_id_is_found(store: Folder, copy: Folder, with_store: bool) -> None:
    edit_index(copy, lambda index: index.update(id="f" * 16))
    text = said(check(copy, store if with_store else None))
    assert f"index.json: its id is {'f' * 16}, and store, build and seed in it make" in text
    assert f"{FIRST}.done.json: foreign config" in text


def test_a_missing_and_a_double_episode_are_found(store: Folder, copy: Folder) -> None:
    def repeat(rows: Rows) -> None:
        rows[1] |= {"episode": rows[0]["episode"]}

    rewrite(copy, FIRST, repeat)
    text = said(check(copy, store, sample=0))
    assert "pass 0 of split 'train': 1 episode(s) are there more than once: 0" in text
    assert "pass 0 of split 'train': 1 episode(s) are missing: 1" in text


def test_an_episode_less_is_found(store: Folder, copy: Folder) -> None:
    last = pq.read_table(copy.open_input(VALID))["episode"][-1]
    rewrite(copy, VALID, lambda rows: rows.__delitem__(-1))
    text = said(check(copy, store, sample=None))
    assert f"pass 0 of split 'valid': 1 episode(s) are missing: {last}" in text
    assert f"{VALID}: has 3 rows in the index, a build makes 4" in text
    assert f"{VALID}: has 3 rows, made anew it has 4" in text


def test_a_shard_that_the_index_forgot_is_found(store: Folder, copy: Folder) -> None:
    edit_index(copy, lambda index: index["shards"].pop(0))
    text = said(check(copy, store))
    assert f"{FIRST}: a build makes it and the index does not name it" in text
    assert f"{FIRST}: belongs to nothing that the index names" in text


def test_an_edited_recipe_is_found_by_making_it_anew(store: Folder, copy: Folder) -> None:
    def louder(rows: Rows) -> None:
        rows[2]["sources"][1]["gain_db"] += 1.0

    rewrite(copy, SECOND, louder)
    assert not check(copy, store, sample=0).findings
    (finding,) = check(copy, store, sample=None).findings
    assert finding.where == copy.path(SECOND)
    number = pq.read_table(copy.open_input(SECOND))["episode"][2]
    assert f"row 2 (episode {number}), sources[1].gain_db is " in finding.what


def test_edited_audio_is_found_twice(store: Folder, copy: Folder) -> None:
    def crackle(rows: Rows) -> None:
        pcm = np.frombuffer(rows[1]["pcm"], "<i2").copy()
        pcm[100] += 1
        rows[1]["pcm"] = pcm.tobytes()

    rewrite(copy, FIRST, crackle)
    checksum, anew = (one.what for one in check(copy, store, sample=None).findings)
    assert checksum == "has audio that is not what its checksum is of: episode 1"
    assert anew.endswith("row 1 (episode 1), pcm at byte 200")


@pytest.mark.parametrize("with_store", [True, False])
def test_a_speaker_of_another_split_is_found(store: Folder, copy: Folder, with_store: bool) -> None:
    speakers = pq.read_table(copy.open_input("speakers.parquet")).to_pylist()
    foreign = next(one["speaker_id"] for one in speakers if one["split"] == "valid")

    def smuggle(rows: Rows) -> None:
        rows[0]["sources"][0]["speaker_id"] = foreign

    rewrite(copy, FIRST, smuggle)
    text = said(check(copy, store if with_store else None, sample=0))
    assert f"{FIRST}: has {foreign} of split 'valid' in a mixture of 'train': episode 0" in text
    assert "a line labelled as somebody else" in text


def test_a_speaker_that_nobody_lists_is_found(store: Folder, copy: Folder) -> None:
    tested = next(
        row["speaker_id"]
        for row in pq.read_table(store.open_input("utterances.parquet")).to_pylist()
        if row["split"] == "test" and row["kind"] == "speech"
    )

    def smuggle(rows: Rows) -> None:
        rows[0]["sources"][0]["speaker_id"] = tested

    rewrite(copy, FIRST, smuggle)
    assert f"{tested}, who is not in speakers.parquet, in a mixture" in said(check(copy, None))
    assert f"{tested} of split 'test' in a mixture" in said(check(copy, store, sample=0))


def test_what_was_forgotten_is_found_where_the_store_is_gone(copy: Folder) -> None:
    row = pq.read_table(copy.open_input(VALID)).to_pylist()[0]
    gone = row["sources"][0]["utterance_id"]
    report = check(copy, None, forgotten=frozenset([gone]))
    assert "is not in the workspace any more" in report.notes[0]
    assert "has audio that csc forget was to remove: episode" in said(report)
    assert VALID in said(report)


def test_a_damaged_store_is_said_and_the_rest_is_checked(
    store: Folder, copy: Folder, tmp_path: Path
) -> None:
    root = tmp_path / "store"
    shutil.copytree(Path(store.uri).parent, root)
    for path in (root / "shards").glob("shard-*.parquet"):
        path.unlink()
    report = check(copy, Folder.at(root).child(Path(store.uri).name))
    assert said(report).count("cannot be made anew") == 3
    assert (report.episodes, report.remade) == (32, 0)


def test_tables_beside_the_shards_are_checked(store: Folder, copy: Folder) -> None:
    table = pq.read_table(copy.open_input("speakers.parquet"))
    copy.put("speakers.parquet", encode(table.slice(1), 64))
    assert "speakers.parquet: does not list the speakers of the store" in said(check(copy, store))
    assert "its speakers are not those of speakers.parquet" in said(check(copy, None))
    copy.put("speakers.parquet", b"PAR1")
    (damaged,) = check(copy, store).findings
    assert "speakers.parquet: is damaged" in str(damaged)
    copy.remove_file("speakers.parquet")
    (missing,) = check(copy, None).findings
    assert "speakers.parquet: is missing; remove index.json and run csc build" in str(missing)


def test_what_is_mixed_by_recording_is_of_nobody_and_in_whole_rooms(
    corpora: IngestConfig, tmp_path: Path
) -> None:
    rooms = CorpusConfig(name="rooms", root=str(write_rooms(tmp_path / "r", 12, 2)), kind="room")
    every = corpora.model_copy(update={"corpora": [*corpora.corpora, rooms]})
    store = make_store(tmp_path / "store", every)
    mixing = BUILD.mixing.model_copy(update={"room_share": 1.0, "by_recording": True})
    config = BUILD.model_copy(update={"mixing": mixing})
    folder = Folder.at(tmp_path).child(dataset_id(store.read_json("index.json"), config, 3))
    index = build(folder, store, config, 3, serially)
    utterances = read_catalogue(store)["utterance_id"].to_pylist()
    assert set(index["speakers"]) <= set(utterances)
    for row in pq.read_table(folder.open_input(FIRST)).to_pylist():
        targets = {source["utterance_id"] for source in row["sources"] if source["slot"] == 0}
        assert targets == {index["speakers"][row["anchor"]]}
    names = pq.read_table(folder.open_input("rooms.parquet"))["room"].to_pylist()
    assert all(names.count(name) == 2 for name in names)
    report = check(folder, store)
    assert (report.findings, report.remade) == ([], 3)


def test_rooms_are_checked(corpora: IngestConfig, tmp_path: Path) -> None:
    rooms = CorpusConfig(name="rooms", root=str(write_rooms(tmp_path / "r", 12, 2)), kind="room")
    every = corpora.model_copy(update={"corpora": [*corpora.corpora, rooms]})
    store = make_store(tmp_path / "store", every)
    mixing = BUILD.mixing.model_copy(update={"room_share": 0.7})
    config = BUILD.model_copy(update={"mixing": mixing})
    folder = Folder.at(tmp_path).child(dataset_id(store.read_json("index.json"), config, 3))
    build(folder, store, config, 3, serially)
    whole = check(folder, store)
    assert (whole.findings, whole.remade) == ([], 3)
    table = pq.read_table(folder.open_input("rooms.parquet"))
    folder.put("rooms.parquet", encode(table.take(pa.array(range(len(table))[::-1])), 64))
    text = said(check(folder, store))
    assert "rooms.parquet: does not hold the rooms of the store" in text
    assert f"{FIRST}: has a room of another split" in text
    folder.remove_file("rooms.parquet")
    report = check(folder, store)
    assert [Path(one.where).name for one in report.findings] == ["rooms.parquet"]
    assert report.notes == ["without rooms.parquet no shard was made anew"]


@pytest.mark.parametrize("voices", [2, 3])
def test_an_import_is_checked_as_far_as_it_can_be(tmp_path: Path, voices: int) -> None:
    folder = write_files(tmp_path, voices).imported(tmp_path / "m")
    report = check(folder, None)
    assert (report.findings, report.episodes, report.remade) == ([], 3, 0)
    assert report.notes == ["it was imported, not built from a store: no shard was made anew"]
    (name,) = (shard["name"] for shard in folder.read_json("index.json")["shards"])
    folder.remove_file(name)
    assert f"{name}: is missing; remove index.json and import it again" in said(check(folder, None))


def test_s3_is_checked_like_a_folder(store: Folder, dataset: Folder, s3: str) -> None:
    there = Folder.at(f"{s3}/checked").child(Path(dataset.uri).name)
    for file in dataset.list():
        there.put(file.name, dataset.read(file.name))
    assert check(there, store, sample=1).findings == []
    data = bytearray(there.read(FIRST))
    data[len(data) // 2] ^= 1
    there.put(FIRST, bytes(data))
    there.remove_file(VALID)
    assert [one.where for one in check(there, store, sample=1).findings] == [
        there.path(FIRST),
        there.path(VALID),
    ]


@pytest.fixture
def csc(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Csc:
    """Return the command: words in, exit code, output and errors out."""

    def run(*words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["csc", "check", *words])
        with pytest.raises(SystemExit) as ended:
            main()
        said = capsys.readouterr()
        return int(ended.value.code or 0), said.out, said.err

    return run


def test_the_command_counts_and_refuses(
    store: Folder, dataset: Folder, tmp_path: Path, csc: Csc
) -> None:
    shutil.copytree(Path(store.uri).parent, tmp_path / "utterances" / "root")
    copy = copied(dataset, tmp_path / "mixtures")
    name, place = Path(copy.uri).name, ["--workspace", str(tmp_path)]
    shards = len(copy.read_json("index.json")["shards"])
    code, out, _ = csc(name[:6], *place)
    assert code == 0
    assert f"{shards} shards, 32 episodes, 3 shards made anew: all as it should be" in out
    copy.remove_file(FIRST)
    code, out, _ = csc(copy.uri, "--sample", "0", *place)
    assert code == 1
    assert f"{FIRST}: is missing" in out
    assert "1 finding(s)" in out


def test_what_cannot_be_found_is_one_message(tmp_path: Path, csc: Csc) -> None:
    place = ["--workspace", str(tmp_path)]
    for one in ("abc1", "abc2"):
        Folder.at(tmp_path / "mixtures" / one).put_json("index.json", {"version": 1})
    for words, message in (
        (["xyz"], "there is no dataset 'xyz': choose from"),
        (["abc"], "'abc' is the beginning of abc1, abc2: write more of it"),
        (["abc1"], "has data version 1"),
        ([str(tmp_path / "none")], "has no index.json"),
        ([], "is not built: run csc build, or choose from"),
    ):
        code, _, err = csc(*words, *place)
        assert code == 1
        assert err.startswith("error: ")
        assert message in err
    (tmp_path / "mixtures" / "abc1" / "index.json").write_text(json.dumps({"version": 2}))
    assert "is no index of a dataset" in csc("abc1", *place)[2]
