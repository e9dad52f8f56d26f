"""Networks that let one voice through: the one of a vector that is given beside the mixture.

`film` is a separator whose features a speaker vector shifts and scales (feature-wise linear
modulation; Perez et al., 2018), `voicefilter` has the shape of VoiceFilter (Wang et al., 2019;
sizes as in its public reimplementations), as a reference.
"""

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csc_model.config import ModelConfig
from csc_model.encoder import FrontEnd, build_frontend, weigh
from csc_model.trunk import build_trunk

COMPRESSION = 0.3
"""Power that VoiceFilter raises magnitudes to, in its input and in its loss."""


class Extractor(nn.Module, ABC):
    """Weighs the carrier of a mixture by one mask."""

    frontend: FrontEnd

    @abstractmethod
    def mask(self, magnitude: Tensor, vectors: Tensor) -> Tensor:
        """Return masks `(batch, bin, frame)` for carriers and unit vectors `(batch, dim)`."""

    def forward(self, unit: Tensor, vectors: Tensor) -> Tensor:
        """Return the voices `(batch, time)` of `vectors` in mixtures of unit power."""
        carrier = self.frontend.encode(unit)
        masks = self.mask(carrier.abs(), vectors)
        return self.frontend.decode(weigh(carrier, masks), unit.shape[-1])


class Film(nn.Module):
    """Features `(batch, channel, frame)`, shifted and scaled as a vector says; at first, not."""

    def __init__(self, dim: int, channels: int) -> None:
        super().__init__()
        self.told = nn.Linear(dim, 2 * channels)
        nn.init.zeros_(self.told.weight)
        nn.init.zeros_(self.told.bias)

    def forward(self, x: Tensor, vectors: Tensor) -> Tensor:
        scale, shift = self.told(vectors).unsqueeze(-1).chunk(2, 1)
        return x * (1 + scale) + shift


class FilmExtractor(Extractor):
    """The separator of a CSC model with one mask, told whose: before its trunk and behind it."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.frontend = build_frontend(config)
        bins, channels = self.frontend.num_bins, config.channels
        self.bottleneck = nn.Sequential(nn.GroupNorm(1, bins), nn.Conv1d(bins, channels, 1))
        self.early, self.late = (Film(config.embedding_dim, channels) for _ in range(2))
        self.trunk = build_trunk(config)
        self.separation_blocks = self.trunk.stack(config.separation_blocks)
        self.weights = nn.Sequential(nn.PReLU(), nn.Conv1d(channels, bins, 1))

    def mask(self, magnitude: Tensor, vectors: Tensor) -> Tensor:
        frames, split, join = magnitude.shape[-1], self.trunk.split, self.trunk.join
        x = self.early(self.bottleneck(self.frontend.features(magnitude)), vectors)
        x = self.late(join(self.trunk.shared(split(x)), frames), vectors)
        return self.frontend.squash(self.weights(join(self.separation_blocks(split(x)), frames)))

    @torch.no_grad()
    def begin_with(self, separator: dict[str, Tensor]) -> None:
        """Take over a separator's weights; where it has a mask for each slot, their mean."""
        own = self.state_dict()
        bins, slots = self.frontend.num_bins, "mask.1."
        for name, weight in separator.items():
            if name in own:
                own[name].copy_(weight)
            elif name.startswith(slots):
                own[f"weights.1.{name.removeprefix(slots)}"].copy_(
                    weight.unflatten(0, (-1, bins)).mean(0)
                )
            elif name == "mask.0.weight":
                own["weights.0.weight"].copy_(weight)


class VoiceFilter(Extractor):
    """Convolutions over time and frequency, a recurrent layer that hears the vector, a mask.

    Eight layers of convolutions (1 x 7, 7 x 1, five of 5 x 5 with growing dilation in time, 1 x 1
    to 8 channels), a bidirectional LSTM of `hidden` cells each way, two dense layers.
    """

    CONVOLUTIONS = ((1, 7, 1), (7, 1, 1), (5, 5, 1), (5, 5, 2), (5, 5, 4), (5, 5, 8), (5, 5, 16))
    """Extent in frames and in bins, and dilation in frames."""
    LAST = 8

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.frontend = build_frontend(config)
        bins, inner, width = self.frontend.num_bins, config.extractor_channels, 1
        layers: list[nn.Module] = []
        for frames, height, dilation in self.CONVOLUTIONS:
            layers += _normed(width, inner, (height, frames), dilation)
            width = inner
        self.convolutions = nn.Sequential(*layers, *_normed(width, self.LAST, (1, 1), 1))
        told = self.LAST * bins + config.embedding_dim
        self.lstm = nn.LSTM(told, config.hidden, batch_first=True, bidirectional=True)
        self.dense = nn.Sequential(
            nn.ReLU(), nn.Linear(2 * config.hidden, config.hidden), nn.ReLU(),
            nn.Linear(config.hidden, bins),
        )  # fmt: skip

    def mask(self, magnitude: Tensor, vectors: Tensor) -> Tensor:
        heard = self.convolutions((magnitude + 1e-8).pow(COMPRESSION).unsqueeze(1))
        frames = heard.flatten(1, 2).transpose(1, 2)
        whose = vectors.unsqueeze(1).expand(-1, frames.shape[1], -1)
        y, _ = self.lstm(torch.cat([frames, whose], -1))
        return torch.sigmoid(self.dense(y)).transpose(1, 2)


def _normed(inner: int, outer: int, kernel: tuple[int, int], dilation: int) -> list[nn.Module]:
    """Return a convolution that keeps the size, batch norm and ReLU; dilated in frames."""
    padding = (kernel[0] // 2, dilation * (kernel[1] // 2))
    convolution = nn.Conv2d(inner, outer, kernel, padding=padding, dilation=(1, dilation))
    return [convolution, nn.BatchNorm2d(outer), nn.ReLU()]


def build_extractor(config: ModelConfig) -> Extractor:
    """Return the network that `config.extractor` names."""
    return VoiceFilter(config) if config.extractor == "voicefilter" else FilmExtractor(config)


def voice_of(vectors: Tensor) -> Tensor:
    """Return the unit vector `(dim,)` of a voice from those of its enrolment `(recording, dim)`."""
    return F.normalize(vectors.mean(0), dim=0)
