"""Trunks: segments, blocks against plain formulas, checkpointing, compilation."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from csc_model.config import TRUNKS
from csc_model.conv_tasnet import ConvTasNet
from csc_model.galr import GalrBlock, GlobalLayer, overlap_add, segment
from csc_model.model import CSC
from csc_model.trunk import build_trunk
from tests.small_models import new_model, small


@given(st.integers(1, 300), st.sampled_from([2, 4, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_overlap_add_undoes_segmentation(frames: int, length: int) -> None:
    x = torch.randn(2, 3, frames)
    cut = segment(x, length)
    assert cut.shape[:3] == (2, 3, length)
    torch.testing.assert_close(overlap_add(cut, frames), x)


@pytest.mark.parametrize("kind", TRUNKS)
@given(frames=st.integers(1, 130), blocks=st.integers(0, 2))
@settings(max_examples=10, deadline=None)
def test_a_stack_keeps_the_shape(kind: str, frames: int, blocks: int) -> None:
    trunk = build_trunk(small(kind, "conv"))
    x = torch.randn(2, 16, frames)
    split = trunk.split(x)
    out = trunk.stack(blocks)(split)
    assert out.shape == split.shape
    assert trunk.join(out, frames).shape == x.shape
    if not blocks:
        torch.testing.assert_close(trunk.join(out, frames), x)


def loss_and_gradients(model: CSC, waveforms: Tensor) -> tuple[Tensor, list[Tensor]]:
    torch.manual_seed(5)  # dropout
    output = model.train()(waveforms)
    loss = output.sources.square().mean() + output.embeddings.square().mean()
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    return loss, [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("kind", TRUNKS)
def test_checkpointing_changes_neither_loss_nor_gradients(kind: str) -> None:
    plain = new_model(f"{kind}-conv", dropout=0.2)
    saving = new_model(f"{kind}-conv", dropout=0.2, checkpointing=True)
    waveforms = torch.randn(2, 1501)
    loss, grads = loss_and_gradients(plain, waveforms)
    again, same = loss_and_gradients(saving, waveforms)
    torch.testing.assert_close(again, loss, rtol=0, atol=0)
    torch.testing.assert_close(same, grads, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("kind", TRUNKS)
def test_checkpointing_keeps_fewer_values(kind: str) -> None:
    kept = []
    for checkpointing in (False, True):
        model = new_model(f"{kind}-conv", checkpointing=checkpointing)
        values = 0

        def count(value: Tensor) -> Tensor:
            nonlocal values
            values += value.numel()
            return value

        with torch.autograd.graph.saved_tensors_hooks(count, lambda value: value):
            model.trunk.shared(model.trunk.split(torch.randn(1, 16, 400)))
        kept.append(values)
    assert kept[1] < kept[0] / 3


@pytest.mark.parametrize("kind", TRUNKS)
def test_compiled_it_gives_the_same(kind: str) -> None:
    """Traced, not translated to machine code, which takes a minute."""
    torch.compiler.reset()  # what another test made it pass over, it would pass over here
    model = new_model(f"{kind}-conv", shared_blocks=1, separation_blocks=0, speaker_blocks=0)
    recurrent = any(isinstance(module, torch.nn.LSTM) for module in model.modules())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=not recurrent)
    waveforms = torch.randn(2, 1001)
    torch.testing.assert_close(tuple(compiled(waveforms)), tuple(model(waveforms)))


@pytest.mark.parametrize("kind", ["galr", "blstm"])
def test_an_lstm_breaks_the_graph(kind: str) -> None:
    torch.compiler.reset()
    model = new_model(f"{kind}-conv", shared_blocks=1, separation_blocks=0, speaker_blocks=0)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="LSTM"):
        torch.compile(model, backend="eager", fullgraph=True)(torch.randn(2, 1001))


def global_layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """Normalise over channels and time, with a gain and a bias for each channel."""
    mean = x.mean((1, 2), keepdim=True)
    variance = ((x - mean) ** 2).mean((1, 2), keepdim=True)
    return gain[:, None] * (x - mean) / torch.sqrt(variance + 1e-5) + bias[:, None]


def plain_block(x: Tensor, weights: list[Tensor], dilation: int) -> Tensor:
    """One block of Conv-TasNet by sums and products alone."""
    (into, into_bias, slope, gain, bias, depthwise, depthwise_bias, slope_2, gain_2, bias_2, out,
     out_bias) = weights  # fmt: skip
    h = torch.einsum("hc,bct->bht", into[..., 0], x) + into_bias[:, None]
    h = global_layer_norm(torch.where(h > 0, h, slope * h), gain, bias)
    padded, frames = F.pad(h, (dilation, dilation)), h.shape[-1]
    taps = [padded[..., tap * dilation : tap * dilation + frames] for tap in range(3)]
    h = sum(depthwise[:, 0, tap, None] * taps[tap] for tap in range(3)) + depthwise_bias[:, None]
    h = global_layer_norm(torch.where(h > 0, h, slope_2 * h), gain_2, bias_2)
    return torch.einsum("oh,bht->bot", out[..., 0], h) + out_bias[:, None]


def plain_lstm(rows: Tensor, lstm: torch.nn.LSTM) -> Tensor:
    """Go through `(frame, channel)` one by one, both ways, from states of zero."""
    both = []
    for end, order in (("", range(len(rows))), ("_reverse", reversed(range(len(rows))))):
        names = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
        into, again, bias, bias_2 = (getattr(lstm, f"{name}_l0{end}") for name in names)
        state = cell = torch.zeros(lstm.hidden_size)
        states = {}
        for place in order:
            gates = into @ rows[place] + bias + again @ state + bias_2
            enter, keep, new, show = gates.chunk(4)
            cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
            state = states[place] = show.sigmoid() * cell.tanh()
        both.append(torch.stack([states[place] for place in range(len(rows))]))
    return torch.cat(both, -1)


def plain_attention(rows: Tensor, layer: GlobalLayer) -> Tensor:
    """Let each of `(segment, channel)` attend to all, one head after the other."""
    count, channels = rows.shape
    place, index = torch.arange(count)[:, None], torch.arange(channels)
    angle = place / 10_000 ** (index // 2 * 2 / channels)
    rows = layer.before(rows) + torch.where(index % 2 == 0, angle.sin(), angle.cos())
    heads = []
    parts = (part.chunk(layer.heads, -1) for part in layer.qkv(rows).chunk(3, -1))
    for query, key, value in zip(*parts, strict=True):
        heads.append((query @ key.T / math.sqrt(query.shape[-1])).softmax(-1) @ value)
    return layer.after(rows + layer.out(torch.cat(heads, -1)))


def test_a_galr_block_is_loops_over_segments_and_queries() -> None:
    """The attention's input is added to what it gives, and either layer's to what that gives."""
    torch.manual_seed(0)
    block = GalrBlock(small("galr", "conv"))
    for weight in block.parameters():
        torch.nn.init.uniform_(weight, -0.5, 0.5)
    given, local, globally = torch.randn(1, 16, 16, 5), block.local, block.globally
    x = given[0]
    found = [local.project(plain_lstm(x[:, :, s].T, local.lstm)).T for s in range(5)]
    x = x + local.norm(torch.stack(found, -1)[None])[0]
    summaries = torch.einsum("qk,cks->qsc", globally.compress.weight, x)
    summaries = summaries + globally.compress.bias[:, None, None]
    attended = torch.stack([plain_attention(rows, globally) for rows in summaries])
    spread = torch.einsum("kq,qsc->cks", globally.expand.weight, attended)
    expected = x + globally.norm((spread + globally.expand.bias[:, None])[None])[0]
    torch.testing.assert_close(block(given)[0], expected, rtol=1e-4, atol=1e-5)


def test_conv_tasnet_is_the_published_network() -> None:
    """A residual path, skips that are summed, dilations that double and start again."""
    torch.manual_seed(0)
    stack = ConvTasNet(small("conv_tasnet", "conv", dilation_cycle=2)).stack(5)
    for weight in stack.parameters():
        torch.nn.init.uniform_(weight, -0.5, 0.5)
    x = torch.randn(2, 16, 57)
    path, skips = x, torch.zeros_like(x)
    for number, block in enumerate(stack):
        both = plain_block(path, list(block.parameters()), 2 ** (number % 2))
        skips = skips + both[:, -16:]
        path = path + both[:, :16]
    torch.testing.assert_close(stack(x), skips, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("channels", "hidden", "blocks"), [(16, 12, 1), (64, 128, 8)])
def test_conv_tasnet_has_the_published_number_of_weights(
    channels: int, hidden: int, blocks: int
) -> None:
    """Two pointwise convolutions out of a block, one in, P = 3 taps; the last has no residual."""
    stack = ConvTasNet(small("conv_tasnet", "conv", channels=channels, hidden=hidden)).stack(blocks)
    b, h, p = channels, hidden, 3
    one = (b * h + h) + (1 + 2 * h) + (p * h + h) + (1 + 2 * h) + 2 * (h * b + b)
    assert sum(weight.numel() for weight in stack.parameters()) == blocks * one - (h * b + b)


def test_dilations_double_until_the_cycle_ends() -> None:
    for kind, layer in (("conv_tasnet", 3), ("tcn", 0)):
        stack = build_trunk(small(kind, "conv", dilation_cycle=3)).stack(7)
        dilations = [block.layers[layer].dilation[0] for block in stack]
        assert dilations == [1, 2, 4, 1, 2, 4, 1]
