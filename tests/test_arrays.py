"""Arrays in simulated rooms, and `csc beamform` with good and awkward recordings."""

import functools
import itertools
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from csc_model.beamform import array_ear, beamform, spectrum_of, waveform_of
from csc_model.calibration import Calibration
from csc_model.longform import Voices, separated
from csc_model.losses import si_snr_db
from csc_model.model import CSC, WINDOW_S
from pipeline.arrays import ArrayConfig, ArrayRecipe, Geometry, array_images, array_recipe
from pipeline.audio import load_channels
from pipeline.errors import CscError
from pipeline.shards import INDEX
from pipeline.storage import Folder
from tests import whole_run
from tests.conftest import voice
from tests.small_models import new_model
from tests.whole_run import PAIR

GEOMETRIES: tuple[Geometry, ...] = ("linear", "circular", "ad hoc")
Ask = Callable[..., tuple[int, str]]
Samples = NDArray[np.float32]


@given(
    st.integers(0, 1 << 32),
    st.integers(0, 9),
    st.sampled_from(GEOMETRIES),
    st.integers(1, 8),
    st.integers(1, 4),
)
@settings(max_examples=60, deadline=None)
def test_a_room_is_a_function_of_seed_and_index_and_holds_all_that_is_in_it(
    seed: int, index: int, geometry: Geometry, microphones: int, sources: int
) -> None:
    config = ArrayConfig(geometry=geometry, microphones=microphones, sources=sources)
    recipe = array_recipe(seed, index, config)
    assert array_recipe(seed, index, config) == recipe
    assert array_recipe(seed, index + 1, config) != recipe
    assert (len(recipe.microphones_m), len(recipe.sources_m)) == (microphones, sources)
    places = np.array([*recipe.microphones_m, *recipe.sources_m])
    assert (places > 0).all()
    assert (places < np.array(recipe.room_m)).all()
    assert config.rt60_min_s <= recipe.rt60_s <= config.rt60_max_s
    for one, other in itertools.combinations(recipe.sources_m, 2):
        assert np.linalg.norm(np.subtract(one, other)) > 0.2


@pytest.mark.parametrize("geometry", GEOMETRIES)
def test_who_speaks_where_does_not_depend_on_the_array(geometry: Geometry) -> None:
    plain = array_recipe(1, 2, ArrayConfig())
    other = array_recipe(1, 2, ArrayConfig(geometry=geometry, microphones=7))
    assert (other.room_m, other.rt60_s, other.sources_m) == (
        plain.room_m,
        plain.rt60_s,
        plain.sources_m,
    )
    if geometry == "linear":
        assert other.microphones_m[:4] == plain.microphones_m


@pytest.mark.parametrize("geometry", ["linear", "circular"])
def test_neighbours_are_as_far_apart_as_asked(geometry: Geometry) -> None:
    config = ArrayConfig(geometry=geometry, microphones=6, spacing_m=0.04)
    places = np.array(array_recipe(5, 0, config).microphones_m)
    apart = np.linalg.norm(places[:, None] - places, axis=-1) + np.eye(6)
    np.testing.assert_allclose(apart.min(0), 0.04, atol=1e-9)


ROOM = ArrayRecipe(
    "by hand", (4.0, 3.5, 2.6), 0.2, ((2.0, 1.5, 1.2), (2.1, 1.5, 1.2)), ((1.0, 1.0, 1.5),)
)


