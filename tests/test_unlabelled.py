"""Separation from recordings of nobody known: mixtures of mixtures alone, from files to masks."""

import math
from itertools import islice, permutations
from pathlib import Path

import pytest
import soundfile
import torch
from torch import Tensor

from csc_model.config import ModelConfig
from csc_model.losses import si_snr_db
from csc_model.mixit import Search
from csc_model.model import CSC
from csc_model.objective import Episodes, Objective
from jobs.config import Config, load_config
from jobs.meter import Meter
from jobs.stepper import Stepper, new_objective
from jobs.validation import Validator
from pipeline.build import build, dataset_id
from pipeline.corpora import CorpusConfig
from pipeline.loader import EpisodeLoader
from pipeline.schema import SAMPLE_RATE_HZ
from pipeline.shards import read_catalogue
from pipeline.storage import Folder
from tests.conftest import make_store, serially, voice
from tests.whole_run import SMALL

pytestmark = pytest.mark.usefixtures("one_thread")

RECORDINGS = 20
ALONE = [
    "ingest.splits={valid_share=0.4,test_share=0.0}",
    "build.mixing.mixit_share=1.0",
    "build.mixing.conditions=1",
    "build.mixing.interferer_shares=[0.0,0.0,0.0,1.0]",
    "build.mixing.noise_share=0.0",
    "build.train_episodes=16",
    "build.valid_episodes=8",
    "model.num_slots=4",
    "train.contrastive_weight=0.0",
    "train.workers=1",
    "train.steps=2",
    "train.mixit='least_squares'",
]


def configured(workspace: Path, recordings: Path) -> Config:
    """Return the configuration of a run on a folder of recordings."""
    config = load_config("demo", [*SMALL, *ALONE, f"workspace='{workspace}'"])
    corpus = CorpusConfig(name="found", root=str(recordings), layout="unlabelled")
    ingest = config.ingest.model_copy(update={"corpora": [corpus]})
    return config.model_copy(update={"ingest": ingest})


def test_separation_is_trained_on_ingested_audio_of_nobody_known(tmp_path: Path) -> None:
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    for number in range(RECORDINGS):
        sound = voice(number, 0, 2.0)
        soundfile.write(recordings / f"r{number:02d}.flac", sound, SAMPLE_RATE_HZ)
    config = configured(tmp_path / "work", recordings)
    store = make_store(tmp_path / "store", config.ingest)
    assert set(read_catalogue(store)["label_kind"].to_pylist()) == {"pseudo"}
    dataset = Folder.at(tmp_path).child(
        dataset_id(store.read_json("index.json"), config.build, config.seed)
    )
    speakers = build(dataset, store, config.build, config.seed, serially)["speakers"]
    train, valid = (
        EpisodeLoader(dataset, split, batch_size=8, seed=1, remix=split == "train")
        for split in ("train", "valid")
    )
    stepper = Stepper(config, new_objective(config, len(speakers)))
    before = {name: value.clone() for name, value in stepper.objective.model.state_dict().items()}
    for step, batch in enumerate(islice(train.endless(), config.train.steps)):
        assert batch.mixit.all()
        losses, grad_norm = stepper.take(step, batch, Meter())
        assert losses.total == pytest.approx(0.1 * losses.separation_db.item())
        assert grad_norm > 0
    after = stepper.objective.model.state_dict()
    changed = {name.partition(".")[0] for name in after if not after[name].equal(before[name])}
    assert "trunk" in changed
    assert not changed & {"attention", "pool", "active"}
    found = Validator(config, store, valid, 0, 1).measure(stepper.judged())
    assert math.isnan(found.eer)
    assert math.isfinite(found.improvement_db)


BANDS_HZ = ((300, 900), (1200, 2000), (2500, 3500), (4200, 6000))


def sources(count: int, draw: torch.Generator) -> Tensor:
    """Return noise in each band, the bands in an order of its own: `(count, 4, time)`."""
    spectra = torch.fft.rfft(torch.randn(count, 4, 4000, generator=draw))
    hz = torch.fft.rfftfreq(4000, 1 / SAMPLE_RATE_HZ)
    inside = torch.stack([(hz >= low) & (hz < high) for low, high in BANDS_HZ])
    signals = torch.fft.irfft(spectra * inside, 4000)
    order = torch.rand(count, 4, generator=draw).argsort(-1).unsqueeze(-1).expand_as(signals)
    return (0.1 * signals / signals.std(-1, keepdim=True)).gather(1, order)


def mixtures_of_mixtures(count: int, draw: torch.Generator) -> Episodes:
    two = sources(count, draw).unflatten(1, (2, 2)).sum(2)
    references = torch.cat([two, torch.zeros_like(two)], 1).unsqueeze(1)
    return Episodes(
        references.sum(2),
        references,
        torch.full((count, 1, 4), -1),
        torch.zeros(count, dtype=torch.int64),
        torch.ones(count, 1, 1, dtype=torch.bool),
        torch.ones(count, dtype=torch.bool),
    )


def gain_db(model: CSC) -> float:
    """Return the gain in SI-SNR of two sources over their mixture, on the outputs that fit best."""
    true = sources(16, torch.Generator().manual_seed(1))[:, :2]
    mixed = true.sum(1)
    with torch.inference_mode():
        pairs = si_snr_db(model.sources(mixed).unsqueeze(2), true.unsqueeze(1))
    ways = [pairs[:, first, 0] + pairs[:, second, 1] for first, second in permutations(range(4), 2)]
    best = torch.stack(ways).amax(0).mean() / 2
    return float(best - si_snr_db(mixed.unsqueeze(1).expand_as(true), true).mean())


@pytest.mark.parametrize("search", ["all", "least_squares"])
def test_mixtures_of_mixtures_alone_teach_to_separate_true_sources(search: Search) -> None:
    """No source is ever shown: which go together is by chance, so that none can stay together."""
    torch.manual_seed(0)
    config = ModelConfig(
        num_slots=4, frontend="stft", window=256, hop=128, trunk="tcn", channels=32, hidden=32,
        shared_blocks=2, separation_blocks=1, speaker_blocks=1, embedding_dim=16,
    )  # fmt: skip
    module = Objective(CSC(config), 1, separation_only=True, mixit=search)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer, draw = torch.optim.Adam(trained, lr=5e-3), torch.Generator().manual_seed(2)
    assert gain_db(module.model) < 3
    for _ in range(30):
        losses = module(mixtures_of_mixtures(8, draw))
        optimizer.zero_grad()
        losses.total.backward()
        torch.nn.utils.clip_grad_norm_(trained, 5.0)
        optimizer.step()
    assert gain_db(module.model) > 15
