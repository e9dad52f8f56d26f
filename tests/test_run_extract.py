"""`csc extract`: the answer of the model, whatever the file, or a clear message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from csc_model.model import CSC
from csc_model.streaming import CONTEXT_S, Pace
from jobs.config import Config
from jobs.extracting import Energy, levels_db
from jobs.finetune import begin_model
from jobs.stepper import new_objective
from jobs.validation import Validator
from pipeline.audio import load
from pipeline.loader import EpisodeLoader
from pipeline.storage import Folder
from tests import whole_run
from tests.conftest import voice
from tests.small_models import new_model

Ask = Callable[..., tuple[int, str]]


def in_folder(folder: Path, model: CSC) -> Path:
    """Write a model as a registered version holds it."""
    model.save(folder / "model")
    (folder / "evaluation").mkdir()
    calibration = {"calibration": {"scale": 5.0, "offset": -1.0}}
    (folder / "evaluation" / "index.json").write_text(json.dumps(calibration))
    return folder


@pytest.fixture
def extractor(tmp_path: Path) -> CSC:
    made = new_model("tcn-stft", extractor="film")
    with torch.no_grad():  # which at first heeds nobody
        made.extractor.early.told.weight.normal_()
    in_folder(tmp_path / "version", made)
    return made


@pytest.fixture
def ask(extractor: CSC, tmp_path: Path) -> Ask:
    del extractor

    def asked(mixture: Path, *more: object) -> tuple[int, str]:
        words = ("--model", tmp_path / "version", "--out", tmp_path / "out" / "voice.wav")
        return whole_run.ask("extract", tmp_path / "none", mixture, *words, *more)

    return asked


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    return written(tmp_path / "both.wav", voice(0, 0, 3.0) + 0.5 * voice(5, 0, 3.0))


@pytest.fixture
def clean(tmp_path: Path) -> Path:
    return written(tmp_path / "clean.wav", voice(5, 1, 2.0))


def written(path: Path, samples: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]") -> Path:
    soundfile.write(path, samples / max(1, np.abs(samples).max()), 16_000, subtype="FLOAT")
    return path


def test_what_is_written_is_what_the_model_lets_through(
    ask: Ask, extractor: CSC, mixture: Path, clean: Path, tmp_path: Path
) -> None:
    other = written(tmp_path / "other.wav", voice(5, 0, 1.0))
    code, said = ask(mixture, "--speaker", clean, "--speaker", other)
    assert code == 0, said
    assert "3.0 s" in said
    found, rate_hz = soundfile.read(tmp_path / "out" / "voice.wav")
    enrolled = [torch.from_numpy(load(path)) for path in (clean, other)]
    expected = extractor.extract(torch.from_numpy(load(mixture)), enrolled).numpy()
    assert rate_hz == 16_000
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(expected).max() > 0


def test_long_files_are_heard_in_stretches_of_any_length(
    ask: Ask, extractor: CSC, mixture: Path, clean: Path, tmp_path: Path
) -> None:
    """Where every stretch is all of the file, the answer is the same to the bit.

    Else it is only near: the level and the features of a stretch are normed over that stretch. It
    is what the model gives in such stretches all the same.
    """

    def heard(chunk_s: float, look_ahead_s: float) -> "np.ndarray[tuple[int], np.dtype[np.int16]]":
        pace = ("--chunk", chunk_s, "--look-ahead", look_ahead_s)
        code, said = ask(mixture, "--speaker", clean, *pace)
        assert code == 0, said
        return soundfile.read(tmp_path / "out" / "voice.wav", dtype="int16")[0]

    whole, parts = heard(8.0, 4.0), heard(0.5, 0.25)
    assert np.array_equal(heard(0.5, 2.5), whole)
    vector = extractor.embed(torch.from_numpy(load(clean)))[0][-1]
    blocks, pace = [torch.from_numpy(load(mixture))], Pace.of(16_000, CONTEXT_S, 0.5, 0.25)
    expected = torch.cat(list(extractor.extracting(vector, blocks, pace))).numpy()
    np.testing.assert_allclose(parts / 32768, expected, atol=1e-4)
    error = (parts - whole.astype(np.float64)) / 32768
    assert 0 < np.mean(error**2) < 10 ** (-25 / 10) * np.mean((whole / 32768) ** 2)


def letting_through(folder: Path, share: float) -> Path:
    """Write a model whose extractor lets an upper share of the frequencies through, no more."""
    made = new_model("tcn-stft", extractor="film")
    last = made.extractor.weights[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias[:] = -20.0
        last.bias[round((1 - share) * len(last.bias)) :] = 20.0
    return in_folder(folder, made)


@pytest.mark.parametrize(("share", "speaks"), [(0.5, True), (0.0, False)])
def test_who_speaks_for_some_seconds_of_a_minute_is_heard(
    ask: Ask, clean: Path, tmp_path: Path, share: float, speaks: bool
) -> None:
    """Somebody low all the time; who is asked for is high, lower by 10 dB, and heard for 3 s."""
    at = 2 * np.pi * np.arange(60 * 16_000) / 16_000
    both = np.sin(400 * at)
    both[500_000:548_000] += 0.3 * np.sin(6000 * at[:48_000])
    file = written(tmp_path / "minute.wav", both.astype(np.float32) / 2)
    model = letting_through(tmp_path / "letting", share)
    code, said = ask(file, "--speaker", clean, "--model", model)
    assert code == (0 if speaks else 3), said
    assert ("does not seem to speak in it" in said) != speaks
    assert ("60.0 s, -23.5 dB over the recording" in said) == speaks
    assert soundfile.info(tmp_path / "out" / "voice.wav").frames == 960_000


def test_what_is_no_number_late_in_a_file_is_named_and_nothing_is_left(
    ask: Ask, clean: Path, tmp_path: Path
) -> None:
    samples = voice(0, 0, 40.0).copy()
    samples[round(33.25 * 16_000)] = np.nan
    soundfile.write(tmp_path / "late.wav", samples, 16_000, subtype="FLOAT")
    code, said = ask(tmp_path / "late.wav", "--speaker", clean)
    assert code == 1
    assert "late.wav: not_finite: NaN or infinite samples at second 33.25; give another" in said
    assert not [*(tmp_path / "out").iterdir()]


def of_seconds(levels: list[float]) -> Energy:
    """Return the energy of a signal of constant levels, a second each, in blocks of any size."""
    energy, signal = Energy(), np.repeat(np.float32(levels), 16_000)
    for block in np.split(signal, [7, 70_000, 70_000, 200_003]):
        energy.add(block)
    assert energy.num_samples == len(signal)
    return energy


def test_levels_are_of_all_and_of_the_four_seconds_of_which_most_is_left() -> None:
    heard = of_seconds([1.0] * 18 + [0.001] * 6)
    few = of_seconds([0.0] * 5 + [0.5] * 2 + [0.0] * 11 + [0.001] * 6)  # all of the quiet
    all_db, most_db = levels_db(few, heard)
    assert all_db == pytest.approx(10 * np.log10(2 * 0.25 / 18), abs=1e-3)
    assert most_db == pytest.approx(10 * np.log10(2 * 0.25 / 4), abs=1e-3)
    pause = of_seconds([1.0] * 16 + [0.04] * 4)  # where some noise is let through
    assert levels_db(of_seconds([0.0] * 16 + [0.0126] * 4), pause)[1] < -30


def test_recordings_of_other_rates_and_channels_are_answered(
    ask: Ask, clean: Path, tmp_path: Path
) -> None:
    stereo = np.repeat(np.repeat(voice(0, 0, 1.0), 3)[:, None], 2, 1)
    soundfile.write(tmp_path / "stereo.wav", stereo, 48_000)
    code, said = ask(tmp_path / "stereo.wav", "--speaker", clean)
    assert code == 0, said
    assert soundfile.info(tmp_path / "out" / "voice.wav").frames == 16_000


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        (np.full(16_000, np.nan, np.float32), "not_finite"),
        (np.zeros(16_000, np.float32), "silent: no sample is above -80 dBFS"),
        (np.ones(800, np.float32), "too short: 0.05 s"),
        (np.ones(0, np.float32), "empty"),
    ],
)
def test_what_cannot_be_heard_is_named(
    ask: Ask,
    mixture: Path,
    clean: Path,
    tmp_path: Path,
    samples: "np.ndarray[tuple[int, ...], np.dtype[np.float32]]",
    message: str,
) -> None:
    soundfile.write(tmp_path / "bad.wav", samples, 16_000, subtype="FLOAT")
    for words in ((mixture, "--speaker", tmp_path / "bad.wav"), (tmp_path / "bad.wav",)):
        code, said = ask(*words, *(() if len(words) > 1 else ("--speaker", clean)))
        assert code == 1
        assert "bad.wav" in said
        assert message in said
        assert not (tmp_path / "out" / "voice.wav").exists()


def test_enrolment_by_several_people_is_complained_of(
    ask: Ask, mixture: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code, said = ask(mixture, "--speaker", mixture)  # an untrained head takes all slots for people
    assert code == 0
    assert "2 people seem to speak in it" in said + capfd.readouterr().err


def test_a_model_without_an_extractor_says_how_to_get_one(
    mixture: Path, clean: Path, tmp_path: Path
) -> None:
    plain = in_folder(tmp_path / "plain", new_model("tcn-stft"))
    words = ("--speaker", clean, "--model", plain, "--out", tmp_path / "voice.wav")
    code, said = whole_run.ask("extract", tmp_path / "none", mixture, *words)
    assert code == 1
    assert "has no extractor: train one for it, with train.task=extract" in said


@pytest.mark.parametrize("out", ["voices", ".", "ann.mp3", "folder.wav"])
def test_a_place_that_no_wav_file_can_have_is_told_before_any_work(
    out: str, tmp_path: Path
) -> None:
    for name in ("voices", "folder.wav"):
        (tmp_path / name).mkdir()
    words = ("none.wav", "--speaker", "none.wav", "--model", "none", "--out", tmp_path / out)
    code, said = whole_run.ask("extract", tmp_path / "none", *words)
    assert (code, "give the name of a file that ends in .wav" in said) == (1, True)


@pytest.mark.cluster
def test_an_extractor_is_trained_beside_a_champion_that_stays_as_it_is(workspace: Path) -> None:
    """By csc train, all of it real; what is kept is judged by what extraction gains."""
    uri = "models:/csc-speaker-encoder@champion"
    settings = ("train.task='extract'", f"train.init_from='{uri}'", "model.extractor='film'")
    words = [word for text in (*settings, "train.steps=4") for word in ("--set", text)]
    answer = whole_run.csc("train", workspace, *words)
    assert answer.returncode == 0, answer.stderr
    folders = [Folder.at(path) for path in (workspace / "models").iterdir()]
    (run,) = [folder for folder in folders if folder.exists("base/model.json")]
    index, root = run.read_json("index.json"), Path(run.uri)
    model, base = CSC.load(root), CSC.load(root / "base")
    config = Config.model_validate(index["config"])
    began = new_objective(config, 1).model
    begin_model(began, base)
    after, before = model.state_dict(), began.state_dict()
    moved = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert {name for name, _ in model.extractor.named_parameters("extractor")} <= moved
    assert all(name.startswith("extractor.") for name in moved)
    assert all(torch.equal(after[name], value) for name, value in base.state_dict().items())
    assert (index["steps"], index["best_valid_eer"]) == (4, None)
    valid = EpisodeLoader(whole_run.only(workspace / "mixtures"), "valid", batch_size=8, seed=0)
    found = Validator(config, None, valid, 0, 1).measure(model)
    assert found.improvement_db == pytest.approx(index["best_valid_improvement_db"], abs=1e-3)
    shutil.rmtree(root)
