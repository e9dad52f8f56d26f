"""Trial lists: what is read, who is who, and the trials that are made of audio files."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import CscError
from pipeline.sides import TrialAudio
from pipeline.storage import Folder
from pipeline.trial_lists import FOLDERS, TARGETS, Pair, read_voxceleb, speakers_of
from pipeline.trial_sources import Source, listed, open_source
from pipeline.trials import Condition, TrialConfig
from tests.conftest import voice

CONFIG = TrialConfig(
    conditions={"clean": Condition(), "sir_0_db": Condition(interferers=1)}, nontargets_per_test=3
)


def write_list(root: Path, speakers: int = 8, each: int = 3) -> Path:
    """Write audio of some speakers, and trials: all pairs of own files, and the next speaker's."""
    lines = []
    for speaker in range(speakers):
        for take in range(each):
            path = root / f"p{speaker}" / f"{take}.wav"
            path.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(path, voice(speaker, take, 1.0), 16_000)
        names = [f"p{speaker}/{take}.wav" for take in range(each)]
        lines += [f"1 {one} {other}" for one in names for other in names if one != other]
        lines += [f"0 p{(speaker + 1) % speakers}/0.wav {name}" for name in names]
        alone = root / f"p{speaker}" / "enrolled.wav"  # which is no test
        soundfile.write(alone, voice(speaker, each, 1.0), 16_000)
        lines.append(f"1 p{speaker}/enrolled.wav p{speaker}/0.wav")
    (root / "list.txt").write_text("\n".join(lines) + "\n")
    return root / "list.txt"


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("listed")
    write_list(folder)
    return folder


def source(root: Path, kept: Path, store: Folder, config: TrialConfig = CONFIG) -> Source:
    found = listed(root / "list.txt", root, Folder.at(kept), lambda *_: None)
    return Source(store=store.uri, split="test", trials=config, seed=1, given=found)


def test_a_list_makes_the_trials_that_it_names(root: Path, tmp_path: Path, store: Folder) -> None:
    trials, read = open_source(source(root, tmp_path, store))
    pairs = read_voxceleb(root / "list.txt")
    paths = trials.utterances["path"].to_pylist()
    made = [
        Pair(bool(target), paths[trials.enrolled[enrolment, 0]], paths[test])
        for enrolment, test, target in zip(
            trials.enrolment, trials.test, trials.target, strict=True
        )
    ]
    assert made == pairs
    speakers = trials.speakers
    assert len(set(speakers)) == 8
    assert all(paths[row].split("/")[0] == speakers[row].split("/")[0] for row in range(len(paths)))
    for enrolment, test in zip(trials.enrolment, trials.test, strict=True):
        heard = speakers[trials.rivals[test]]
        assert speakers[test] not in heard
        assert speakers[trials.enrolled[enrolment, 0]] not in heard
    (pcm,) = read(trials.utterances.slice(4, 1))
    expected = np.rint(soundfile.read(root / paths[4])[0] * 32768)
    assert np.abs(pcm - expected).max() <= 1


def test_files_are_looked_at_once(root: Path, tmp_path: Path) -> None:
    told: list[int] = []
    for _ in range(2):
        listed(root / "list.txt", root, Folder.at(tmp_path), lambda done, _: told.append(done))
    assert told == list(range(1, 33))


def test_a_file_that_has_changed_is_looked_at_again(tmp_path: Path, store: Folder) -> None:
    write_list(tmp_path)
    before = source(tmp_path, tmp_path / "kept", store)
    trials, read = open_source(before)
    changed = tmp_path / trials.utterances["path"][0].as_py()
    soundfile.write(changed, voice(9, 0, 1.1), 16_000)
    with pytest.raises(CscError, match="has changed"):
        read(trials.utterances.slice(0, 1))
    after, read = open_source(source(tmp_path, tmp_path / "kept", store))
    assert after.hash != trials.hash
    assert len(read(after.utterances.slice(0, 1))[0]) == 17_600


def test_what_is_only_enrolled_has_nobody_over_it(
    root: Path, tmp_path: Path, store: Folder
) -> None:
    trials, read = open_source(source(root, tmp_path, store))
    names = trials.utterances["path"].to_pylist()
    place = next(row for row, name in enumerate(names) if name.endswith("enrolled.wav"))
    side = TrialAudio(read, trials, [place]).side(place, "clean")
    assert len(side.mixture) == 16_000


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9), st.booleans()), min_size=1))
@settings(max_examples=100, deadline=None)
def test_files_that_targets_join_have_one_speaker(drawn: list[tuple[int, int, bool]]) -> None:
    pairs = [Pair(target, f"f{one}", f"f{other}") for one, other, target in drawn]
    speakers = speakers_of(pairs).of
    reach = {name: {name} for name in speakers}
    for _ in range(10):  # a plain closure
        for pair in pairs:
            if pair.target:
                both = reach[pair.enrolment] | reach[pair.test]
                for name in both:
                    reach[name] = reach[name] | both
    for one in speakers:
        for other in speakers:
            assert (speakers[one] == speakers[other]) == (other in reach[one])


def test_folders_tell_who_speaks_where_no_trial_contradicts_them() -> None:
    pairs = [Pair(True, "a/1", "a/2"), Pair(False, "a/1", "b/1"), Pair(False, "b/2", "c/1")]
    by_folder = speakers_of(pairs)
    assert by_folder.by == FOLDERS
    assert by_folder.of == {name: name[0] for name in ("a/1", "a/2", "b/1", "b/2", "c/1")}
    for contradiction in (Pair(True, "a/1", "b/1"), Pair(False, "a/1", "a/3")):
        by_targets = speakers_of([pairs[0], pairs[2], contradiction])
        assert by_targets.by == TARGETS
        assert by_targets.of["b/2"] != by_targets.of.get("b/1")  # no target trial joins them
    below_one = [Pair(its.target, f"wav/{its.enrolment}", f"wav/{its.test}") for its in pairs]
    assert speakers_of(below_one).by == TARGETS


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1 a.wav b.wav\n2 a.wav c.wav\n", "line 2: '2 a.wav c.wav' is not"),
        ("1 a.wav\n", "line 1"),
        ("1 a.wav b.wav\n", "trials of both labels"),
    ],
)
def test_a_list_that_is_none_is_explained(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(CscError, match=said):
        read_voxceleb(tmp_path / "list.txt")


def test_a_list_leads_nowhere_else(root: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("1 ../x.wav p0/1.wav\n0 p0/0.wav p1/0.wav\n")
    with pytest.raises(CscError, match="leads out of"):
        listed(tmp_path / "list.txt", root, Folder.at(tmp_path), lambda *_: None)


def test_too_few_speakers_are_refused(tmp_path: Path, store: Folder) -> None:
    write_list(tmp_path, speakers=3)
    with pytest.raises(CscError, match=r"has 3 speaker\(s\)"):
        open_source(source(tmp_path, tmp_path / "kept", store))
    few = tmp_path / "few"
    few.mkdir()
    path = write_list(few, speakers=5)
    rows = [f"0 p{other}/0.wav p0/0.wav" for other in range(1, 5)]
    path.write_text(path.read_text() + "\n".join(rows))
    trials, _ = open_source(source(few, tmp_path / "kept", store))
    assert list(trials.conditions) == ["clean"]
    assert "nearly all of its speakers" in trials.skipped["sir_0_db"]