def test_sound_takes_the_time_it_needs_and_decays_as_asked() -> None:
    click = np.zeros((1, 16_000))
    click[0, 0] = 1
    heard = {rt60_s: array_images(ROOM._replace(rt60_s=rt60_s), click) for rt60_s in (0.2, 0.4)}
    for microphone, place in enumerate(ROOM.microphones_m):
        distance_m = np.linalg.norm(np.subtract(place, ROOM.sources_m[0]))
        direct = int(np.abs(heard[0.2][0, microphone]).argmax())
        assert direct == pytest.approx(distance_m / 343 * 16_000, abs=1)
    for rt60_s, images in heard.items():
        energy = np.square(images[0, 0])[::-1].cumsum()[::-1]
        decay_db = 10 * np.log10(energy / energy[0] + 1e-12)
        from_5_to_25_db = np.diff(np.searchsorted(-decay_db, [5, 25]))[0] / 16_000
        assert 3 * from_5_to_25_db == pytest.approx(rt60_s, rel=0.35)


def test_a_room_sounds_the_same_on_any_number_of_cores() -> None:
    import pyroomacoustics

    dry = voice(0, 0, 1.0)[None].astype(np.float64)
    before, made = pyroomacoustics.constants.get("num_threads"), []
    try:
        for threads in (1, 3):
            pyroomacoustics.constants.set("num_threads", threads)
            made.append(array_images(ROOM, dry))
            assert pyroomacoustics.constants.get("num_threads") == threads
    finally:
        pyroomacoustics.constants.set("num_threads", before)
    assert made[0].shape == (1, 2, 16_000)
    assert made[0].tobytes() == made[1].tobytes()


def test_a_room_that_cannot_be_is_explained() -> None:
    outside = ROOM._replace(sources_m=((9.0, 1.0, 1.0),))
    for room in (outside, ROOM._replace(rt60_s=0.01)):
        with pytest.raises(CscError, match=r"cannot be simulated.*give another room"):
            array_images(room, np.zeros((1, 100)))


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyroomacoustics", None)
    with pytest.raises(CscError, match=r"pip install 'csc\[arrays\]'"):
        array_images(ROOM, np.zeros((1, 100)))


Around = Callable[[int], tuple[Tensor, Tensor]]
"""Of a number of a room: a mixture `(mic, time)`, and its voices at the first `(source, time)`."""


@pytest.fixture(scope="module")
def around() -> Around:
    """Two talkers around six microphones in a dry room, equally loud, and the noise of each."""

    @functools.cache
    def made(index: int) -> tuple[Tensor, Tensor]:
        dry = np.stack([voice(who, index, 4.0) for who in (index, index + 5)]).astype(np.float64)
        config = ArrayConfig(microphones=6, rt60_min_s=0.2, rt60_max_s=0.2)
        images = torch.from_numpy(array_images(array_recipe(2, index, config), dry))
        images /= images[:, :1].square().mean(-1, keepdim=True).sqrt()
        hiss = torch.randn(images.shape[1:], generator=torch.Generator().manual_seed(index)) / 30
        return images.sum(0) + hiss, images[:, 0]

    return made


