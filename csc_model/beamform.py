"""Beamforming by masks: an array of microphones, with a model that was trained on single channels.

The model hears one microphone, the reference. What it separates there becomes a mask of time and
frequency, which is taken for all of them; the mask gives the spatial covariances of a voice and of
all else, and these the filter of an MVDR beamformer (Souden et al., 2010). Erdogan et al. (2016,
"Improved MVDR beamforming using single-channel mask prediction networks") have the plan, and UIMVDR
(arXiv 2406.06310) that such a network needs no array to be trained. The Fourier transform is this
module's own, whatever front end the model has. That masks are refined by directions on the way is
neither's: a model that hears one microphone confuses what an array tells apart.

All is computed in double precision: covariances of close microphones are nearly singular.
"""

import torch
from torch import Tensor

from csc_model.longform import Hear, Heard
from csc_model.model import ACTIVE
from csc_model.spatial import refined

SIZE, HOP = 2048, 512
"""Samples of the Fourier transform: 128 ms at 16 kHz, into which a room's early echoes fit."""

LOADING = 2e-4
"""What is added to the diagonal of the noise's covariance, relative to its trace."""

IDLE_DB = -10.0
"""Level over a window's loudest slot below which a slot is idle, where nothing else tells."""


def spectrum_of(waveforms: Tensor) -> Tensor:
    """Return the transform `(..., bin, frame)`, complex128, of waveforms `(..., time)`."""
    lines = waveforms.double().reshape(-1, waveforms.shape[-1])
    spectrum = torch.stft(
        lines,
        SIZE,
        HOP,
        window=_window(lines.device),
        center=True,
        pad_mode="constant",
        return_complex=True,
    )
    return spectrum.unflatten(0, waveforms.shape[:-1]) if waveforms.ndim > 1 else spectrum[0]


def waveform_of(spectrum: Tensor, num_samples: int) -> Tensor:
    """Undo `spectrum_of`: `(..., num_samples)` in double precision."""
    lines = spectrum.reshape(-1, *spectrum.shape[-2:])
    window = _window(spectrum.device)
    waveforms = torch.istft(lines, SIZE, HOP, window=window, center=True, length=num_samples)
    return waveforms.reshape(*spectrum.shape[:-2], num_samples)


def _window(device: torch.device) -> Tensor:
    return torch.hann_window(SIZE, dtype=torch.float64, device=device).sqrt()


def ratio_mask(source: Tensor, mixture: Tensor) -> Tensor:
    """Return the mask `(..., bin, frame)` of a source, |S|^2 / (|S|^2 + |X - S|^2), from spectra.

    Of powers, not of magnitudes: covariances are powers, and what a voice hardly has a part in
    then hardly counts. Where there is nothing, the mask is 0.
    """
    power, rest = _power(source), _power(mixture - source)
    return torch.where(power > 0, power / (power + rest), 0.0)


def _power(spectrum: Tensor) -> Tensor:
    return torch.view_as_real(spectrum).square().sum(-1)


def covariance(spectrum: Tensor, mask: Tensor) -> Tensor:
    """Return the covariances `(..., bin, mic, mic)` of what a mask lets through.

    `spectrum` is `(..., mic, bin, frame)`, `mask` `(..., bin, frame)`; axes in front broadcast.
    They are means over all frames, not over those that the mask lets through: so the energies of
    bins compare.
    """
    by_bin = spectrum.transpose(-3, -2)
    return (mask.unsqueeze(-2) * by_bin) @ by_bin.mH / spectrum.shape[-1]


def mvdr(target: Tensor, noise: Tensor, loading: float = LOADING) -> Tensor:
    """Return the filters `(..., bin, mic, reference)`, one for each reference microphone.

    `target` and `noise` are covariances `(..., bin, mic, mic)`. Column r is that of Souden et al.,
    `(inv(noise) target / trace(inv(noise) target)) u_r`: it gives the target as microphone r hears
    it. A bin without noise has white noise instead, one without a target is filtered out. What a
    microphone is silent in takes no part, and neither its place nor its presence changes the rest.
    """
    level = loading * _trace(noise)
    level = torch.where(level > 0, level, 1.0)
    eye = torch.eye(noise.shape[-1], dtype=noise.dtype, device=noise.device)
    ratio = torch.linalg.solve(noise + level[..., None, None] * eye, target)
    gain = _trace(ratio)
    filters = ratio / torch.where(gain > 0, gain, 1.0)[..., None, None]
    return torch.where((gain > 0)[..., None, None], filters, 0.0)


def _trace(matrices: Tensor) -> Tensor:
    return matrices.diagonal(dim1=-2, dim2=-1).real.sum(-1)


def output_snr_db(filters: Tensor, target: Tensor, noise: Tensor) -> Tensor:
    """Return the SNR in dB that filters leave, `(..., reference)`; shapes as in `mvdr`.

    The estimate by which Erdogan et al. (2016) choose the reference microphone: the energies of
    both over all bins, `w^H target w` over `w^H noise w`. From -300 dB, which is no target, to 300.
    """
    signal, rest = (
        (filters.conj() * (matrices @ filters)).real.sum((-3, -2)) for matrices in (target, noise)
    )
    ratio = signal / rest.clamp_min(torch.finfo(rest.dtype).tiny)
    return 10 * ratio.clamp(1e-30, 1e30).log10()


