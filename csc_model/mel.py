"""Log-mel features of a waveform, and the filters they are made with."""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

WINDOW_SECONDS, HOP_SECONDS = 0.025, 0.010
FLOOR = 1e-2  # added to the power of a band: a hundredth of the bands of speech lie below
SPREAD = 3.5  # standard deviation of the logarithms for speech of unit power; their mean is 0.3


@lru_cache
def mel_filters(num_filters: int, fft_size: int, sample_rate_hz: int) -> NDArray[np.float64]:
    """Return triangles of height 1, `(filter, bin)`, evenly spaced from 0 Hz on the HTK mel scale.

    `mel = 2595 log10(1 + f / 700)` (the HTK book); the filters reach up to half the sample rate.
    """
    top = 2595 * np.log10(1 + sample_rate_hz / 2 / 700)
    edges_hz = 700 * (10 ** (np.linspace(0, top, num_filters + 2) / 2595) - 1)
    bins_hz = np.arange(fft_size // 2 + 1) * sample_rate_hz / fft_size
    rising = (bins_hz - edges_hz[:-2, None]) / np.diff(edges_hz)[:-1, None]
    falling = (edges_hz[2:, None] - bins_hz) / np.diff(edges_hz)[1:, None]
    return np.maximum(0, np.minimum(rising, falling))


def unit_level(waveform: Tensor) -> tuple[Tensor, Tensor]:
    """Return the root mean square `(..., 1)`, 1e-5 at least, and the waveform divided by it.

    Clamped before the root is taken, so that silence has a gradient that is a number.
    """
    level = waveform.square().mean(-1, keepdim=True).clamp_min(1e-10).sqrt()
    return level, waveform / level


class LogMel(nn.Module):
    """Log energies of mel bands, 25 ms every 10 ms, for waveforms of unit power.

    Divided by a constant to have about unit variance. Nothing is normalised by utterance: the mean
    of a recording's cepstra tells speakers apart, and taking it away cost more errors than anything
    else that was tried. Frames are padded with zeros until every band has a bin of the Fourier
    transform.
    """

    hann: Tensor
    filters: Tensor

    def __init__(self, num_bands: int, sample_rate_hz: int) -> None:
        super().__init__()
        window = round(WINDOW_SECONDS * sample_rate_hz)
        self.hop = round(HOP_SECONDS * sample_rate_hz)
        self.fft_size = 1 << (window - 1).bit_length()
        while not mel_filters(num_bands, self.fft_size, sample_rate_hz).any(-1).all():
            self.fft_size *= 2
        filters = mel_filters(num_bands, self.fft_size, sample_rate_hz)
        self.register_buffer("hann", torch.hann_window(window), persistent=False)
        self.register_buffer("filters", torch.tensor(filters).float(), persistent=False)

    def forward(self, waveform: Tensor) -> Tensor:
        """Turn `(batch, time)` into `(batch, band, frame)`; a frame is centred on every 10 ms."""
        padded = F.pad(waveform, (0, max(self.fft_size - waveform.shape[-1], 0)))
        with torch.autocast(waveform.device.type, enabled=False):  # quiet bands need all the digits
            spectrum = torch.stft(
                padded.to(self.hann.dtype),
                self.fft_size,
                self.hop,
                win_length=len(self.hann),
                window=self.hann,
                center=True,
                pad_mode="constant",
                return_complex=True,
            )
            power = torch.view_as_real(spectrum).square().sum(-1)  # abs has no gradient at silence
            return torch.log(self.filters @ power + FLOOR) / SPREAD
