"""The learning campaign: which trainings its systems share, and the figure against alpha."""

from pathlib import Path

import numpy as np
import pytest

from csc_model.metrics import Interval
from jobs.config import load_config
from pipeline.errors import CscError
from pipeline.shards import read_catalogue
from pipeline.sides import TrialAudio, from_store
from pipeline.storage import Folder
from pipeline.trials import make_trials
from tests.benchmarks.campaign.__main__ import configured, stage_folder
from tests.benchmarks.campaign.figure import by_alpha, draw
from tests.benchmarks.campaign.scoring import Judge, write_scores
from tests.benchmarks.campaign.systems import BY_ALPHA, CSC_SYSTEMS


def test_systems_by_alpha_share_their_separator_and_differ_in_alpha_alone() -> None:
    folders = {stage_folder(Path("root"), name, 0, 3) for name in BY_ALPHA.values()}
    assert folders == {Path("root/csc/3/stage-0")}
    heads = {stage_folder(Path("root"), name, 1, 3) for name in BY_ALPHA.values()}
    assert len(heads) == len(BY_ALPHA) == 4
    configs = {alpha: configured(CSC_SYSTEMS[name][1], 3, []) for alpha, name in BY_ALPHA.items()}
    for alpha, config in configs.items():
        contrast = config.train.contrast
        assert (contrast.alpha, contrast.set, contrast.label_free) == (alpha, "batch", True)
        same = contrast.model_copy(update={"alpha": 0.0})
        train = config.train.model_copy(update={"contrast": same})
        assert config.model_copy(update={"train": train}) == configs[0.0]


def test_the_figure_has_what_was_scored(store: Folder, tmp_path: Path) -> None:
    given = ["evaluate.trials.utterances_per_speaker=3", "evaluate.bootstrap_replicates=100"]
    config = load_config("demo", given)
    trials = make_trials(read_catalogue(store), "test", config.evaluate.trials, seed=1)
    judge = Judge(config, trials, TrialAudio(from_store(store), trials))
    figure, rng = tmp_path / "figures/alpha.svg", np.random.default_rng(0)
    for alpha in (0.0, 0.2):
        folder = tmp_path / BY_ALPHA[alpha] / "1"
        folder.mkdir(parents=True)
        if alpha:  # one system alone shows nothing
            with pytest.raises(CscError, match=r"scores of 1 of csc_label_free, .*two are needed"):
                by_alpha(tmp_path, judge, figure)
        scores = {
            name: trials.target + rng.normal(0, 0.1 + alpha, len(trials.target))
            for name in trials.conditions
        }
        write_scores(folder, "test", scores, {"core_s": 1.0})
    assert not figure.exists()
    lines = by_alpha(tmp_path, judge, figure).splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| 0.0", "| 0.2"]
    assert lines[2].split(" | ")[2].startswith("0.0 [0.0, 0.0]")
    assert ", +" in lines[3]
    drawn = figure.read_text()
    assert all(f">{name}</text>" in drawn for name in trials.conditions)
    assert len(drawn) < 100_000


def test_the_same_numbers_make_the_same_bytes() -> None:
    rates = {0.0: [Interval(0.2, 0.1, 0.3)], 0.1: [Interval(0.1, 0.05, 0.2)]}
    assert draw(rates, ["clean"]) == draw(rates, ["clean"])
