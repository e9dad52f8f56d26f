"""`csc extract`: the answer of the model, whatever the file, or a clear message."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from csc_model.model import CSC
from pipeline.audio import load
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
    ask: Ask, mixture: Path, clean: Path, tmp_path: Path
) -> None:
    ask(mixture, "--speaker", clean)
    whole, _ = soundfile.read(tmp_path / "out" / "voice.wav")
    code, said = ask(mixture, "--speaker", clean, "--chunk", 0.5, "--look-ahead", 0.25)
    assert code == 0, said
    parts, _ = soundfile.read(tmp_path / "out" / "voice.wav")
    assert parts.shape == whole.shape
    assert 10 * np.log10(np.mean((parts - whole) ** 2) / np.mean(whole**2)) < -10


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
