"""The model: shapes, inverses, slots, and that it can learn."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_model.attention import draw_allowed
from csc_model.config import ModelConfig
from csc_model.encoder import build_frontend
from csc_model.mfcc import mfcc_statistics
from csc_model.model import ACTIVE, CSC
from csc_model.objective import Episodes, Objective
from tests.conftest import voice
from tests.small_models import SMALL, new_model, small


@pytest.mark.parametrize("kind", SMALL)
@given(samples=st.integers(1, 1501))
@settings(max_examples=12, deadline=None)
def test_any_length_gives_slots_of_that_length(kind: str, samples: int) -> None:
    model = new_model(kind)
    with torch.no_grad():
        output = model(torch.randn(2, samples))
    assert output.sources.shape == (2, 2, samples)
    assert output.embeddings.shape == (2, 3, 16)
    assert output.activity.shape == (2, 3)
    assert output.activity_logits.shape == (2, 2)
    assert all(torch.isfinite(part).all() for part in output)


@pytest.mark.parametrize("kind", SMALL)
def test_a_batch_is_its_items_and_twice_is_the_same(kind: str) -> None:
    model, waveforms = new_model(kind), torch.randn(2, 1999)
    with torch.no_grad():
        both, again = model(waveforms), model(waveforms)
        one, other = model(waveforms[:1]), model(waveforms[1:])
    for together, repeated, first, second in zip(both, again, one, other, strict=True):
        assert torch.equal(together, repeated)
        torch.testing.assert_close(together, torch.cat([first, second]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("features", ["carrier", "mel"])
@pytest.mark.parametrize("detached", [False, True])
def test_the_speaker_head_reaches_the_separator_unless_detached(
    features: str, detached: bool
) -> None:
    changes = {"speaker_features": features, "detach_separation": detached}
    model = new_model("tcn-conv", **changes)
    model(torch.randn(2, 2000)).embeddings.square().sum().backward()
    masks = [parameter.grad for parameter in model.mask.parameters()]
    assert all((grad is None) == detached for grad in masks)
    assert model.frontend.analysis.weight.grad is None or (features, detached) != ("mel", True)
    assert all(parameter.grad is not None for parameter in model.speaker_blocks.parameters())


@pytest.mark.parametrize("kind", SMALL)
def test_every_parameter_has_a_gradient(kind: str) -> None:
    """Where one has none, DistributedDataParallel waits for it for ever."""
    model = new_model(kind)
    output = model(torch.randn(2, 1000))
    model.attention(output.embeddings).sum().backward(retain_graph=True)
    (output.sources.sum() + output.activity_logits.sum()).backward()
    assert [name for name, weight in model.named_parameters() if weight.grad is None] == []


@pytest.mark.parametrize("kind", SMALL)
def test_half_the_digits_give_about_the_same(kind: str) -> None:
    model, waveforms = new_model(kind), torch.from_numpy(voice(1, 1, 1.0))[None]
    exact = model(waveforms)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(waveforms)
        rough.sources.float().square().sum().backward()
    for half, full in zip(rough, exact, strict=True):
        scale = full.square().mean().sqrt().item()
        torch.testing.assert_close(half.float(), full, rtol=0, atol=0.3 * scale)


@pytest.mark.parametrize("kind", SMALL)
def test_a_new_model_takes_every_slot_for_a_speaker(kind: str) -> None:
    _, activity = new_model(kind).embed(torch.from_numpy(voice(1, 1)))
    torch.testing.assert_close(activity, torch.tensor([0.9526, 0.9526, 1]), rtol=0, atol=1e-4)
    assert (activity > ACTIVE).all()


def test_activity_can_be_learned() -> None:
    """Which of two slots holds a speaker is read off what the separator gives."""
    torch.manual_seed(0)
    model, waveforms = new_model("tcn-stft"), torch.randn(8, 2000)
    present = torch.tensor([[1.0, 0.0]]).expand(8, 2)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        logits = model(waveforms).activity_logits
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, present)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert ((logits > 0) == (present > 0)).all()


@pytest.mark.parametrize("samples", [127, 2000, 2001])
def test_the_stft_carrier_gives_the_waveform_back(samples: int) -> None:
    frontend = build_frontend(SMALL["tcn-stft"])
    waveform = torch.randn(2, samples)
    back = frontend.decode(frontend.encode(waveform), samples)
    torch.testing.assert_close(back, waveform, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("samples", [2001, 2047])
def test_separation_goes_on_to_the_last_sample(kind: str, samples: int) -> None:
    sources = new_model(kind).separate(torch.ones(samples))
    level = sources.square().mean(-1).sqrt()
    assert (sources[:, -16:].abs().amax(-1) > 0.01 * level).all()
    assert (sources[:, -16:].abs().amax(-1) < 10 * level).all()


def test_a_short_recording_is_brought_to_the_model_as_a_long_one_is() -> None:
    vectors, activity = new_model("tcn-conv").to("meta").embed(torch.ones(2000))
    assert vectors.device == activity.device == torch.device("meta")


def test_one_mixture_is_separated_at_a_time() -> None:
    with pytest.raises(ValueError, match=r"one at a time, not \(2, 2000\)"):
        new_model("tcn-stft").separate(torch.ones(2, 2000))


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("gain", [1e-3, 30.0])
def test_embeddings_do_not_depend_on_the_level(kind: str, gain: float) -> None:
    model = new_model(kind)
    waveform = torch.from_numpy(voice(1, 1))
    vectors, _ = model.embed(waveform)
    torch.testing.assert_close(model.embed(gain * waveform)[0], vectors, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("kind", SMALL)
def test_separation_keeps_length_and_level(kind: str) -> None:
    model, waveform = new_model(kind), torch.from_numpy(voice(1, 1))
    sources = model.separate(waveform)
    assert sources.shape == (2, len(waveform))
    torch.testing.assert_close(model.separate(0.1 * waveform), 0.1 * sources, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", SMALL)
def test_silence_embeds_to_something_finite(kind: str) -> None:
    vectors, activity = new_model(kind).embed(torch.zeros(4000))
    assert torch.isfinite(vectors).all()
    assert torch.isfinite(activity).all()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hop": 32}, "gaps"),
        ({"segment": 7}, "even"),
        ({"channels": 30}, "multiple"),
        ({"trunk": "lstm"}, "not one of galr, conv_tasnet, tcn"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**changes)


def test_a_small_model_overfits_a_few_mixtures() -> None:
    """Separation and speakers can be learned at all: the loss of a fixed batch collapses."""
    torch.manual_seed(0)
    model = CSC(small("tcn", "stft", channels=32, hidden=32, window=256, hop=64))
    module = Objective(model, 4)
    sources = torch.stack([torch.from_numpy(voice(s, u, 0.5)) for s in range(4) for u in range(2)])
    sources = sources.reshape(4, 2, -1)
    references = torch.stack([sources, sources.roll(1, 0)], 2)
    speakers = torch.arange(4)[:, None, None].expand(4, 2, 1)
    speakers = torch.cat([speakers, speakers.roll(1, 0)], 2)
    allowed = draw_allowed(4, 2, torch.Generator())
    batch = Episodes(references.sum(2), references, speakers, speakers[:, 0, 0], allowed)
    optimizer = torch.optim.Adam(module.parameters(), lr=5e-3)
    first = module(batch)
    for _ in range(150):
        losses = module(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
    assert losses.contrastive_nats < 0.5 * first.contrastive_nats
    assert losses.separation_db < first.separation_db - 4


def test_mfcc_statistics_tell_voices_apart() -> None:
    same = mfcc_statistics(voice(1, 1), 16_000) @ mfcc_statistics(voice(1, 2), 16_000)
    other = mfcc_statistics(voice(1, 1), 16_000) @ mfcc_statistics(voice(9, 2), 16_000)
    assert same > other
    assert np.linalg.norm(mfcc_statistics(np.zeros(10, np.float32), 16_000)) <= 1 + 1e-9
