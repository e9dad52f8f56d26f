"""Models on disk: the same ones come back, and what cannot be read is named."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from csc_model.config import MODEL_VERSION
from csc_model.model import ACTIVE, CONFIG_FILE, CSC, WEIGHTS_FILE
from tests.conftest import voice
from tests.small_models import SMALL, new_model

VERSION_1_FIELDS = [
    "sample_rate_hz",
    "num_slots",
    "frontend",
    "window",
    "hop",
    "num_bins",
    "channels",
    "trunk",
    "hidden",
    "shared_blocks",
    "separation_blocks",
    "speaker_blocks",
    "segment",
    "queries",
    "dropout",
    "attention_heads",
    "embedding_dim",
]


def describe(folder: Path, **changes: Any) -> None:
    """Change what a model says of itself."""
    path = folder / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("kind", SMALL)
def test_a_saved_model_is_the_same_model(kind: str, tmp_path: Path) -> None:
    model = new_model(kind)
    model.save(tmp_path)
    waveform = torch.from_numpy(voice(1, 1))
    loaded = CSC.load(tmp_path)
    assert not loaded.training
    assert loaded.config == model.config
    for again, before in zip(loaded.embed(waveform), model.embed(waveform), strict=True):
        assert torch.equal(again, before)


def test_a_model_says_what_it_is(tmp_path: Path) -> None:
    new_model("tcn-stft").save(tmp_path)
    about = json.loads((tmp_path / CONFIG_FILE).read_text())
    assert about["version"] == MODEL_VERSION
    assert about["config"]["trunk"] == "tcn"


@pytest.mark.parametrize("kind", ["galr-conv", "tcn-stft"])
def test_a_model_of_version_1_is_read_with_every_slot_active(kind: str, tmp_path: Path) -> None:
    model = new_model(kind)
    model.save(tmp_path)
    config = model.config.model_dump()
    describe(tmp_path, version=1, config={name: config[name] for name in VERSION_1_FIELDS})
    weights = load_file(tmp_path / WEIGHTS_FILE)
    save_file(
        {name: weight for name, weight in weights.items() if not name.startswith("active.")},
        tmp_path / WEIGHTS_FILE,
    )
    with pytest.warns(UserWarning, match="counts as a speaker"):
        loaded = CSC.load(tmp_path)
    waveform = torch.from_numpy(voice(1, 1))
    vectors, activity = loaded.embed(waveform)
    assert torch.equal(vectors, model.embed(waveform)[0])
    assert (activity > ACTIVE).all()


@pytest.mark.parametrize("version", [2, 3])
def test_a_model_from_before_ecapa_and_extractors_is_the_same_model(
    version: int, tmp_path: Path
) -> None:
    model = new_model("tcn-conv-mel")
    model.save(tmp_path)
    later = {"extractor", "extractor_channels"}
    later |= {"speaker_net", "ecapa_channels"} if version == 2 else set()
    describe(tmp_path, version=version, config=model.config.model_dump(exclude=later))
    loaded = CSC.load(tmp_path)
    assert loaded.config == model.config
    waveform = torch.from_numpy(voice(1, 1))
    for again, before in zip(loaded.embed(waveform), model.embed(waveform), strict=True):
        assert torch.equal(again, before)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"version": 99}, "version 99 is newer.*update csc"),
        ({"version": None}, "no model version"),
        ({"config": {"trunk": "unheard_of"}}, "not one of galr"),
        ({"config": {"chanels": 3}}, "chanels"),
    ],
)
def test_a_configuration_that_cannot_be_used_is_refused(
    changes: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    new_model("tcn-stft").save(tmp_path)
    describe(tmp_path, **changes)
    with pytest.raises(ValueError, match=rf"(?s){re.escape(str(tmp_path))}.*{reason}"):
        CSC.load(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"version": 2'])
def test_a_damaged_configuration_is_named(text: str, tmp_path: Path) -> None:
    new_model("tcn-stft").save(tmp_path)
    (tmp_path / CONFIG_FILE).write_text(text)
    with pytest.raises(ValueError, match=CONFIG_FILE):
        CSC.load(tmp_path)


@pytest.mark.parametrize("kept", [0, 7, 1000, -1])
def test_damaged_weights_are_named(kept: int, tmp_path: Path) -> None:
    new_model("tcn-stft").save(tmp_path)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(ValueError, match=f"{WEIGHTS_FILE}: damaged"):
        CSC.load(tmp_path)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_weights_that_are_no_numbers_are_named(value: float, tmp_path: Path) -> None:
    new_model("tcn-stft").save(tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    weights["pool.project.weight"][0, 0] = value
    save_file(weights, tmp_path / WEIGHTS_FILE)
    with pytest.raises(ValueError, match=r"pool\.project\.weight holds values that are no numbers"):
        CSC.load(tmp_path)


@pytest.mark.parametrize("file", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_file_that_is_missing_is_named(file: str, tmp_path: Path) -> None:
    new_model("tcn-stft").save(tmp_path)
    (tmp_path / file).unlink()
    with pytest.raises(FileNotFoundError, match=file):
        CSC.load(tmp_path)


def test_weights_of_another_shape_are_named_with_both_shapes(tmp_path: Path) -> None:
    model = new_model("tcn-stft")
    model.save(tmp_path)
    describe(tmp_path, config=model.config.model_dump() | {"mel_bands": 40, "channels": 32})
    shapes = r"has shape \(.*16.*\), the configuration asks for \(.*32.*\); .*same folder"
    with pytest.raises(ValueError, match=shapes):
        CSC.load(tmp_path)


@pytest.mark.parametrize(("blocks", "fault"), [(3, "lacks"), (1, "has in excess")])
def test_weights_of_another_depth_are_refused(blocks: int, fault: str, tmp_path: Path) -> None:
    model = new_model("tcn-stft")
    model.save(tmp_path)
    describe(tmp_path, config=model.config.model_dump() | {"shared_blocks": blocks})
    with pytest.raises(ValueError, match=rf"{fault} trunk.shared.{min(blocks, 2)}.*more"):
        CSC.load(tmp_path)
