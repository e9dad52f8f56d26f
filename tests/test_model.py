"""The model: shapes, inverses, slots, weights on disk, and that it can learn."""

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from csc_model.attention import ConditionAttention, draw_allowed
from csc_model.config import ModelConfig
from csc_model.encoder import build_frontend
from csc_model.mfcc import mfcc_statistics
from csc_model.model import CONFIG_FILE, CSC
from csc_model.objective import Episodes, Objective
from csc_model.trunk import overlap_add, segment
from tests.conftest import voice
from tests.test_losses import SMALL


@given(st.integers(1, 300), st.sampled_from([2, 4, 16, 64]))
@settings(max_examples=60, deadline=None)
def test_overlap_add_undoes_segmentation(frames: int, length: int) -> None:
    x = torch.randn(2, 3, frames)
    cut = segment(x, length)
    assert cut.shape[:3] == (2, 3, length)
    torch.testing.assert_close(overlap_add(cut, frames), x)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("samples", [1, 63, 127, 128, 129, 2001])
def test_any_length_gives_slots_of_that_length(kind: str, samples: int) -> None:
    model = CSC(SMALL[kind]).eval()
    output = model(torch.randn(2, samples))
    assert output.sources.shape == (2, 2, samples)
    assert output.embeddings.shape == (2, 3, 16)
    assert all(torch.isfinite(part).all() for part in output)
    torch.testing.assert_close(output.activity[:, :2].sum(-1), torch.ones(2))


@pytest.mark.parametrize("samples", [127, 2000, 2001])
def test_the_stft_carrier_gives_the_waveform_back(samples: int) -> None:
    frontend = build_frontend(SMALL["tcn"])
    waveform = torch.randn(2, samples)
    back = frontend.decode(frontend.encode(waveform), samples)
    edge = 64  # half a window has a single frame at the very end
    torch.testing.assert_close(back[:, :-edge], waveform[:, :-edge], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", SMALL)
@pytest.mark.parametrize("gain", [1e-3, 30.0])
def test_embeddings_do_not_depend_on_the_level(kind: str, gain: float) -> None:
    model = CSC(SMALL[kind]).eval()
    waveform = torch.from_numpy(voice(1, 1))
    vectors, _ = model.embed(waveform)
    torch.testing.assert_close(model.embed(gain * waveform)[0], vectors, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(vectors.norm(dim=-1), torch.ones(3))


@pytest.mark.parametrize("kind", SMALL)
def test_separation_keeps_length_and_level(kind: str) -> None:
    model, waveform = CSC(SMALL[kind]).eval(), torch.from_numpy(voice(1, 1))
    sources = model.separate(waveform)
    assert sources.shape == (2, len(waveform))
    torch.testing.assert_close(model.separate(0.1 * waveform), 0.1 * sources, rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("kind", SMALL)
def test_silence_embeds_to_something_finite(kind: str) -> None:
    vectors, activity = CSC(SMALL[kind]).eval().embed(torch.zeros(4000))
    assert torch.isfinite(vectors).all()
    assert torch.isfinite(activity).all()


@pytest.mark.parametrize("kind", SMALL)
def test_a_saved_model_is_the_same_model(kind: str, tmp_path: Path) -> None:
    model = CSC(SMALL[kind]).eval()
    model.save(tmp_path)
    waveform = torch.from_numpy(voice(1, 1))
    torch.testing.assert_close(CSC.load(tmp_path).embed(waveform)[0], model.embed(waveform)[0])


def test_a_model_of_a_later_version_is_refused(tmp_path: Path) -> None:
    CSC(SMALL["tcn"]).save(tmp_path)
    path = tmp_path / CONFIG_FILE
    path.write_text(path.read_text().replace('"version": 1', '"version": 99'))
    with pytest.raises(ValueError, match="version 99"):
        CSC.load(tmp_path)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"hop": 32}, "gaps"), ({"segment": 7}, "even"), ({"channels": 30}, "multiple")],
)
def test_sizes_that_do_not_fit_are_refused(changes: dict[str, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        ModelConfig(**changes)


def test_attention_reads_only_what_it_may() -> None:
    attention = ConditionAttention(8, 2)
    embedding = torch.randn(1, 3, 8)
    itself = torch.eye(3, dtype=torch.bool)[None]
    changed = embedding.clone()
    changed[:, 1:] += 1
    torch.testing.assert_close(attention(embedding, itself)[:, 0], attention(changed, itself)[:, 0])
    assert not torch.allclose(attention(embedding)[:, 0], attention(changed)[:, 0])


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_every_query_may_attend_to_something(batch: int, conditions: int, seed: int) -> None:
    allowed = draw_allowed(batch, conditions, torch.Generator().manual_seed(seed))
    assert allowed.shape == (batch, conditions, conditions)
    assert allowed.any(-1).all()


def test_a_small_model_overfits_a_few_mixtures() -> None:
    """Separation and speakers can be learned at all: the loss of a fixed batch collapses."""
    torch.manual_seed(0)
    config = SMALL["tcn"].model_copy(
        update={"channels": 32, "hidden": 32, "window": 256, "hop": 64}
    )
    module = Objective(CSC(config), 4)
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
