"""The commands that use a model, on the champion of a whole run, with good and awkward files."""

import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import torch

import csc_model
from jobs.using import Gallery
from jobs.verify import artifacts_of, champion_of, load_verifier
from pipeline.audio import load
from tests import whole_run
from tests.conftest import voice
from tests.whole_run import PAIR, configured

Ask = Callable[..., tuple[int, str]]


@pytest.fixture
def ask(workspace: Path) -> Ask:
    return lambda name, *words: whole_run.ask(name, workspace, *words)


@pytest.fixture(scope="module")
def champion(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The champion in a folder: sooner loaded than from the registry."""
    config = configured(workspace)
    return artifacts_of(champion_of(config), config, tmp_path_factory.mktemp("champion"))


@pytest.fixture(scope="module")
def gallery(champion: Path, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery with somebody in it."""
    path = tmp_path_factory.mktemp("gallery") / "g.parquet"
    verifier = load_verifier(str(champion), configured(workspace))
    Gallery(path).enrol(verifier, "ann", PAIR[:1])
    return path


def encoder(workspace: Path) -> csc_model.CSC:
    config = configured(workspace)
    return load_verifier(champion_of(config), config).model


@pytest.mark.parametrize("suffix", ["parquet", "npz"])
def test_embed_writes_what_the_model_says(
    ask: Ask, workspace: Path, tmp_path: Path, suffix: str
) -> None:
    out = tmp_path / f"vectors.{suffix}"
    code, said = ask("embed", *PAIR, "--out", out)
    assert code == 0, said
    assert "2 file(s), 6 vectors" in said
    vectors, activity = encoder(workspace).embed(torch.from_numpy(load(PAIR[1])))
    if suffix == "parquet":
        rows = [row for row in pq.read_table(out).to_pylist() if row["path"] == PAIR[1]]
        found = {name: np.array([row[name] for row in rows]) for name in rows[0]}
    else:
        arrays = np.load(out)  # no pickle in it
        found = {name: arrays[name][arrays["path"] == PAIR[1]] for name in arrays.files}
    assert found["view"].tolist() == ["slot-1", "slot-2", "whole"]
    np.testing.assert_allclose(found["vector"], vectors.numpy(), atol=1e-5)
    np.testing.assert_allclose(found["activity"], activity.numpy(), atol=1e-5)


def test_a_file_that_cannot_be_used_does_not_cost_the_others(ask: Ask, tmp_path: Path) -> None:
    out, bad = tmp_path / "some.parquet", tmp_path / "bad.wav"
    bad.write_bytes(b"RIFF")
    code, said = ask("embed", bad, PAIR[0], "--out", out)
    assert code == 1
    assert "bad.wav: unreadable" in said
    rows = pq.read_table(out).to_pylist()
    assert [row["path"] for row in rows] == [str(bad), *[PAIR[0]] * 3]
    assert rows[0]["vector"] is None
    assert "unreadable" in rows[0]["error"]


def test_a_device_that_is_not_there_is_named(ask: Ask, tmp_path: Path) -> None:
    code, said = ask("embed", PAIR[0], "--out", tmp_path / "v.npz", "--device", "gpu")
    assert code == 1
    assert "--device gpu:" in said


def test_an_output_of_another_kind_is_refused(ask: Ask, tmp_path: Path) -> None:
    code, said = ask("embed", PAIR[0], "--out", tmp_path / "vectors.csv")
    assert code == 1
    assert "ends in .parquet or .npz" in said


def test_separate_writes_a_file_for_each_voice(ask: Ask, workspace: Path, tmp_path: Path) -> None:
    mixture = tmp_path / "both.wav"
    mixed = voice(0, 0, 3.0) + voice(5, 0, 3.0)
    soundfile.write(mixture, mixed / np.abs(mixed).max(), 16_000, subtype="FLOAT")
    code, said = ask("separate", mixture, "--out", tmp_path / "voices")
    assert code == 0, said
    assert said.count("somebody speaks with probability") == 2
    expected = encoder(workspace).separate(torch.from_numpy(load(mixture))).numpy()
    expected /= max(1, np.abs(expected).max())
    for number in (1, 2):
        path = tmp_path / "voices" / f"both-slot-{number}.wav"
        assert soundfile.info(path).samplerate == 16_000
        np.testing.assert_allclose(soundfile.read(path)[0], expected[number - 1], atol=1e-4)


def test_a_model_alone_does_all_but_what_scores_are_needed_for(
    ask: Ask, champion: Path, tmp_path: Path
) -> None:
    """A training leaves a folder with a model, before anybody has evaluated it."""
    alone = ("--model", champion / "model")
    assert ask("separate", PAIR[0], "--out", tmp_path / "voices", *alone)[0] == 0
    assert ask("embed", PAIR[0], "--out", tmp_path / "alone.npz", *alone)[0] == 0
    assert ask("embed", PAIR[0], "--out", tmp_path / "champion.npz")[0] == 0
    one, other = (np.load(tmp_path / f"{name}.npz")["vector"] for name in ("alone", "champion"))
    assert np.array_equal(one, other)
    code, said = ask("enrol", "ann", PAIR[0], "--gallery", tmp_path / "g.parquet", *alone)
    assert (code, "without its `evaluation`" in said) == (1, True)


def test_who_is_enrolled_is_identified(ask: Ask, tmp_path: Path) -> None:
    gallery = ("--gallery", tmp_path / "people.parquet")
    code, said = ask("identify", PAIR[0], *gallery)
    assert code == 1
    assert "nobody is enrolled" in said
    other = tmp_path / "other.wav"
    soundfile.write(other, voice(7, 0), 16_000)
    for name, files in (("ann", PAIR), ("bob", [str(other)])):
        code, said = ask("enrol", name, *files, *gallery)
        assert code == 0, said
        assert f"{name} is enrolled in" in said
    assert "bob is enrolled anew" in ask("enrol", "bob", other, *gallery)[1]
    code, said = ask("identify", other, *gallery)
    first, second = (line for line in said.splitlines() if "ann" in line or "bob" in line)
    assert code == 0
    assert "bob" in first
    assert "yes" in first
    assert "1.000" in first or "0.99" in first  # it is the very recording
    assert "ann" in second


PUT = """
import sys
from pathlib import Path
from jobs.using import Gallery

gallery, who = Gallery(Path(sys.argv[1])), sys.argv[2]
print("ready", flush=True)
input()
for number in range(40):
    gallery.put({"name": f"{who}{number}", "model": "m", "files": ["f"], "vector": [1.0]})
"""


def test_two_who_enrol_at_once_lose_nobody(tmp_path: Path) -> None:
    path = tmp_path / "people" / "gallery.parquet"
    words = [sys.executable, "-c", PUT, str(path)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with ExitStack() as running:
        both = [running.enter_context(subprocess.Popen([*words, who], **pipes)) for who in "ab"]
        for process in both:
            assert process.stdout.readline() == "ready\n"
        for process in both:
            process.stdin.write("\n")
            process.stdin.flush()
        assert [process.wait(60) for process in both] == [0, 0]
    names = Gallery(path).read()["name"].to_pylist()
    assert sorted(names) == sorted(f"{who}{number}" for who in "ab" for number in range(40))


def test_vectors_of_another_model_are_not_compared(
    ask: Ask, workspace: Path, tmp_path: Path
) -> None:
    gallery = tmp_path / "people.parquet"
    ask("enrol", "ann", PAIR[0], "--gallery", gallery)
    table = pq.read_table(gallery)
    place = table.column_names.index("model")
    pq.write_table(table.set_column(place, "model", [["another"]]), gallery)
    code, said = ask("identify", PAIR[0], "--gallery", gallery)
    assert code == 1
    assert "ann in" in said
    assert "enrolled with another model" in said
    ask("embed", PAIR[0], "--out", tmp_path / "vectors.parquet")
    code, said = ask("enrol", "bob", PAIR[0], "--gallery", tmp_path / "vectors.parquet")
    assert code == 1
    assert "vectors.parquet is no gallery" in said
    assert len(pq.read_table(tmp_path / "vectors.parquet")) == 3  # and stays what it was
    gallery.write_bytes(b"no parquet")
    assert "is no gallery" in ask("identify", PAIR[0], "--gallery", gallery)[1]


def test_a_model_is_used_with_as_many_threads_as_are_configured(
    workspace: Path, champion: Path
) -> None:
    config, before = configured(workspace), torch.get_num_threads()
    try:
        for threads in (2, 1):
            train = config.train.model_copy(update={"threads": threads})
            load_verifier(str(champion), config.model_copy(update={"train": train}))
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_what_onnx_cannot_say_is_named(ask: Ask, tmp_path: Path) -> None:
    code, said = ask("onnx", "--out", tmp_path / "model.onnx")
    assert code == 1
    assert "frontend conv with trunk galr cannot be exported" in said


@pytest.mark.parametrize("format_", ["WAV", "MP3", "OGG"])
def test_verify_answers_for_any_format(ask: Ask, tmp_path: Path, format_: str) -> None:
    samples, rate_hz = soundfile.read(PAIR[1])
    other = tmp_path / f"b.{format_.lower()}"
    soundfile.write(other, np.stack([samples, samples], 1), rate_hz, format=format_)
    code, said = ask("verify", PAIR[1], other)
    assert code == 0, said
    assert "same speaker" in said
    assert float(re.search(r"score (-?[\d.]+)", said)[1]) > 0.9  # type: ignore[index]
    assert float(re.search(r"probability ([\d.]+)%", said)[1]) > 50  # type: ignore[index]


def test_there_may_be_no_model_yet(tmp_path: Path) -> None:
    code, said = whole_run.ask("verify", tmp_path / "nothing", *PAIR)
    assert code == 1
    assert "has no model yet" in said


def write(path: Path, samples: np.ndarray, rate_hz: int = 16_000) -> Path:
    soundfile.write(path, samples, rate_hz, subtype="FLOAT")
    return path


COMMANDS: dict[str, Callable[[Path, Path, Path], Sequence[object]]] = {
    "embed": lambda file, to, _: ["embed", file, "--out", to / "v.parquet"],
    "separate": lambda file, to, _: ["separate", file, "--out", to / "voices"],
    "enrol": lambda file, to, _: ["enrol", "bob", file, "--gallery", to / "g.parquet"],
    "identify": lambda file, _, people: ["identify", file, "--gallery", people],
    "verify": lambda file, *_: ["verify", PAIR[0], file],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: np.zeros(0, np.float32), "awkward.wav: empty"),
        (lambda: np.zeros(16_000, np.float32), "silent"),
        (lambda: voice(0, 0, 0.05), "too short"),
        (lambda: np.full(16_000, np.nan, np.float32), "awkward.wav"),
    ],
    ids=["empty", "silent", "50 ms", "nan"],
)
def test_what_cannot_be_heard_is_explained(
    ask: Ask,
    champion: Path,
    gallery: Path,
    tmp_path: Path,
    command: str,
    made: Callable[[], np.ndarray],
    said: str,
) -> None:
    file = write(tmp_path / "awkward.wav", made())
    code, answer = ask(*COMMANDS[command](file, tmp_path, gallery), "--model", champion)
    assert code == 1
    assert said in answer
    assert "Traceback" not in answer


