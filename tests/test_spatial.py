"""Masks are refined by directions: as a plain loop does it, and towards the truth."""

import numpy as np
import pytest
import torch
from torch import Tensor

from csc_model.beamform import spectrum_of
from csc_model.spatial import FLOOR, INDEPENDENT, ITERATIONS, TRUST, refined

pytestmark = pytest.mark.usefixtures("one_thread")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.complex128, generator=draw)


def masks_of(*shape: int, seed: int = 1) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.rand(*shape, dtype=torch.float64, generator=draw).softmax(-3)


def plain(spectrum: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Refine the masks `(class, bin, frame)` bin by bin, class by class, frame by frame."""
    mics, bins, frames = spectrum.shape
    classes, found = len(masks), np.zeros(masks.shape)
    for b in range(bins):
        z = spectrum[:, b] / np.linalg.norm(spectrum[:, b], axis=0)
        prior = TRUST * masks[:, b] / masks[:, b].sum(0) + (1 - TRUST) / classes
        posterior, distance = prior.copy(), np.ones((classes, frames))
        for _ in range(ITERATIONS):
            likelihood = np.zeros((classes, frames))
            for k in range(classes):
                spread = np.zeros((mics, mics), complex)
                for t in range(frames):
                    spread += posterior[k, t] / distance[k, t] * np.outer(z[:, t], z[:, t].conj())
                spread = spread * mics / np.trace(spread).real + FLOOR * np.eye(mics)
                inverse, det = np.linalg.inv(spread), np.linalg.det(spread).real
                for t in range(frames):
                    distance[k, t] = (z[:, t].conj() @ inverse @ z[:, t]).real
                    likelihood[k, t] = 1 / (det * distance[k, t] ** mics)
            posterior = prior * likelihood ** min(1.0, INDEPENDENT / mics)
            posterior /= posterior.sum(0)
        found[:, b] = posterior
    return found


@pytest.mark.parametrize("microphones", [2, 5])
def test_a_plain_loop_finds_the_same(microphones: int) -> None:
    spectrum, masks = drawn(microphones, 4, 12), masks_of(3, 4, 12)
    expected = plain(spectrum.numpy(), masks.numpy())
    np.testing.assert_allclose(refined(spectrum, masks).numpy(), expected, rtol=1e-6, atol=1e-9)


def test_recordings_side_by_side_are_refined_as_each_alone() -> None:
    spectrum, masks = drawn(2, 3, 4, 12), masks_of(2, 2, 4, 12)
    together = refined(spectrum, masks)
    for alone, sounds, given in zip(together, spectrum, masks, strict=True):
        torch.testing.assert_close(alone, refined(sounds, given))


def test_a_silent_microphone_changes_nothing() -> None:
    spectrum, masks = drawn(4, 3, 20), masks_of(2, 3, 20)
    more = torch.cat([spectrum[:1], torch.zeros_like(spectrum[:1]), spectrum[1:]])
    torch.testing.assert_close(refined(more, masks), refined(spectrum, masks))


def test_what_is_silent_is_anybodys_and_nothing_is_nan() -> None:
    spectrum, masks = drawn(3, 4, 10), masks_of(2, 4, 10)
    spectrum[..., 4:6], masks[..., 4:6] = 0, 0
    found = refined(spectrum, masks)
    torch.testing.assert_close(found.sum(-3), torch.ones_like(found[0]))
    assert refined(torch.zeros_like(spectrum), torch.zeros_like(masks)).eq(0.5).all()
    masks[1] = 0
    assert refined(spectrum, masks)[0].eq(1).all()


@pytest.mark.parametrize("microphones", [2, 4, 6])
def test_directions_mend_masks_that_leak(microphones: int) -> None:
    """Two noises that take turns, from two sides, and masks that leak."""
    draw = torch.Generator().manual_seed(2)
    voices = torch.randn(2, 32000, dtype=torch.float64, generator=draw)
    first_speaks = torch.rand(16, generator=draw).repeat_interleave(2000) > 0.5
    voices = voices * torch.stack([first_speaks, ~first_speaks])
    images = torch.stack(
        [
            torch.stack([voice.roll(side * microphone) for microphone in range(microphones)])
            for voice, side in zip(voices, (1, -2), strict=True)
        ]
    )
    first = spectrum_of(images[:, 0]).abs().square()
    true = first / first.sum(0)
    masks = 0.6 * true + 0.4 * true.flip(0)  # 4 of 10 parts leak
    found = refined(spectrum_of(images.sum(0)), masks)
    before, after = ((made - true).abs().mean() for made in (masks, found))
    assert after < 0.4 * before
