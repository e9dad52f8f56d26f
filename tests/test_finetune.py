"""A model that is trained further keeps what it knew, and makes room for new speakers."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from csc_model.contrast import ContrastConfig
from csc_model.model import CSC
from csc_model.objective import Objective
from jobs.config import Config, load_config
from jobs.finetune import (
    BASE,
    SPEAKERS_FILE,
    begin_model,
    begin_with,
    fetch_base,
    keep_voices,
    save_table,
    table_of,
)
from pipeline.errors import CscError
from pipeline.storage import Folder

SIZES = ["model.channels=8", "model.hidden=8", "model.embedding_dim=8", "model.window=64"]


def objective(config: Config, speakers: int, seed: int) -> Objective:
    torch.manual_seed(seed)
    return Objective(CSC(config.model), speakers)


def saved(root: Path, config: Config, speakers: list[str]) -> Objective:
    """Write a model as a run exports it, below `root/model`."""
    made = objective(config, len(speakers), seed=1)
    made.model.save(root / "model")
    save_table(root / "model", table_of(made))
    (root / "model" / "speakers.json").write_text(json.dumps(speakers))
    return made


def configured(root: Path, *more: str) -> Config:
    return load_config("demo", [*SIZES, "model.hop=32", f"train.init_from='{root}'", *more])


def test_known_speakers_keep_their_vectors_and_new_ones_get_their_own(tmp_path: Path) -> None:
    config = configured(tmp_path)
    before = saved(tmp_path, config, ["a", "b", "c"])
    run = Folder.at(tmp_path / "run")
    fetch_base(config, run)
    after = objective(config, 4, seed=2)
    fresh = after.table.detach().clone()
    assert begin_with(after, run, ["b", "new", "c", "z"]) == 2
    for ours, theirs in zip(after.model.parameters(), before.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert torch.equal(after.table[[0, 2]], before.table[[1, 2]])
    assert torch.equal(after.table[[1, 3]], fresh[[1, 3]])
    assert after.table.requires_grad


def test_a_run_begins_with_a_version_or_with_what_a_training_left(tmp_path: Path) -> None:
    saved(tmp_path, configured(tmp_path), ["a"])
    for number, begun_with in enumerate((tmp_path, tmp_path / "model")):
        run = Folder.at(tmp_path / f"run{number}")
        fetch_base(configured(begun_with), run)
        assert run.exists(f"{BASE}/model.json")


@pytest.mark.parametrize("learned", [True, False])
def test_only_a_scale_that_is_learned_is_taken_over(tmp_path: Path, learned: bool) -> None:
    config = configured(tmp_path)
    before = saved(tmp_path, config, ["a"])
    run = Folder.at(tmp_path / "run")
    fetch_base(config, run)
    contrast = ContrastConfig(scale=30.0, learn_scale=learned)
    after = Objective(CSC(config.model), 1, contrast=contrast)
    fixed = after.raw_scale.detach().clone()
    begin_with(after, run, ["a"])
    assert torch.equal(after.raw_scale, before.raw_scale if learned else fixed)
    assert not torch.equal(fixed, before.raw_scale)


def test_a_model_without_its_speakers_gives_its_weights(tmp_path: Path) -> None:
    config = configured(tmp_path)
    before = saved(tmp_path, config, ["a"])
    (tmp_path / "model" / "speakers.json").unlink()
    run = Folder.at(tmp_path / "run")
    fetch_base(config, run)
    after = objective(config, 2, seed=2)
    assert begin_with(after, run, ["a", "b"]) == 0
    assert torch.equal(next(after.model.parameters()), next(before.model.parameters()))


def test_other_sizes_are_named(tmp_path: Path) -> None:
    saved(tmp_path, configured(tmp_path), ["a"])
    other = configured(tmp_path, "model.channels=16", "model.shared_blocks=1")
    with pytest.raises(CscError, match=r"set model\.channels=8, model\.shared_blocks=4"):
        fetch_base(other, Folder.at(tmp_path / "run"))


def test_what_has_no_weights_may_differ(tmp_path: Path) -> None:
    before = saved(tmp_path, configured(tmp_path), ["a"])
    other = ("model.dropout=0.3", "model.checkpointing=true", "model.detach_separation=true")
    config, run = configured(tmp_path, *other), Folder.at(tmp_path / "run")
    fetch_base(config, run)
    after = objective(config, 1, seed=2)
    begin_with(after, run, ["a"])
    weights = after.model.state_dict()
    assert all(torch.equal(weights[k], v) for k, v in before.model.state_dict().items())


def test_a_folder_without_a_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(CscError, match=r"train\.init_from"):
        fetch_base(configured(tmp_path), Folder.at(tmp_path / "run"))


def test_what_was_fetched_stays(tmp_path: Path) -> None:
    """A resumed run begins with what it began with, whatever became of the version since."""
    config = configured(tmp_path)
    saved(tmp_path, config, ["a"])
    run = Folder.at(tmp_path / "run")
    fetch_base(config, run)
    whole = run.read(f"{BASE}/model.safetensors")
    save_file({"x": torch.zeros(1)}, tmp_path / "model" / "model.safetensors")
    fetch_base(config, run)
    assert run.read(f"{BASE}/model.safetensors") == whole


def extracting(root: Path, *more: str) -> Config:
    return configured(root, "train.task='extract'", "model.extractor='film'", *more)


def test_an_extractor_begins_beside_the_model_it_is_for(tmp_path: Path) -> None:
    before = saved(tmp_path, configured(tmp_path), ["a"])
    config, run = extracting(tmp_path), Folder.at(tmp_path / "run")
    fetch_base(config, run)
    after = objective(config, 1, seed=2)
    begin_with(after, run, ["a"])
    weights, kept = after.model.state_dict(), before.model.state_dict()
    assert all(torch.equal(weights[name], value) for name, value in kept.items())
    for name in ("bottleneck.1.weight", "trunk.shared.0"):  # as the separator hears
        parts = {key: value for key, value in kept.items() if key.startswith(name)}
        assert parts
        assert all(torch.equal(weights[f"extractor.{key}"], value) for key, value in parts.items())


def test_an_extractor_goes_on_or_is_left_behind(tmp_path: Path) -> None:
    config = extracting(tmp_path)
    before = saved(tmp_path, config, ["a"])
    for number, wanted in enumerate((config, configured(tmp_path))):
        run = Folder.at(tmp_path / f"run{number}")
        fetch_base(wanted, run)
        after = objective(wanted, 1, seed=2)
        begin_with(after, run, ["a"])
        theirs = before.model.state_dict()
        own = after.model.state_dict()
        assert all(torch.equal(value, theirs[name]) for name, value in own.items())
        assert (len(own) == len(theirs)) == (number == 0)


@pytest.mark.parametrize(("extractor", "same"), [("film", True), ("voicefilter", False)])
def test_an_extractor_stays_where_only_what_it_does_not_use_differs(
    tmp_path: Path, extractor: str, same: bool
) -> None:
    sizes = (f"model.extractor='{extractor}'", "model.frontend='stft'")
    before, model = (
        objective(extracting(tmp_path, *sizes, f"model.extractor_channels={n}"), 1, seed=n).model
        for n in (8, 16)
    )
    begin_model(model, before)
    own, theirs = (dict(one.extractor.named_parameters()) for one in (model, before))
    taken = [torch.equal(own[name], value) for name, value in theirs.items()]
    assert all(taken) if same else not all(taken)


def test_an_extractor_is_not_trained_for_a_model_that_tells_no_voices_apart(tmp_path: Path) -> None:
    saved(tmp_path, configured(tmp_path), [])
    with pytest.raises(CscError, match="tells no voices apart"):
        fetch_base(extracting(tmp_path), Folder.at(tmp_path / "run"))
    fetch_base(configured(tmp_path), Folder.at(tmp_path / "further"))


def test_a_run_of_an_extractor_ends_with_the_voices_it_began_with(tmp_path: Path) -> None:
    config, run = extracting(tmp_path), Folder.at(tmp_path / "run")
    before = saved(tmp_path, configured(tmp_path), ["a", "b"])
    fetch_base(config, run)
    run.put_json(SPEAKERS_FILE, [])
    keep_voices(run)
    after = objective(configured(tmp_path), 2, seed=2)
    objective(config, 2, seed=1).model.save(tmp_path / "run" / "model")
    for name in ("speakers.json", "table.safetensors"):
        (tmp_path / "run" / "model" / name).write_bytes(run.read(name))
    further = Folder.at(tmp_path / "further")
    fetch_base(configured(tmp_path / "run"), further)
    assert begin_with(after, further, ["b", "new"]) == 1
    assert torch.equal(after.table[0], before.table[1])