@pytest.mark.parametrize("command", COMMANDS)
def test_stereo_and_other_rates_are_heard(
    ask: Ask, champion: Path, gallery: Path, tmp_path: Path, command: str
) -> None:
    spoken = voice(0, 0, 2.0)
    slow = np.stack([spoken[::2], spoken[::2]], 1)
    file = write(tmp_path / "stereo.wav", slow, 8_000)
    code, answer = ask(*COMMANDS[command](file, tmp_path, gallery), "--model", champion)
    assert code in ({0, 3} if command == "identify" else {0}), answer


def test_long_recordings_are_heard_in_windows(ask: Ask, workspace: Path, tmp_path: Path) -> None:
    long = np.concatenate([voice(speaker, 0, 20.0) for speaker in (0, 0, 1)])
    long *= 2 / np.abs(long).max()  # what would clip makes all voices quieter
    file = write(tmp_path / "long.wav", long)
    code, said = ask("separate", file, "--out", tmp_path)
    assert code == 0, said
    expected = encoder(workspace).separate(torch.from_numpy(load(file))).numpy()
    expected /= max(1, np.abs(expected).max())
    for number in (1, 2):
        samples, _ = soundfile.read(tmp_path / f"long-slot-{number}.wav")
        np.testing.assert_allclose(samples, expected[number - 1], atol=1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "long-slot-1.wav",
        "long-slot-2.wav",
        "long.wav",
    ]
    code, said = ask("embed", file, "--out", tmp_path / "v.parquet")
    assert code == 0, said
    assert pq.read_table(tmp_path / "v.parquet")["seconds"][0].as_py() == pytest.approx(60)
