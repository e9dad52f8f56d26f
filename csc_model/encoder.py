"""Front ends: a waveform becomes a carrier that masks weigh, and back.

`conv` is the learned encoder of the separation literature (a 1-D convolution with ReLU and its
transpose); `stft` is the fixed one, much cheaper per second of audio, that lets a small model
learn on a laptop.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csc_model.config import ModelConfig


class FrontEnd(nn.Module, ABC):
    """What the model asks of a front end."""

    num_bins: int

    @abstractmethod
    def encode(self, waveform: Tensor) -> Tensor:
        """Turn `(batch, time)` into a carrier `(batch, bin, frame)`, real or complex."""

    @abstractmethod
    def decode(self, carrier: Tensor, num_samples: int) -> Tensor:
        """Turn carriers `(batch, bin, frame)` into `(batch, num_samples)`."""

    @abstractmethod
    def features(self, magnitude: Tensor) -> Tensor:
        """Compress carrier magnitudes `(..., bin, frame)` for the network to read."""

    @abstractmethod
    def squash(self, logits: Tensor) -> Tensor:
        """Turn mask logits `(batch, slot, bin, frame)` into non-negative masks."""


class ConvFrontEnd(FrontEnd):
    """Learned analysis and synthesis filters; masks are rectified, as in TasNet."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_bins, self.window, self.hop = config.num_bins, config.window, config.hop
        self.analysis = nn.Conv1d(1, self.num_bins, self.window, self.hop, bias=False)
        self.synthesis = nn.ConvTranspose1d(self.num_bins, 1, self.window, self.hop, bias=False)

    def encode(self, waveform: Tensor) -> Tensor:
        beyond = max(waveform.shape[-1] - self.window, 0)
        missing = self.window + -(-beyond // self.hop) * self.hop - waveform.shape[-1]
        return F.relu(self.analysis(F.pad(waveform, (0, missing)).unsqueeze(1)))

    def decode(self, carrier: Tensor, num_samples: int) -> Tensor:
        return self.synthesis(carrier)[:, 0, :num_samples]

    def features(self, magnitude: Tensor) -> Tensor:
        return magnitude

    def squash(self, logits: Tensor) -> Tensor:
        return F.relu(logits)


class StftFrontEnd(FrontEnd):
    """Short-time Fourier transform; masks weigh magnitudes and keep the mixture's phase."""

    hann: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.window, self.hop = config.window, config.hop
        self.num_bins = config.window // 2 + 1
        self.register_buffer("hann", torch.hann_window(self.window), persistent=False)

    def padded(self, waveform: Tensor) -> Tensor:
        """Add silence, so that no sample lies beyond the centre of the last frame.

        There the window is all but zero, and what masks change would be divided by it.
        """
        return F.pad(waveform, (0, max(self.window - waveform.shape[-1], self.hop - 1)))

    def encode(self, waveform: Tensor) -> Tensor:
        return torch.stft(
            self.padded(waveform),
            self.window,
            self.hop,
            window=self.hann,
            center=True,
            pad_mode="constant",
            return_complex=True,
        )

    def decode(self, carrier: Tensor, num_samples: int) -> Tensor:
        waveform = torch.istft(carrier, self.window, self.hop, window=self.hann, center=True)
        return waveform[..., :num_samples]

    def features(self, magnitude: Tensor) -> Tensor:
        return torch.log(magnitude + 1e-2)

    def squash(self, logits: Tensor) -> Tensor:
        return torch.sigmoid(logits)


def weigh(carrier: Tensor, masks: Tensor) -> Tensor:
    """Multiply by real masks. Torch would first make a complex copy of them."""
    if not carrier.is_complex():
        return carrier * masks
    return torch.view_as_complex(torch.view_as_real(carrier) * masks.unsqueeze(-1))


def build_frontend(config: ModelConfig) -> FrontEnd:
    """Return the front end that `config.frontend` names."""
    return StftFrontEnd(config) if config.frontend == "stft" else ConvFrontEnd(config)
