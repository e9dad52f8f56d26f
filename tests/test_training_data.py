"""Training on a dataset that is there: which fits, and what judges it."""

import math
from itertools import islice
from pathlib import Path

import pytest

from jobs.config import Config, load_config
from jobs.meter import Meter
from jobs.stepper import Stepper, new_objective
from jobs.submission import places
from jobs.train import model_id
from jobs.training_data import named
from jobs.validation import Validator
from pipeline.datasets import read_dataset
from pipeline.errors import CscError
from pipeline.loader import EpisodeLoader
from pipeline.plan import Forgotten, remember_forgotten, secret_name
from pipeline.schema import SPEAKERS_FILE
from pipeline.storage import Folder
from tests.librimix_files import Files, write_files
from tests.whole_run import SMALL, ask, csc, only

EXTRACT = ("train.task='extract'", "train.init_from='m'", "model.extractor='film'")
SIZES = ["train.batch_size=4", "train.workers=1", "train.remix=false", "train.steps=2"]


@pytest.fixture(scope="module")
def workspace_of_imports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LibriMix of four speakers to train on, and of the same four called otherwise to judge by."""
    root = tmp_path_factory.mktemp("imports")
    files = write_files(root / "files", 2, rows=8)
    for options in ({"split": "train"}, {"split": "valid", "corpus": "others"}):
        files.imported(root / "work/mixtures", seconds=0.5, **options)
    return root / "work"


def id_of(workspace: Path, split: str) -> str:
    found = [read_dataset(Folder.at(path)) for path in (workspace / "mixtures").iterdir()]
    (dataset,) = (one for one in found if one.episodes[split])
    return dataset.id


def configured(workspace: Path, dataset: str | None, valid: str | None, *more: str) -> Config:
    names = {"dataset": dataset, "valid_dataset": valid}
    asked = [f"train.{key}='{name}'" for key, name in names.items() if name is not None]
    return load_config("demo", [*SMALL, *SIZES, f"workspace='{workspace}'", *asked, *more])


def test_an_imported_dataset_is_trained_on_and_judged_by_separation(
    workspace_of_imports: Path,
) -> None:
    train, valid = (id_of(workspace_of_imports, split) for split in ("train", "valid"))
    data, config = named(configured(workspace_of_imports, train[:6], valid))
    assert (data.dataset.uri.endswith(train), data.valid.uri.endswith(valid)) == (True, True)
    assert data.store is None
    assert config.build.mixing.conditions == 1  # as it was imported, not as is configured
    assert config.train.dataset is None
    about = read_dataset(data.dataset).about
    stepper = Stepper(config, new_objective(config, len(about["speakers"])))
    loaders = [
        EpisodeLoader(folder, split, batch_size=4, seed=config.seed)
        for folder, split in ((data.dataset, "train"), (data.valid, "valid"))
    ]
    for step, batch in enumerate(islice(loaders[0].endless(), 2)):
        losses, _ = stepper.take(step, batch, Meter())
        assert losses.contrastive_nats > 0
    found = Validator(config, data.store, loaders[1], 0, 1).measure(stepper.judged())
    assert math.isnan(found.eer)
    assert math.isfinite(found.improvement_db)


def test_what_judges_a_model_is_part_of_its_name(workspace_of_imports: Path) -> None:
    train, valid = (id_of(workspace_of_imports, split) for split in ("train", "valid"))
    data, config = named(configured(workspace_of_imports, train, valid))
    about = read_dataset(data.dataset).about
    names = {
        model_id(about, config, data.differs),
        model_id(about, config, data._replace(valid=data.dataset).differs),
        model_id(about, config),
    }
    assert len(names) == 3
    asked = configured(workspace_of_imports, train, valid)
    assert model_id(about, asked, data.differs) in names  # how it was asked for is not


def test_what_does_not_fit_is_refused_with_what_to_do(
    workspace_of_imports: Path, tmp_path: Path
) -> None:
    work = workspace_of_imports
    train, valid = (id_of(work, split) for split in ("train", "valid"))
    three = ("model.num_slots=3", "build.mixing.interferer_shares=[0.0,0.5,0.5]")
    whole = files_of(tmp_path / "whole").imported(tmp_path / "mixtures")
    same = files_of(tmp_path / "same").imported(tmp_path / "mixtures", seconds=0.5, split="valid")
    built = copy_with(work / "mixtures" / train, tmp_path / "built", store="gone")
    old = copy_with(work / "mixtures" / train, tmp_path / "old", version=1)
    slow = copy_with(work / "mixtures" / train, tmp_path / "slow", sample_rate_hz=8000)
    for dataset, judge, more, reason in (
        ("nothing", None, (), "there is no dataset 'nothing'"),
        (train, None, (), "no valid mixtures .* --valid-dataset"),
        (valid, None, (), "0 train episodes, fewer than one batch of 4"),
        (train, valid, three, r"up to 2 speakers and the model 3 slots: set model\.num_slots=2"),
        (train, valid, ("train.batch_size=16",), "8 train episodes, fewer than one batch of 16"),
        (train, same.uri, (), r"4 speaker\(s\), as librispeech/100, .* are in the training"),
        (whole.uri, valid, (), "different lengths.*--seconds"),
        (built, valid, (), "the store it was built from is not here: copy the utterances/"),
        (train, built, (), "the store it was built from is not here: copy the utterances/"),
        (train, valid, EXTRACT, f"{valid} has no two mixtures of one voice"),
        (old, valid, (), "data version 1, this program reads"),
        (slow, valid, (), "audio at 8000 Hz, this program works at 16000"),
        (train, valid, ("train.remix=true",), "episodes_per_group 8, and a worker's share"),
    ):
        with pytest.raises(CscError, match=reason):
            named(configured(work, dataset, judge, *more))


def files_of(root: Path) -> Files:
    return write_files(root, 2, rows=8)


def copy_with(folder: Path, to: Path, **changes: object) -> str:
    """Return the address of a dataset of whose index something is changed."""
    index = Folder.at(folder).read_json("index.json")
    Folder.at(to).put_json("index.json", index | changes)
    Folder.at(to).put(SPEAKERS_FILE, (folder / SPEAKERS_FILE).read_bytes())
    return str(to)


def test_valid_mixtures_are_counted_where_they_are_taken_from(
    workspace_of_imports: Path, tmp_path: Path
) -> None:
    work = workspace_of_imports
    train, valid = (id_of(work, split) for split in ("train", "valid"))
    build = read_dataset(Folder.at(work / "mixtures" / train)).config
    few = build.model_copy(update={"valid_episodes": 1})
    name = copy_with(work / "mixtures" / train, tmp_path, config={"build": few.model_dump()})
    _, config = named(configured(work, name, valid))
    assert config.build.valid_episodes == 8


def test_who_was_forgotten_is_not_trained_on_by_way_of_an_import(
    workspace_of_imports: Path, tmp_path: Path
) -> None:
    train, valid = (workspace_of_imports / "mixtures" / id_of(workspace_of_imports, split)
                    for split in ("train", "valid"))  # fmt: skip
    for name in ("librispeech/101", "others/103"):
        work = tmp_path / name
        remember_forgotten(
            Folder.at(work / "utterances" / "any"), Forgotten({secret_name(name)}, set())
        )
        with pytest.raises(CscError, match=f"1 speaker.s. that csc forget removed, as {name}"):
            named(configured(work, str(train), str(valid)))


def test_the_command_passes_the_names_on_and_other_stages_refuse_them(
    workspace_of_imports: Path,
) -> None:
    train = id_of(workspace_of_imports, "train")
    sizes = [word for text in SIZES for word in ("--set", text)]
    code, said = ask("train", workspace_of_imports, *sizes, "--dataset", train)
    assert (code, "has no valid mixtures" in said) == (1, True)
    code, said = ask("train", workspace_of_imports, *sizes, "--valid-dataset", train)
    assert (code, "valid_dataset stands beside dataset" in said) == (1, True)
    for stage in ("evaluate", "register", "promote", "run"):
        code, said = ask(stage, workspace_of_imports, "--set", f"train.dataset='{train}'")
        assert (code, "train.dataset is for csc train alone" in said) == (1, True), said


def test_a_dataset_that_is_named_by_a_path_is_a_place_and_one_by_an_id_is_none() -> None:
    config = configured(Path("/work"), "imports/3f2a", "77c1")
    assert dict(places(config))["train.dataset"] == "imports/3f2a"
    assert "train.valid_dataset" not in dict(places(config))


@pytest.mark.cluster
def test_an_import_becomes_a_model_by_one_command(workspace_of_imports: Path) -> None:
    train, valid = (id_of(workspace_of_imports, split) for split in ("train", "valid"))
    sizes = [word for text in SIZES for word in ("--set", text)]
    names = ("--dataset", train, "--valid-dataset", valid)
    done = csc("train", workspace_of_imports, *sizes, *names)
    assert done.returncode == 0, done.stderr
    assert "chosen by separation alone" in done.stdout
    model = only(workspace_of_imports / "models").read_json("index.json")
    assert (model["dataset"], model["valid_dataset"], model["store"]) == (train, valid, None)
    assert model["speakers"] == [f"librispeech/{100 + number}" for number in range(4)]
    assert model["best_valid_eer"] is None
    assert math.isfinite(model["best_valid_improvement_db"])
    code, said = ask("status", workspace_of_imports, *sizes, "--set", f"train.dataset='{train}'",
                     "--set", f"train.valid_dataset='{valid}'")  # fmt: skip
    assert (code, model["id"] in said, "2 steps" in said) == (0, True, True)
