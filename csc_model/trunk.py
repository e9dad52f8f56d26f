"""Trunks: GALR (Lam et al., arXiv 2101.05014) and a temporal convolution network.

A trunk splits frames into the layout that its blocks work on, and joins them again. Both are
built of blocks that keep the shape, so the shared stack and the stacks of the two heads differ
in number only.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csc_model.config import ModelConfig


def segment(x: Tensor, length: int) -> Tensor:
    """Cut `(batch, channel, frame)` into half-overlapping segments `(batch, channel, length, s)`.

    Half a segment of zeros goes before and after, so that every frame lies in two segments.
    """
    half = length // 2
    missing = -x.shape[-1] % half
    padded = F.pad(x, (half, half + missing))
    return padded.unfold(-1, length, half).transpose(-1, -2)


def overlap_add(x: Tensor, num_frames: int) -> Tensor:
    """Undo `segment`: the mean of the two segments that hold a frame, `(batch, channel, frame)`."""
    half = x.shape[-2] // 2
    first, second = x[..., :half, :], x[..., half:, :]
    mean = (first[..., 1:] + second[..., :-1]) / 2
    return mean.transpose(-1, -2).flatten(-2)[..., :num_frames]


class LocalLayer(nn.Module):
    """A bidirectional LSTM along the frames of each segment, with a residual."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lstm = nn.LSTM(config.channels, config.hidden, batch_first=True, bidirectional=True)
        self.project = nn.Linear(2 * config.hidden, config.channels)
        self.norm = nn.GroupNorm(1, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channel, length, count = x.shape
        rows = x.permute(0, 3, 2, 1).reshape(batch * count, length, channel)
        rows = self.project(self.lstm(rows)[0]).reshape(batch, count, length, channel)
        return x + self.norm(rows.permute(0, 3, 2, 1))


def sinusoids(count: int, channels: int, device: torch.device) -> Tensor:
    """Sinusoidal position codes `(count, channels)` (Vaswani et al., 2017)."""
    position = torch.arange(count, device=device, dtype=torch.float32)[:, None]
    index = torch.arange(channels, device=device)
    angle = position * torch.exp(-math.log(10_000.0) * (index // 2 * 2) / channels)
    return torch.where(index % 2 == 0, angle.sin(), angle.cos())


class GlobalLayer(nn.Module):
    """Self-attention across segments, on `queries` summaries of each, with a residual.

    The attention input is added back before its norm; the one released GALR block leaves that out.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.dropout = config.attention_heads, config.dropout
        self.compress = nn.Linear(config.segment, config.queries)
        self.expand = nn.Linear(config.queries, config.segment)
        self.before = nn.LayerNorm(config.channels)
        self.qkv = nn.Linear(config.channels, 3 * config.channels)
        self.out = nn.Linear(config.channels, config.channels)
        self.after = nn.LayerNorm(config.channels)
        self.norm = nn.GroupNorm(1, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channel, _, count = x.shape
        summaries = self.compress(x.transpose(-1, -2))  # (batch, channel, count, query)
        rows = summaries.permute(0, 3, 2, 1).reshape(-1, count, channel)
        rows = self.before(rows) + sinusoids(count, channel, x.device).to(rows.dtype)
        rows = self.after(rows + self._attend(rows))
        summaries = rows.reshape(batch, -1, count, channel).permute(0, 3, 2, 1)
        return x + self.norm(self.expand(summaries).transpose(-1, -2))

    def _attend(self, rows: Tensor) -> Tensor:
        query, key, value = self.qkv(rows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(-2))


class GalrBlock(nn.Module):
    """One globally attentive, locally recurrent block on `(batch, channel, length, segment)`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.local = LocalLayer(config)
        self.globally = GlobalLayer(config)

    def forward(self, x: Tensor) -> Tensor:
        return self.globally(self.local(x))


class TcnBlock(nn.Module):
    """A dilated convolution, a pointwise one and a residual, on `(batch, channel, frame)`."""

    def __init__(self, config: ModelConfig, depth: int) -> None:
        super().__init__()
        dilation = 2 ** (depth % 4)
        self.layers = nn.Sequential(
            nn.Conv1d(config.channels, config.hidden, 3, padding=dilation, dilation=dilation),
            nn.ReLU(),  # PReLU's gradient costs more than the convolution's on a CPU
            nn.GroupNorm(1, config.hidden),
            nn.Conv1d(config.hidden, config.channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class Trunk(nn.Module):
    """The shared stack, with the layout its blocks work on; heads take more blocks from `stack`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.shared = self.stack(config.shared_blocks)

    def stack(self, num_blocks: int) -> nn.Sequential:
        """Return `num_blocks` further blocks of this trunk's kind."""
        if self.config.trunk == "galr":
            return nn.Sequential(*(GalrBlock(self.config) for _ in range(num_blocks)))
        return nn.Sequential(*(TcnBlock(self.config, depth) for depth in range(num_blocks)))

    def split(self, frames: Tensor) -> Tensor:
        """Lay frames `(batch, channel, frame)` out as the blocks expect them."""
        return segment(frames, self.config.segment) if self.config.trunk == "galr" else frames

    def join(self, x: Tensor, num_frames: int) -> Tensor:
        """Undo `split`."""
        return overlap_add(x, num_frames) if self.config.trunk == "galr" else x
