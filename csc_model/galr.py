"""GALR: globally attentive, locally recurrent blocks (Lam et al., arXiv 2101.05014).

The block follows the one that an author of GALR released, but for what the docstrings name: padding
(`segment`), where an LSTM begins (`LocalLayer`), and the residual and dropout of attention
(`GlobalLayer`).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from csc_model.config import ModelConfig
from csc_model.trunk import Stack, Trunk


def segment(x: Tensor, length: int) -> Tensor:
    """Cut `(batch, channel, frame)` into half-overlapping segments `(batch, channel, length, s)`.

    Half a segment of zeros goes before and after, so that every frame lies in two segments, and
    behind it what is missing to a whole half. The released GALR puts 1 to `length` zeros there, up
    to whole segments: its last ones can be empty.
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
    """A bidirectional LSTM along the frames of each segment, with a residual.

    It begins each segment with zeros, where the released one learns a state to begin with.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lstm = nn.LSTM(config.channels, config.hidden, batch_first=True, bidirectional=True)
        self.project = nn.Linear(2 * config.hidden, config.channels)
        self.norm = nn.GroupNorm(1, config.channels)

    def forward(self, x: Tensor) -> Tensor:
        batch, channel, length, count = x.shape
        rows = x.permute(0, 3, 2, 1).reshape(batch * count, length, channel)
        rows = self.lstm(rows.contiguous())[0]  # cuDNN copies rows that are not
        rows = self.project(rows).reshape(batch, count, length, channel)
        return x + self.norm(rows.permute(0, 3, 2, 1))


def sinusoids(count: int, channels: int, device: torch.device) -> Tensor:
    """Sinusoidal position codes `(count, channels)` (Vaswani et al., 2017)."""
    position = torch.arange(count, device=device, dtype=torch.float32)[:, None]
    index = torch.arange(channels, device=device)
    angle = position * torch.exp(-math.log(10_000.0) * (index // 2 * 2) / channels)
    return torch.where(index % 2 == 0, angle.sin(), angle.cos())


class GlobalLayer(nn.Module):
    """Self-attention across segments, on `queries` summaries of each, with a residual.

    The attention input is added back before its norm; the one released GALR block leaves that out,
    and adds the attention's output to itself after dropout. Here only the weights drop out.
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


class Galr(Trunk):
    """Blocks on half-overlapping segments.

    `torch.compile` breaks the graph at each LSTM, which torch runs as it is, and compiles what lies
    between.
    """

    def stack(self, num_blocks: int) -> Stack:
        blocks = (GalrBlock(self.config) for _ in range(num_blocks))
        return Stack(blocks, checkpointing=self.config.checkpointing)

    def split(self, frames: Tensor) -> Tensor:
        return segment(frames, self.config.segment)

    def join(self, x: Tensor, num_frames: int) -> Tensor:
        return overlap_add(x, num_frames)