def mistaken(voices: Tensor) -> Tensor:
    """Return two voices with a tenth of their patches, 250 Hz by 128 ms, given to the other."""
    spectrum = spectrum_of(voices)
    bins, frames = spectrum.shape[-2:]
    draw = torch.Generator().manual_seed(0)
    patches = torch.rand(bins // 32 + 1, frames // 4 + 1, generator=draw) < 0.1
    swapped = patches.repeat_interleave(32, 0).repeat_interleave(4, 1)[:bins, :frames]
    return waveform_of(torch.where(swapped, spectrum.flip(0), spectrum), voices.shape[-1])


def gains_db(around: Around, heard: Callable[[Tensor], Tensor], refine: bool) -> list[float]:
    """Return what 1, 2, 4 and 6 microphones gain over the mixture, the mean over two rooms."""
    gains = []
    for mixture, voices in map(around, (0, 1)):
        before = si_snr_db(mixture[0].expand_as(voices), voices)
        for count in (1, 2, 4, 6):
            beams = beamform(mixture[:count], heard(voices), 0, refine=refine)
            gains.append((si_snr_db(beams, voices) - before).mean())
    return torch.stack(gains).view(2, -1).mean(0).tolist()


@pytest.mark.parametrize(
    ("heard", "refine"), [(torch.clone, False), (mistaken, True)], ids=["oracle", "mistaken"]
)
def test_more_microphones_are_no_worse(
    around: Around, heard: Callable[[Tensor], Tensor], refine: bool
) -> None:
    """With the masks of an oracle, and with those of a model's mistakes, refined by directions."""
    found = gains_db(around, heard, refine)
    assert all(after > one - 0.3 for one, after in itertools.pairwise(found))
    assert found[0] == pytest.approx(0, abs=1e-3)
    assert found[1] > 6


# The command.


def evaluated(to: Path, first_logit: float | None = None) -> Path:
    """Write a small model, as csc evaluate leaves it; its slots are as active as is asked for."""
    model = new_model("tcn-stft")
    if first_logit is not None:
        torch.nn.init.normal_(model.active[-1].weight, std=1e-3)  # as one that was trained
        torch.nn.init.constant_(model.active[-1].bias, first_logit)
    model.save(to / "model")
    calibration = Calibration(scale=10.0, offset=-4.0)._asdict()
    Folder.at(to / "evaluation").put_json(INDEX, {"calibration": calibration})
    return to


@pytest.fixture(scope="module")
def champion(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluated(tmp_path_factory.mktemp("champion"))


@pytest.fixture
def ask(champion: Path, tmp_path: Path) -> Ask:
    """Ask `csc beamform` in this process; a later --model replaces the one that is given here."""

    def asked(*words: object) -> tuple[int, str]:
        return whole_run.ask("beamform", tmp_path / "workspace", "--model", champion, *words)

    return asked


def two_voices(seconds: float, microphones: int) -> Samples:
    """Return `(time, mic)`: two voices, each of which comes later from microphone to microphone."""
    heard = [
        np.roll(voice(0, 0, seconds), mic) + np.roll(voice(5, 0, seconds), -mic)
        for mic in range(microphones)
    ]
    return np.stack(heard, 1) / 4


def write(path: Path, samples: Samples, rate_hz: int = 16_000) -> Path:
    soundfile.write(path, samples, rate_hz, subtype="FLOAT")
    return path


def read(path: Path) -> Samples:
    samples, rate_hz = soundfile.read(path, dtype="float32")
    assert rate_hz == 16_000
    return samples


def test_each_voice_is_what_all_microphones_make_of_it(
    ask: Ask, champion: Path, tmp_path: Path
) -> None:
    """Also of a recording of several windows, with directions heard, and a mask on the beams."""
    heard = two_voices(17.0, 3)
    file = write(tmp_path / "array.wav", heard)
    words = ("--reference", 2, "--post-mask-floor-db", -6)
    code, said = ask(file, "--out", tmp_path / "voices", *words)
    assert code == 0, said
    assert "the reference is microphone 2, as asked" in said
    assert said.count("somebody speaks with probability") == 2
    model = CSC.load(champion / "model")
    with torch.inference_mode():
        window = round(WINDOW_S * 16_000)
        pieces = separated(
            array_ear(model.hear, 1, -6.0, refine=True), torch.from_numpy(heard), window, Voices()
        )
        expected = torch.cat(list(pieces), -1).numpy()
    expected /= max(1, np.abs(expected).max())
    for slot in range(2):
        found = read(tmp_path / "voices" / f"array-slot-{slot + 1}.wav")
        np.testing.assert_allclose(found, expected[slot], atol=1e-4)
    assert len([*(tmp_path / "voices").iterdir()]) == 2  # and nothing is left over


def test_a_dead_microphone_is_named_and_never_the_reference(ask: Ask, tmp_path: Path) -> None:
    heard = two_voices(2.0, 4)
    heard[:, 0] = 0
    file = write(tmp_path / "array.wav", heard)
    code, said = ask(file, "--out", tmp_path)
    assert code == 0, said
    assert "microphone 1 is silent and takes no part" in said
    assert "the reference is microphone 1," not in said
    code, said = ask(file, "--out", tmp_path, "--reference", 1)
    assert code == 1
    assert "no sound comes from microphone 1: take one of 2, 3, 4" in said


@pytest.mark.parametrize("named", ["ann.wav", "voices"])
def test_one_person_s_voice_is_one_of_those_that_are_heard(
    ask: Ask, tmp_path: Path, named: str
) -> None:
    file, to = write(tmp_path / "array.wav", two_voices(3.0, 2)), tmp_path / "to"
    code, said = ask(file, "--speaker", PAIR[0], "--speaker", PAIR[1], "--out", to / named)
    assert code in (0, 3), said
    assert ("does not seem to speak in it" in said) == (code == 3)
    (written,) = (path for path in to.rglob("*") if path.is_file())
    assert written == (to / named if named.endswith(".wav") else to / named / "array-speaker.wav")
    assert ask(file, "--out", tmp_path / "all")[0] == 0
    slot = int(said.partition("slot ")[2][0])
    assert np.array_equal(read(written), read(tmp_path / "all" / f"array-slot-{slot}.wav"))


def test_a_model_alone_separates_and_a_slot_far_below_the_loudest_is_nobody_s(
    ask: Ask, tmp_path: Path
) -> None:
    """One that learned separation alone: its activity is 0.95 in every slot of every window."""
    model = new_model("tcn-stft")
    with torch.no_grad():
        of_second = slice(len(model.mask[-1].bias) // 2, None)
        model.mask[-1].weight[of_second] = 0
        model.mask[-1].bias[of_second] = -6  # masks of 0.0025
    model.save(tmp_path / "alone")
    file = write(tmp_path / "array.wav", two_voices(3.0, 3))
    words = (file, "--model", tmp_path / "alone", "--out", tmp_path / "to")
    code, said = ask(*words)
    assert code == 0, said
    assert "the model does not tell in which slots nobody speaks" in said
    assert "array-slot-1.wav: somebody speaks with probability 100%" in said
    assert "array-slot-2.wav: somebody speaks with probability 0%" in said
    first, second = (read(tmp_path / "to" / f"array-slot-{slot}.wav") for slot in (1, 2))
    assert np.mean(second**2) < 1e-3 * np.mean(first**2)  # a beam would have the first one's level
    code, said = ask(*words, "--speaker", PAIR[0])
    assert (code, "alone is a model without its `evaluation`" in said) == (1, True)


def test_a_disk_without_room_is_told_before_it_is_full(
    ask: Ask, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path / "array.wav", two_voices(3.0, 4))
    used = shutil.disk_usage(tmp_path)
    needed = 3 * 16_000 * (4 * 4 + 2 * 6)  # four channels and two voices in floats, two files
    for free, expected in ((needed - 1, 1), (needed, 0)):
        monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: used._replace(free=free))
        code, said = ask(file, "--out", tmp_path / "to")
        assert code == expected, said
        assert ("4 channels and 2 voices need 0.0 GB of disk at" in said) == (code == 1)
        assert bool([*(tmp_path / "to").iterdir()]) == (code == 0)


def test_other_rates_are_heard_channel_by_channel(ask: Ask, tmp_path: Path) -> None:
    tones = [np.sin(2 * np.pi * hz * np.arange(48_000) / 48_000) for hz in (300, 500, 700)]
    fast = write(tmp_path / "fast.wav", np.stack(tones, 1).astype(np.float32), 48_000)
    samples = np.concatenate([*load_channels(fast)])
    assert samples.shape == (16_000, 3)
    for channel, hz in enumerate((300, 500, 700)):
        assert np.abs(np.fft.rfft(samples[:, channel])).argmax() == hz
    code, said = ask(fast, "--out", tmp_path)
    assert code == 0, said
    assert len(read(tmp_path / "fast-slot-1.wav")) == 16_000


def test_channels_that_come_on_the_way_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "chained.flac"
    parts = []
    for channels in (2, 3):
        soundfile.write(path, np.tile(voice(0, 0, 4.0)[:, None], channels), 16_000)
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    with pytest.raises(CscError, match=r"chained\.flac: unreadable: 2 channels become 3"):
        list(load_channels(path))


def spoilt(value: float) -> Samples:
    heard = two_voices(1.0, 2)
    heard[9_000, 1] = value
    return heard


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: voice(0, 0, 1.0)[:, None], "one channel is no array: csc separate takes it"),
        (
            lambda: two_voices(1.0, 2) * np.float32([1, 0]),
            "only one of its 2 microphones has any sound",
        ),
        (lambda: np.zeros((0, 2), np.float32), "awkward.wav: empty"),
        (lambda: np.zeros((16_000, 2), np.float32), "silent"),
        (lambda: two_voices(0.05, 2), "too short: 0.05 s"),
        (lambda: spoilt(np.nan), "awkward.wav: not_finite: NaN or infinite samples at second 0.56"),
        (lambda: spoilt(np.inf), "awkward.wav: not_finite: NaN or infinite samples at second 0.56"),
    ],
    ids=["mono", "one live", "empty", "silent", "50 ms", "nan", "infinite"],
)
def test_what_is_no_array_is_explained(
    ask: Ask, tmp_path: Path, made: Callable[[], Samples], said: str
) -> None:
    file = write(tmp_path / "awkward.wav", made())
    code, answer = ask(file, "--out", tmp_path / "to")
    assert code == 1
    assert said in answer
    assert not [*(tmp_path / "to").iterdir()]


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (("--out", "voices.wav"), 1, "several voices need a folder"),
        (("--out", "to", "--reference", "4"), 1, "no sound comes from microphone 4"),
        (("--out", "to", "--reference", "0"), 2, "give auto, or a microphone from 1 on"),
        (("--out", "to", "--reference", "first"), 2, "give auto, or a microphone from 1 on"),
        (("--out", "to", "--post-mask-floor-db", "3"), 2, "less than or equal to 0"),
        (("--out", "to", "--post-mask-floor-db", "nan"), 2, "less than or equal to 0"),
    ],
)
def test_what_is_asked_for_in_vain_is_explained(
    ask: Ask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: Sequence[str],
    code: int,
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    file = write(tmp_path / "array.wav", two_voices(1.0, 2))
    answer = ask(file, *words)
    assert answer[0] == code
    assert said in answer[1]


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: np.zeros(16_000, np.float32), "enrolment.wav: silent"),
        (lambda: voice(0, 0, 0.05), "enrolment.wav: too short"),
    ],
    ids=["silent", "too short"],
)
def test_an_enrolment_that_says_nothing_is_named(
    ask: Ask, tmp_path: Path, made: Callable[[], Samples], said: str
) -> None:
    file = write(tmp_path / "array.wav", two_voices(1.0, 2))
    clean = write(tmp_path / "enrolment.wav", made())
    code, answer = ask(file, "--speaker", clean, "--out", tmp_path / "to")
    assert code == 1
    assert said in answer


@pytest.mark.parametrize(("first_logit", "many"), [(3.0, True), (-3.0, False)])
def test_an_enrolment_of_several_people_is_complained_of(
    ask: Ask, tmp_path: Path, capfd: pytest.CaptureFixture[str], first_logit: float, many: bool
) -> None:
    """By the activity of its slots; where no slot of the array is active, no voice is chosen."""
    file = write(tmp_path / "array.wav", two_voices(1.0, 2))
    model = evaluated(tmp_path / "m", first_logit)
    code, said = ask(file, "--speaker", PAIR[0], "--out", tmp_path / "to", "--model", model)
    assert ("2 people seem to speak in it" in said + capfd.readouterr().err) == many
    assert code in ((0, 3) if many else (1,)), said
    assert ("nobody speaks in it" in said) != many