def filtered(filters: Tensor, spectrum: Tensor) -> Tensor:
    """Apply filters `(..., bin, mic)` to `(..., mic, bin, frame)`: `w^H x`, `(..., bin, frame)`."""
    return (filters.conj().unsqueeze(-2) @ spectrum.transpose(-3, -2)).squeeze(-2)


def _covariances(spectrum: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    return covariance(spectrum, masks), covariance(spectrum, 1 - masks)


def speaking(activity: Tensor) -> Tensor:
    """Return which slots somebody speaks in, `(slot,)`, by the activity of all views."""
    return activity[:-1] >= ACTIVE


def best_reference(
    mixture: Tensor, sources: Tensor, heard: int, speaks: Tensor | None = None
) -> int:
    """Return the microphone with the best output SNR in dB, in the mean over the sources.

    `sources` `(slot, time)` were separated from microphone `heard` of `mixture` `(mic, time)`. With
    `speaks` `(slot,)`, those count in which somebody does, if there are any: what is left in an
    idle slot may be clearest anywhere. UIMVDR does not choose: it always takes the first.
    """
    if speaks is not None and speaks.any():
        sources = sources[speaks]
    spectrum = spectrum_of(mixture)
    target, noise = _covariances(spectrum, ratio_mask(spectrum_of(sources), spectrum[heard]))
    return int(output_snr_db(mvdr(target, noise), target, noise).mean(0).argmax())


def masks_of(spectrum: Tensor, sources: Tensor, reference: int, refine: bool) -> Tensor:
    """Return the masks `(..., slot, bin, frame)` of sources `(..., slot, time)` in an array.

    `spectrum` is `(..., mic, bin, frame)`. Those of the reference microphone alone, or refined by
    directions, with all that is no source's as one more class.
    """
    voices, heard = spectrum_of(sources), spectrum[..., reference, :, :].unsqueeze(-3)
    if not refine:
        return ratio_mask(voices, heard)
    rest = heard - voices.sum(-3, keepdim=True)
    return refined(spectrum, _power(torch.cat([voices, rest], -3)))[..., :-1, :, :]


def beamform(
    mixture: Tensor,
    sources: Tensor,
    reference: int,
    floor_db: float | None = None,
    refine: bool = False,
) -> Tensor:
    """Return each source `(..., slot, time)` as the reference microphone hears it, beamformed.

    `sources` `(..., slot, time)` were separated from microphone `reference` of `mixture`
    `(..., mic, time)`; axes in front are recordings. Masks are refined by directions, or stay as
    the model gave them. With `floor_db`, the mask of a source weighs its beam once more, by that
    gain in dB at least: 0 weighs nothing, minus infinity all, as UIMVDR does.
    """
    spectrum = spectrum_of(mixture)
    masks = masks_of(spectrum, sources, reference, refine)
    spectrum = spectrum.unsqueeze(-4)  # (..., 1, mic, bin, frame), for all slots
    beams = filtered(mvdr(*_covariances(spectrum, masks))[..., reference], spectrum)
    if floor_db is not None:
        beams = beams * masks.clamp_min(10 ** (floor_db / 20))
    return waveform_of(beams, mixture.shape[-1])


def array_ear(
    hear: Hear, reference: int, floor_db: float | None = None, refine: bool = False
) -> Hear:
    """Return what hears windows `(time, mic)`: with it, `longform` takes hours of an array.

    `hear` hears the reference microphone; its sources are beamformed, with covariances of this
    window alone, as speakers move. A slot in which nobody speaks stays as it is, nearly silent: a
    beam has the level of what it points at, however little of that was separated.
    """

    def heard(window: Tensor) -> Heard:
        found = hear(window[:, reference])
        speaks = speaking(found.activity)
        if not speaks.any():
            return found
        sources, mixture = found.sources.clone(), window.T.to(found.sources.device)
        beams = beamform(mixture, sources[speaks], reference, floor_db, refine)
        sources[speaks] = beams.to(sources.dtype)
        return found._replace(sources=sources)

    return heard


def by_level(hear: Hear) -> Hear:
    """Return what hears as `hear` does, with the activity of each slot as its level tells it.

    For a separator that was never trained to tell who speaks: 1 for the loudest slot of a window
    and those from `IDLE_DB` on, else 0. A guess, as spare slots may be louder and voices quieter:
    of a voice that is missed its slot stays as it was separated, whereas a beam for nobody would be
    as loud as whoever it points at.
    """

    def heard(window: Tensor) -> Heard:
        found = hear(window)
        power = found.sources.square().mean(-1)
        loud = (power > 0) & (power >= 10 ** (IDLE_DB / 10) * power.max())
        return found._replace(activity=torch.cat([loud.to(power), torch.ones_like(power[:1])]))

    return heard
