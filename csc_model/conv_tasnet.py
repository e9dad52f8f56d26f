"""The separator of Conv-TasNet (Luo and Mesgarani, IEEE/ACM TASLP 27(8), 2019; arXiv 1809.07454).

In the paper's letters: N = `num_bins`, L = `window`, B and Sc = `channels`, H = `hidden`, P = 3,
X = `dilation_cycle`, and the numbers of blocks are X times R, shared by the stacks. Its best
network has N 512, L 16, B and Sc 128, H 512, X 8, R 3. The norm and the bottleneck before the
blocks are the model's, for all trunks. Ours is that a stack hands its sum of skips to the next.
"""

from torch import Tensor, nn

from csc_model.config import ModelConfig
from csc_model.trunk import Stack, Trunk

KERNEL = 3


class ConvTasNetBlock(nn.Module):
    """Pointwise, depthwise dilated, pointwise convolution on `(batch, channel, frame)`.

    Returns what to add to the residual path and what to add to the skips, one after the other on
    the channel axis: two convolutions of the paper as one product. The last block of a stack has
    the skip alone, since nothing would read its residual.
    """

    def __init__(self, config: ModelConfig, depth: int, *, last: bool) -> None:
        super().__init__()
        dilation = 2 ** (depth % config.dilation_cycle)
        channels, hidden = config.channels, config.hidden
        self.layers = nn.Sequential(
            nn.Conv1d(channels, hidden, 1),
            nn.PReLU(),
            nn.GroupNorm(1, hidden),  # gLN: over channels and time
            nn.Conv1d(hidden, hidden, KERNEL, padding=dilation, dilation=dilation, groups=hidden),
            nn.PReLU(),
            nn.GroupNorm(1, hidden),
            nn.Conv1d(hidden, channels if last else 2 * channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class SkipStack(Stack):
    """Blocks on a residual path; the output is the sum of their skips."""

    def forward(self, x: Tensor) -> Tensor:
        total, channels = None, x.shape[1]
        for block in self:
            both = self.run(block, x)
            skip = both[:, -channels:]
            total = skip if total is None else total + skip
            if both.shape[1] > channels:
                x = x + both[:, :channels]
        return x if total is None else total


class ConvTasNet(Trunk):
    """Blocks on frames as they come."""

    def stack(self, num_blocks: int) -> Stack:
        blocks = (
            ConvTasNetBlock(self.config, depth, last=depth == num_blocks - 1)
            for depth in range(num_blocks)
        )
        return SkipStack(blocks, checkpointing=self.config.checkpointing)
