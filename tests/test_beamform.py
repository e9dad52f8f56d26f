"""Beamforming against plain loops, against what theory says, and where there is nothing to hear."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csc_model.beamform import (
    IDLE_DB,
    LOADING,
    array_ear,
    beamform,
    best_reference,
    by_level,
    covariance,
    filtered,
    mvdr,
    output_snr_db,
    ratio_mask,
    spectrum_of,
    waveform_of,
)
from csc_model.longform import Heard, Voices, separated
from csc_model.losses import si_snr_db
from tests.conftest import voice

VECTORS = torch.eye(3)[:, :2]


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def bins(*shape: int, seed: int = 0) -> Tensor:
    return torch.complex(drawn(*shape, seed=seed), drawn(*shape, seed=seed + 1))


def shares(*shape: int, seed: int = 0) -> Tensor:
    return drawn(*shape, seed=seed).sigmoid()


def plane_waves(sources: Tensor, delays: list[list[float]]) -> Tensor:
    """Return what microphones hear of sources `(source, time)`, delayed by samples: `(source, mic,
    time)`."""
    spectrum = torch.fft.rfft(sources.double())
    turn = torch.fft.rfftfreq(sources.shape[-1], dtype=torch.float64) * -2j * torch.pi
    heard = spectrum.unsqueeze(1) * torch.exp(torch.tensor(delays).unsqueeze(-1) * turn)
    return torch.fft.irfft(heard, sources.shape[-1])


def two_talkers(seconds: float, microphones: int) -> Tensor:
    """Return images `(source, mic, time)` of two voices that come from either side of a line."""
    voices = torch.stack([torch.from_numpy(voice(who, 0, seconds)).double() for who in (0, 5)])
    voices /= voices.square().mean(-1, keepdim=True).sqrt()
    return plane_waves(voices, [[s * 1.7 * mic for mic in range(microphones)] for s in (1, -1)])


@pytest.mark.parametrize("microphones", [1, 2, 5])
def test_it_is_what_plain_loops_over_bins_give(microphones: int) -> None:
    spectrum, mask = bins(microphones, 7, 40), shares(7, 40, seed=3)
    target, noise = covariance(spectrum, mask), covariance(spectrum, 1 - mask)
    filters = mvdr(target, noise)
    snr_db = output_snr_db(filters, target, noise)
    for reference in range(microphones):
        signal = rest = 0.0
        for at, (x, m) in enumerate(
            zip(spectrum.numpy().swapaxes(0, 1), mask.numpy(), strict=True)
        ):
            of_target = sum(m[t] * np.outer(x[:, t], x[:, t].conj()) for t in range(40)) / 40
            of_noise = sum((1 - m[t]) * np.outer(x[:, t], x[:, t].conj()) for t in range(40)) / 40
            loaded = of_noise + LOADING * np.trace(of_noise) * np.eye(microphones)
            product = np.linalg.inv(loaded) @ of_target
            w = (product / np.trace(product))[:, reference]
            np.testing.assert_allclose(filters[at, :, reference], w, atol=1e-6)
            beam = filtered(filters[..., reference], spectrum)[at]
            np.testing.assert_allclose(beam, w.conj() @ x, atol=1e-6)
            signal += (w.conj() @ of_target @ w).real
            rest += (w.conj() @ of_noise @ w).real
        assert snr_db[reference].item() == pytest.approx(10 * np.log10(signal / rest), abs=1e-6)


def test_many_masks_at_once_are_each_of_them_alone() -> None:
    spectrum, masks = bins(3, 5, 30), shares(2, 5, 30)
    together = filtered(
        mvdr(covariance(spectrum, masks), covariance(spectrum, 1 - masks))[..., 1], spectrum
    )
    for mask, beam in zip(masks, together, strict=True):
        alone = mvdr(covariance(spectrum, mask), covariance(spectrum, 1 - mask))[..., 1]
        assert torch.allclose(filtered(alone, spectrum), beam)


@pytest.mark.parametrize("refine", [False, True])
def test_many_recordings_at_once_are_each_of_them_alone(refine: bool) -> None:
    mixtures, sources = drawn(2, 3, 2500), drawn(2, 4, 2500, seed=1)
    together = beamform(mixtures, sources, 1, -10, refine)
    assert together.shape == sources.shape
    for mixture, slots, beams in zip(mixtures, sources, together, strict=True):
        assert torch.allclose(beamform(mixture, slots, 1, -10, refine), beams)


def test_filters_have_any_axes_in_front() -> None:
    spectrum, masks = bins(4, 2, 3, 5, 30), shares(4, 2, 5, 30)
    target, noise = covariance(spectrum, masks), covariance(spectrum, 1 - masks)
    filters = mvdr(target, noise)
    beams, snr_db = filtered(filters[..., 0], spectrum), output_snr_db(filters, target, noise)
    for place in itertools.product(range(4), range(2)):
        of_target, of_noise = (covariance(spectrum[place], m[place]) for m in (masks, 1 - masks))
        alone = mvdr(of_target, of_noise)
        assert torch.allclose(filtered(alone[..., 0], spectrum[place]), beams[place])
        assert torch.allclose(output_snr_db(alone, of_target, of_noise), snr_db[place])


@pytest.mark.parametrize("microphones", [1, 2, 4, 8])
def test_white_noise_falls_by_as_many_decibels_as_there_are_microphones(microphones: int) -> None:
    steering = torch.exp(1j * drawn(9, microphones))  # a rank-one target, everywhere as loud
    target = steering.unsqueeze(-1) * steering.conj().unsqueeze(-2)
    noise = 0.1 * torch.eye(microphones, dtype=torch.complex128).expand(9, -1, -1)
    filters = mvdr(target, noise)
    gain_db = output_snr_db(filters, target, noise) - 10 * np.log10(1 / 0.1)
    assert torch.allclose(gain_db, torch.tensor(10 * np.log10(microphones)), atol=1e-3)
    kept = (filters.mH @ steering.unsqueeze(-1)).squeeze(-1)
    assert torch.allclose(kept, steering, atol=1e-9)  # as each reference microphone hears it


@pytest.mark.parametrize("microphones", [2, 4, 8])
def test_ideal_masks_gain_what_theory_says(microphones: int) -> None:
    """Two voices that never share a bin and a frame: one in phase everywhere, one turned by half.

    Their steering vectors are orthogonal, so of the other nothing is left, and that costs none of
    what as many microphones gain over white noise. Frames of neither tell the noise.
    """
    frames = 6000
    whose = torch.randint(3, (4, frames), generator=torch.Generator().manual_seed(0))
    dry = [bins(4, frames, seed=seed) * (whose == seed) for seed in (0, 1)]
    turns = torch.ones(2, microphones)
    turns[1, 1::2] = -1
    voice, other = (
        turn[:, None, None] * one for turn, one in zip(turns.to(dry[0]), dry, strict=True)
    )
    hiss = 0.1 * bins(microphones, 4, frames, seed=7)  # 20 dB below each voice
    spectrum, mask = voice + other + hiss, (whose == 0).double()
    w = mvdr(covariance(spectrum, mask), covariance(spectrum, 1 - mask))[..., 0]

    def level_db(signal: Tensor) -> Tensor:
        return 10 * signal.abs().square().mean().log10()

    gain_db = level_db(filtered(w, voice)) - level_db(filtered(w, hiss))
    gain_db -= level_db(voice[0]) - level_db(hiss[0])
    assert gain_db.item() == pytest.approx(10 * np.log10(microphones), abs=0.1)
    assert level_db(filtered(w, other)) - level_db(other[0]) < -30


def test_two_microphones_null_a_plane_wave_and_leave_the_target_as_it_is() -> None:
    steering, rival = (torch.exp(1j * drawn(20, 2, seed=seed)) for seed in (1, 2))
    target, noise = (one.unsqueeze(-1) * one.conj().unsqueeze(-2) for one in (steering, rival))
    w = mvdr(target, noise, loading=1e-9)[..., 0]
    assert torch.allclose((w.conj() * steering).sum(-1), steering[:, 0], atol=1e-6)
    assert (w.conj() * rival).sum(-1).abs().max() < 1e-4


def test_voices_from_two_sides_are_told_apart_by_their_masks() -> None:
    images = two_talkers(4.0, 4)
    mixture, alone = images.sum(0), images[:, 0]
    beams = beamform(mixture, alone, reference=0)
    gain_db = si_snr_db(beams, alone) - si_snr_db(mixture[0].expand_as(alone), alone)
    assert gain_db.min() > 10


@given(st.integers(1, 5000), st.integers(1, 3))
@settings(max_examples=8, deadline=None)
def test_the_transform_is_undone_at_any_length(num_samples: int, lines: int) -> None:
    waveforms = drawn(lines, num_samples)
    assert torch.allclose(waveform_of(spectrum_of(waveforms), num_samples), waveforms, atol=1e-9)
    assert torch.equal(spectrum_of(waveforms[0]), spectrum_of(waveforms)[0])


@given(st.integers(0, 99), st.floats(1e-6, 1e6), st.booleans())
@settings(max_examples=8, deadline=None)
def test_the_level_of_the_input_is_that_of_the_output(
    seed: int, scale: float, refine: bool
) -> None:
    mixture, sources = drawn(3, 2500, seed=seed), drawn(2, 2500, seed=seed + 1)
    once = beamform(mixture, sources, 1, -10, refine)
    scaled = beamform(scale * mixture, scale * sources, 1, -10, refine)
    assert torch.allclose(scaled / scale, once, atol=1e-9)


@given(st.integers(0, 99), st.permutations(range(4)), st.integers(0, 3), st.booleans())
@settings(max_examples=8, deadline=None)
def test_the_order_of_the_microphones_means_nothing(
    seed: int, order: list[int], reference: int, refine: bool
) -> None:
    mixture, sources = drawn(4, 2500, seed=seed), drawn(2, 2500, seed=seed + 1)
    expected = beamform(mixture, sources, reference, refine=refine)
    found = beamform(mixture[order], sources, order.index(reference), refine=refine)
    assert torch.allclose(found, expected, atol=1e-8)


@given(st.integers(0, 99), st.integers(0, 3), st.booleans())
@settings(max_examples=8, deadline=None)
def test_a_dead_microphone_changes_nothing(seed: int, place: int, refine: bool) -> None:
    mixture, sources = drawn(3, 2500, seed=seed), drawn(2, 2500, seed=seed + 1)
    dead = torch.cat([mixture[:place], torch.zeros(1, 2500), mixture[place:]])
    alive = 1 + (place <= 1)
    expected = beamform(mixture, sources, 1, refine=refine)
    assert torch.allclose(beamform(dead, sources, alive, refine=refine), expected, atol=1e-8)
    best = best_reference(mixture, sources, 1)
    assert best_reference(dead, sources, alive) == best + (place <= best)


@pytest.mark.parametrize(
    "mixture",
    [
        torch.zeros(3, 4000),
        drawn(1, 4000).expand(2, -1),
        drawn(1, 4000),
        torch.cat([drawn(1, 2000), torch.zeros(1, 2000)], 1) * torch.tensor([[1.0], [-2.0]]),
        torch.sin(torch.arange(4000) / 5).double() * torch.tensor([[1.0], [0.5], [0.0]]),
    ],
    ids=["silence", "twice the same", "one", "half of it silent", "a tone, and a dead channel"],
)
@pytest.mark.parametrize("refine", [False, True])
@pytest.mark.parametrize("heard", ["all", "nothing", "half"])
def test_there_is_an_answer_where_there_is_little_to_hear(
    mixture: Tensor, heard: str, refine: bool
) -> None:
    share = {"all": 1.0, "nothing": 0.0, "half": 0.5}[heard]
    beam = beamform(mixture, share * mixture[:1], 0, refine=refine)
    assert beam.isfinite().all()
    expected = mixture[:1] if share else torch.zeros(1, 4000)
    assert torch.allclose(beam, expected.double(), atol=1e-6)


def test_one_microphone_gives_what_it_hears_and_the_mask_weighs_it() -> None:
    mixture, sources = drawn(1, 5000), 0.7 * drawn(2, 5000, seed=4)
    assert torch.allclose(beamform(mixture, sources, 0), mixture.expand(2, -1), atol=1e-9)
    assert torch.allclose(beamform(mixture, sources, 0, 0.0), mixture.expand(2, -1), atol=1e-9)
    spectrum = spectrum_of(mixture)
    mask = ratio_mask(spectrum_of(sources), spectrum)
    for floor_db, floor in ((-20.0, 0.1), (-torch.inf, 0.0)):
        weighed = waveform_of(spectrum * mask.clamp_min(floor), 5000)
        assert torch.allclose(beamform(mixture, sources, 0, floor_db), weighed, atol=1e-9)


def test_a_mask_is_the_share_of_power_and_nothing_where_nothing_is() -> None:
    source, rest = bins(4, 9), 3 * bins(4, 9, seed=2)
    source[0], rest[:2] = 0, 0
    mask = ratio_mask(source, source + rest)
    power = source.abs() ** 2
    assert torch.allclose(mask[2:], (power / (power + rest.abs() ** 2))[2:])
    assert torch.equal(mask[:2], torch.tensor([[0.0], [1.0]]).double().expand(2, 9))


def test_the_reference_is_where_the_voice_is_clearest() -> None:
    """Microphones whose noise differs by 20 dB; of two voices, it is the one good for both."""
    voices = two_talkers(2.0, 3)
    noise = drawn(3, voices.shape[-1]) * torch.tensor([[1.0], [0.1], [1.0]])
    near = voices.clone()
    near[0, 2] *= 10  # one stands at the last microphone
    mixture, heard = near.sum(0) + noise, near[:, 1]
    assert best_reference(voices[0] + noise, voices[:1, 0], 0) == 1
    assert best_reference(mixture, heard[:1], 1) == 2
    assert best_reference(mixture, heard[1:], 1) == 1
    assert best_reference(mixture, heard, 1) == 1


def test_a_slot_in_which_nobody_speaks_has_no_say_in_the_reference() -> None:
    """One talker, the first microphone clean; in the other slot some noise, at -44 dB."""
    image = two_talkers(2.0, 3)[0]
    mixture = image + drawn(3, image.shape[-1], seed=5) * torch.tensor([[0.01], [0.1], [0.1]])
    left = 10 ** (-44 / 20) * drawn(image.shape[-1], seed=9)
    sources = torch.stack([image[1], left])
    assert best_reference(mixture, sources, 1, torch.tensor([True, False])) == 0
    everybody = best_reference(mixture, sources, 1)
    assert best_reference(mixture, sources, 1, torch.tensor([False, False])) == everybody != 0


def test_a_slot_in_which_nobody_speaks_stays_as_quiet_as_it_is() -> None:
    mixture = drawn(2, 5000).float()
    sources = torch.stack([mixture[0], 0.01 * mixture[0]])
    heard = Heard(sources, VECTORS, torch.tensor([0.9, 0.1, 1.0]))
    found = array_ear(lambda _: heard, 0)(mixture.T)
    assert torch.equal(found.sources[1], sources[1])  # a beam would have the mixture's level
    assert not torch.equal(found.sources[0], sources[0])


def test_where_activity_tells_nothing_the_level_does() -> None:
    levels_db = torch.tensor([0.0, IDLE_DB + 1, IDLE_DB - 1, -torch.inf])
    mixture = drawn(5000).float()
    sources = 10 ** (levels_db / 20).unsqueeze(-1) * mixture
    same = Heard(sources, torch.eye(5)[:, :2], torch.full((5,), 0.95))
    assert by_level(lambda _: same)(mixture).activity.tolist() == [1, 1, 0, 0, 1]
    silent = same._replace(sources=0 * sources)
    assert by_level(lambda _: silent)(mixture).activity.tolist() == [0, 0, 0, 0, 1]


def test_hours_go_by_windows_and_slots_stay_what_they_are() -> None:
    """A separator that gives its slots in another order for each window, and 6 windows."""
    images = two_talkers(7.0, 3)
    mixture, alone = images.sum(0).float(), images[:, 0].float()
    starts, orders = itertools.count(step=16_000), itertools.cycle([[0, 1], [1, 0], [1, 0]])

    def hear(window: Tensor) -> Heard:
        assert window.ndim == 1
        start = next(starts)
        order = next(orders)
        assert torch.equal(window, mixture[0, start : start + 32_000])
        sources = alone[order, start : start + 32_000]
        return Heard(sources, VECTORS[[*order, 2]], torch.ones(3))

    pieces = separated(array_ear(hear, 0), mixture.T, 32_000, Voices())
    found = torch.cat(list(pieces), -1)
    assert found.shape == alone.shape
    gain_db = si_snr_db(found, alone) - si_snr_db(mixture[0].expand_as(alone), alone)
    assert gain_db.min() > 10
