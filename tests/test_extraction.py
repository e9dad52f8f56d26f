"""An extractor lets through the voice it is asked for, and training asks for it rightly."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from csc_model.episodes import Episodes
from csc_model.extraction import ExtractionObjective, asked, leak_db, power_law_loss
from csc_model.losses import snr_db
from csc_model.streaming import Pace, streamed
from jobs.batches import to_episodes
from jobs.config import Config, load_config
from jobs.meter import Meter
from jobs.stepper import Stepper, new_objective
from jobs.validation import Validator
from pipeline.loader import EpisodeLoader
from pipeline.storage import Folder
from tests.small_models import FRONTENDS, SIZES, new_model
from tests.test_proxy import crops

NOBODY = -1
FAST = {"trunk": "tcn", "frontend": "stft", "extractor_channels": 8} | SIZES | FRONTENDS["stft"]


def episodes(speakers: Tensor, anchors: Tensor, references: Tensor) -> Episodes:
    """Return a batch whose mixtures are the sums of their references."""
    count, conditions = speakers.shape[:2]
    allowed = torch.ones(count, conditions, conditions, dtype=torch.bool)
    return Episodes(references.sum(2), references, speakers, anchors, allowed)


def drawn(speakers: Tensor, anchors: Tensor, num_samples: int = 64) -> Episodes:
    """Return a batch with noise for voices, silent where there is nobody."""
    torch.manual_seed(0)
    noise = torch.randn(*speakers.shape, num_samples)
    return episodes(speakers, anchors, noise * (speakers != NOBODY).unsqueeze(-1))


def test_a_voice_is_asked_for_by_another_recording_of_it() -> None:
    batch = drawn(torch.tensor([[[0, 1], [2, 0], [0, 3]]]), torch.tensor([0]))
    told = asked(batch)
    voices = batch.references[0, [0, 1, 2], [0, 1, 0]]
    torch.testing.assert_close(told.targets, voices)
    torch.testing.assert_close(told.enrolments, voices.roll(-1, 0))
    assert told.present.all()
    assert told.usable.all()


def test_who_is_not_there_is_asked_for_all_the_same() -> None:
    batch = drawn(torch.tensor([[[2, NOBODY], [0, 1], [0, 3]]]), torch.tensor([0]))
    told = asked(batch)
    assert told.present.tolist() == [False, True, True]
    assert told.usable.all()
    assert not told.targets[0].any()
    torch.testing.assert_close(told.enrolments[0], batch.references[0, 1, 0])
    torch.testing.assert_close(told.enrolments[2], batch.references[0, 1, 0])


@pytest.mark.parametrize("speakers", [[[[0, 1]]], [[[0, 1], [2, NOBODY]]]])
def test_a_voice_is_never_asked_for_by_the_recording_it_is_in(
    speakers: list[list[list[int]]],
) -> None:
    told = asked(drawn(torch.tensor(speakers), torch.tensor([0])))
    assert not told.usable[told.present].any()


@given(st.permutations(range(3)), st.integers(0, 2**31))
def test_the_order_of_references_asks_for_nothing_else(order: list[int], seed: int) -> None:
    torch.manual_seed(seed)
    speakers = torch.stack([torch.randperm(5)[:3] for _ in range(4)]).view(2, 2, 3)
    anchors = speakers[:, 0, 0]
    batch = drawn(speakers, anchors)
    other = batch._replace(
        references=batch.references[:, :, order], speakers=batch.speakers[:, :, order]
    )
    for mine, theirs in zip(asked(batch), asked(other), strict=True):
        torch.testing.assert_close(mine, theirs)


@given(st.integers(0, 2**31), st.sampled_from([0.1, 0.2, 0.5]))
def test_some_mixtures_are_asked_for_somebody_who_is_not_in_them(seed: int, share: float) -> None:
    torch.manual_seed(seed)
    speakers = torch.stack([torch.randperm(6)[:3] for _ in range(10)])[:, [[0, 1], [0, 2]]]
    batch = drawn(speakers, speakers[:, 0, 0])
    plain, told = asked(batch), asked(batch, share)
    lacks = told.present != plain.present
    assert not told.present[lacks].any()
    assert not told.targets[lacks].any()
    torch.testing.assert_close(told.enrolments[lacks], plain.enrolments.roll(-2, 0)[lacks])
    others = batch.anchors.roll(-1).repeat_interleave(2)[lacks]
    assert not (speakers.flatten(0, 1)[lacks] == others.unsqueeze(-1)).any()
    for mine, theirs in zip(told, plain, strict=True):
        torch.testing.assert_close(mine[~lacks], theirs[~lacks])


def test_as_many_are_asked_for_others_as_there_should_be() -> None:
    speakers = torch.arange(400).view(200, 1, 2).expand(200, 2, 2)  # each episode has its own
    batch = drawn(speakers, speakers[:, 0, 0], num_samples=2)
    assert asked(batch).present.all()
    assert (~asked(batch, 0.2).present).float().mean() == pytest.approx(0.2, abs=0.06)
    few = Episodes(*(part[:2] for part in batch[:-1] if part is not None))
    lacking = [(~asked(few, 0.2).present).float().mean() for _ in range(200)]
    assert np.mean(lacking) == pytest.approx(0.2, abs=0.06)


@pytest.mark.parametrize("kind", ["tcn-stft", "tcn-conv-mel", "galr-conv"])
def test_a_voice_is_the_unseparated_view_of_its_recording(kind: str) -> None:
    model, waveform = new_model(kind), torch.randn(2, 6001)
    expected = model.embed(waveform)[0][:, -1]
    torch.testing.assert_close(model.voice(waveform), expected, atol=1e-5, rtol=0)


def test_an_extractor_begins_as_the_separator_and_heeds_nobody() -> None:
    model = new_model("tcn-stft", extractor="film", num_slots=1)
    model.extractor.begin_with(model.state_dict())
    mixture, vectors = torch.randn(2, 4000), torch.randn(2, 16)
    torch.testing.assert_close(model.extracted(mixture, vectors), model.sources(mixture)[:, 0])


@pytest.mark.parametrize("extractor", ["film", "voicefilter"])
def test_what_is_extracted_follows_level_and_length(extractor: str) -> None:
    model = new_model("blstm-stft", extractor=extractor, extractor_channels=8)
    mixture, voice = torch.randn(5003), torch.randn(3001)
    made = model.extract(mixture, voice)
    assert made.shape == mixture.shape
    torch.testing.assert_close(model.extract(8 * mixture, voice), 8 * made, rtol=1e-3, atol=1e-3)
    assert not model.extract(torch.zeros(300), [voice, voice]).any()


def test_a_model_without_an_extractor_says_so() -> None:
    with pytest.raises(ValueError, match=r"no extractor: train one with train.task=extract"):
        new_model("tcn-stft").extract(torch.randn(900), torch.randn(900))


def test_only_the_extractor_learns() -> None:
    model = new_model("tcn-conv-mel", speaker_net="ecapa", ecapa_channels=16, extractor="film")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    objective = ExtractionObjective(model, 4).train()
    trained = [weight for weight in objective.parameters() if weight.requires_grad]
    batch = drawn(torch.tensor([[[0, 1], [2, 0]], [[3, 1], [2, 3]]]), torch.tensor([0, 3]), 4000)
    objective(batch).total.backward()
    assert all(weight.grad is not None for weight in trained)
    torch.optim.SGD(trained, 0.1).step()
    changed = {k for k, v in model.state_dict().items() if not torch.equal(v, before[k])}
    assert changed
    assert all(name.startswith("extractor.") for name in changed)


def configured(**settings: str) -> Config:
    """Return the configuration of a small model whose extractor is trained."""
    model = [f"model.{key}={value!r}" for key, value in FAST.items()]
    train = ["train.task='extract'", "train.init_from='folder'", "train.warmup_steps=0"]
    return load_config("demo", [*model, *train, *(f"{k}='{v}'" for k, v in settings.items())])


def loaded(dataset: Folder, split: str) -> EpisodeLoader:
    return EpisodeLoader(dataset, split, batch_size=4, seed=0)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("loss", ["snr", "power_law"])
@pytest.mark.parametrize("extractor", ["film", "voicefilter"])
def test_a_step_is_one_towards_the_voice_that_is_asked_for(
    dataset: Folder, extractor: str, loss: str
) -> None:
    """By either loss, on real mixtures, with the optimizer of a run; of the rest no bit changes."""
    config = configured(**{"model.extractor": extractor, "train.extraction_loss": loss})
    objective = new_objective(config, 100)
    before = {name: value.clone() for name, value in objective.state_dict().items()}
    stepper, batch = Stepper(config, objective), next(iter(loaded(dataset, "train").batches(0)))
    first, grad_norm = stepper.take(0, batch, Meter())
    second, _ = stepper.take(0, batch, Meter())
    assert second.total < first.total
    assert grad_norm > 0
    assert (first.total == first.separation_db) == (loss == "snr")
    after = objective.state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("model.extractor.") for name in changed)
    moved = {name for name, weight in objective.named_parameters() if weight.requires_grad}
    assert moved - changed == set()


@pytest.mark.usefixtures("one_thread")
def test_validation_is_what_extraction_gains_where_the_voice_is_not_alone(dataset: Folder) -> None:
    config = configured(**{"model.extractor": "film"})
    model, loader = new_objective(config, 100).model.eval(), loaded(dataset, "valid")
    torch.nn.init.normal_(model.extractor.early.told.weight)
    gains_db = []
    for batch in loader.batches(0):
        told = asked(to_episodes(batch, loader.rooms, 0, 0))
        for mixture, target, enrolment, present, usable in zip(*told, strict=True):
            if present and usable and not torch.allclose(mixture, target, atol=1e-4):
                made = model.extract(mixture, enrolment)
                gains_db.append(snr_db(made, target) - snr_db(mixture, target))
    found = Validator(config, None, loader, 0, 1).measure(model)
    assert math.isnan(found.eer)
    assert len(gains_db) > 4
    expected = float(torch.stack(gains_db).mean())
    assert found.improvement_db == pytest.approx(expected, abs=1e-3)


def test_what_is_left_of_a_voice_that_is_not_there_is_counted_in_db() -> None:
    mixture = torch.randn(2, 5000)
    levels = leak_db(mixture * torch.tensor([[0.1], [0.0]]), mixture)
    torch.testing.assert_close(levels, torch.tensor([10 * math.log10(0.011), -30.0]))


def test_the_power_law_loss_is_the_plain_formula() -> None:
    model = new_model("tcn-stft", extractor="film")
    estimate, target, mixture = torch.randn(3, 1, 2000).double()
    frontend = model.extractor.frontend.double()
    found = power_law_loss(estimate, target, mixture, frontend)
    hann = np.hanning(129)[:-1]
    level = np.sqrt(np.mean(mixture.numpy() ** 2))
    sides = []
    for signal in (estimate, target):
        padded = np.pad(signal.numpy()[0] / level, (64, 64 + 63))  # to the centre of a last frame
        frames = np.lib.stride_tricks.sliding_window_view(padded, 128)[::64] * hann
        sides.append(np.abs(np.fft.rfft(frames)) ** 0.3)
    expected = np.mean((sides[0] - sides[1]) ** 2)
    np.testing.assert_allclose(found.numpy(), [expected], rtol=1e-4)


@pytest.mark.usefixtures("one_thread")
def test_an_extractor_learns_whose_voice_to_let_through() -> None:
    """Both voices of each mixture are asked for in turn, and a third one that is not there."""
    first, second = crops(4).unbind(1)
    pairs = [(a, b) for a in range(4) for b in range(4) if a != b]
    speakers = torch.tensor([[[a, b], [a, NOBODY], [b, NOBODY]] for a, b in pairs])
    none = torch.zeros_like(first[0])
    voices = [
        torch.stack([first[a], first[b], second[a], none, second[b], none]).unflatten(0, (3, 2))
        for a, b in pairs
    ]
    batch = episodes(speakers, torch.tensor([a for a, _ in pairs]), torch.stack(voices))
    model = new_model(
        "blstm-stft", extractor="film", channels=48, hidden=64, speaker_features="mel"
    )
    objective = ExtractionObjective(model, 4)
    optimizer = torch.optim.Adam(model.extractor.parameters(), 5e-3)
    told = asked(batch)
    mixed = (told.mixtures - told.targets).any(-1) & told.present
    for step in range(600):  # when silence is learned after all hangs on rounding
        losses = objective(batch)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        if step % 20 == 19:
            made = model.eval().extracted(told.mixtures, model.voice(told.enrolments)).detach()
            if leak_db(made, told.mixtures)[~told.present].mean() < -6:
                break
    else:
        pytest.fail("nothing was learned of who is not there")
    gained = snr_db(made, told.targets) - snr_db(told.mixtures, told.targets)
    assert gained[mixed].mean() > 6
    assert snr_db(made, told.targets)[told.present & ~mixed].mean() > 5


@given(
    st.lists(st.integers(0, 40), max_size=12),
    st.integers(0, 30),
    st.integers(1, 30),
    st.integers(0, 30),
)
def test_blocks_of_any_size_come_back_whole_and_in_time(
    sizes: list[int], context: int, chunk: int, look_ahead: int
) -> None:
    signal, came, longest = torch.randn(sum(sizes)), 0, 0

    def blocks() -> Iterator[Tensor]:
        nonlocal came
        for block in signal.split(sizes):
            came += len(block)
            yield block

    def process(stretch: Tensor) -> Tensor:
        nonlocal longest
        longest = max(longest, len(stretch))
        return 2 * stretch

    pace, pieces, given_back = Pace(context, chunk, look_ahead, min(3, look_ahead, chunk)), [], 0
    for piece in streamed(process, blocks(), pace):
        pieces.append(piece)
        given_back += len(piece)
        assert given_back + look_ahead <= came or came == len(signal)
    torch.testing.assert_close(torch.cat([torch.empty(0), *pieces]), 2 * signal)
    assert longest <= context + chunk + look_ahead


def test_how_blocks_are_cut_changes_nothing() -> None:
    signal, pace = torch.randn(1000), Pace(50, 60, 20, 10)

    def normed(stretch: Tensor) -> Tensor:
        return stretch / stretch.abs().max()

    cut = [torch.cat(list(streamed(normed, signal.split(n), pace))) for n in (1, 7, 1000)]
    torch.testing.assert_close(cut[0], cut[1])
    torch.testing.assert_close(cut[0], cut[2])


@pytest.mark.parametrize(("context_s", "chunk_s", "look_ahead_s"), [(-1, 1, 1), (1, 0, 1)])
def test_a_pace_that_is_none_is_refused(
    context_s: float, chunk_s: float, look_ahead_s: float
) -> None:
    with pytest.raises(ValueError, match="the chunk"):
        Pace.of(16_000, context_s, chunk_s, look_ahead_s)
