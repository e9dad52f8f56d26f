"""The operations of a forward pass, against those of a device that fuses nothing."""

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from csc_model.flops import forward_flops, peak_flops, peak_of
from csc_model.model import CSC
from tests.small_models import SMALL, new_model


@pytest.mark.parametrize("kind", ["galr-conv", "conv_tasnet-conv", "tcn-conv"])
def test_the_count_is_that_of_unfused_layers(kind: str) -> None:
    with torch.device("meta"):
        plain = CSC(SMALL[kind]).eval()
    with FlopCounterMode(display=False) as counter:
        plain(torch.empty(1, 4000, device="meta"))
    expected = counter.get_total_flops()
    assert forward_flops(new_model(kind), 4000) == pytest.approx(expected, rel=1e-6)


def test_separation_alone_is_less() -> None:
    model = new_model("tcn-stft").train()
    assert 0 < forward_flops(model, 4000, separation_only=True) < forward_flops(model, 4000)
    assert model.training


def test_a_linear_layer_is_two_operations_for_each_weight() -> None:
    layer = nn.Linear(3, 5, bias=False)
    with FlopCounterMode(display=False) as counter:
        layer(torch.zeros(1, 3))
    assert counter.get_total_flops() == 2 * layer.weight.numel()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA L40S", 362e12),
        ("Tesla T4", 65e12),
        ("NVIDIA RTX A1000", None),
        ("NVIDIA T400", None),
    ],
)
def test_a_peak_is_that_of_the_device_and_of_none_whose_name_is_longer(
    name: str, peak: float | None
) -> None:
    assert peak_of(name) == peak


def test_a_device_without_a_data_sheet_has_no_peak() -> None:
    assert peak_flops(torch.device("cpu")) is None
