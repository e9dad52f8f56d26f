"""How much a model computes, and how much a device could: the share of it that is used (MFU)."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from csc_model.model import CSC

BACKWARD_FORWARD = 3
"""A training step over a forward pass: the backward pass computes twice as much."""

PEAK_FLOPS = {
    "GB200": 2500e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "L4": 121e12,
    "A10G": 70e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense bf16 (V100, T4: fp16) operations a second, by words of the device's name; data sheets."""


def forward_flops(
    model: CSC,
    num_samples: int,
    *,
    separation_only: bool = False,
    extraction: bool = False,
    views: int = 0,
) -> float:
    """Return the floating point operations of a forward pass on one mixture.

    With `views`, the speaker head hears as many of its views. With `extraction` it is a pass of the
    extractor.

    A multiplication and an addition are two. Fused recurrent layers and attention are counted from
    their sizes. Of what is not a product of matrices (norms, Fourier transforms) nothing is.
    """
    waveform = torch.randn(1, num_samples, device=next(model.parameters()).device)
    counter = FlopCounterMode(display=False, custom_mapping={_FUSED_ATTENTION: _attention_flops})
    training = model.training
    with torch.no_grad(), counter, _recurrent_layers(model) as recurrent:
        heard = torch.arange(views, device=waveform.device)[None] if views else None
        model.eval()
        if extraction:
            model.extracted(waveform, waveform.new_zeros(1, model.config.embedding_dim))
        elif separation_only:
            model.sources(waveform)
        else:
            model(waveform, heard)
    model.train(training)
    return float(counter.get_total_flops() + sum(recurrent))


def peak_flops(device: torch.device) -> float | None:
    """Return the operations a second that a device is sold for, None where that is not known."""
    if device.type != "cuda":
        return None
    return peak_of(torch.cuda.get_device_name(device))


def peak_of(name: str) -> float | None:
    """Return the same for a device by its name, as its driver tells it."""
    fitting = (peak for words, peak in PEAK_FLOPS.items() if re.search(rf"\b{words}\b", name))
    return next(fitting, None)


_FUSED_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention_flops(
    query: tuple[int, ...], key: tuple[int, ...], value: tuple[int, ...], *_: object, **__: object
) -> int:
    return int(sdpa_flop_count(query, key, value))


@contextmanager
def _recurrent_layers(model: nn.Module) -> Iterator[list[int]]:
    """Collect what LSTM layers compute, which the libraries do in one call."""
    found: list[int] = []

    def count(layer: nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        assert isinstance(layer, nn.LSTM)
        steps = inputs[0].numel() // layer.input_size
        found.append(2 * steps * sum(w.numel() for w in layer.parameters() if w.ndim > 1))

    hooks = [
        layer.register_forward_hook(count)
        for layer in model.modules()
        if isinstance(layer, nn.LSTM)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
