"""Configuration errors name the key, the place and the nearest valid key."""

from pathlib import Path

import pytest

from jobs.config import load_config
from pipeline.errors import CscError


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.lrr=1", "--set train.lrr=1: unknown key train.lrr; did you mean train.lr?"),
        ("lr=1", "unknown key lr; did you mean train.lr?"),
        ("trian.lr=1", "--set trian.lr=1: unknown key trian; did you mean train"),
        ("ingest.corpora.0.rot='x'", "did you mean ingest.corpora.0.root?"),
        ("train.steps=1.5", "--set train.steps=1.5: train.steps: .*integer"),
        ("train.lr='fast'", "train.lr: .*number.*'fast'"),
        ("train.lr=-1", "train.lr: .*greater than 0"),
        ("train.workers=3", "--set train.workers=3: train: batch_size 16 is not a multiple"),
        ("model.hop=1024", "model: hop 1024 leaves gaps"),
        ("model.num_slots=3", "model.num_slots is 3 .* mixtures of 2 speakers"),
        ("build.mixing.sir_min_db=20", "sir_min_db is above sir_max_db"),
        ("promote.guarded=['sir_9_db']", "promote.guarded names sir_9_db"),
        ("ingest.corpora.7.name='x'", "there is no such key"),
        ("train.lr", "write it as key=value"),
    ],
)
def test_a_wrong_override_is_explained(override: str, said: str) -> None:
    with pytest.raises(CscError, match=said.replace("?", r"\?")):
        load_config("demo", [override])


FOUR = ["model.num_slots=4", "build.mixing.interferer_shares=[0.1,0.2,0.3,0.4]"]
EXTRACT = ["train.task='extract'", "train.init_from='m'", "model.extractor='film'"]


def test_a_wrong_file_is_explained(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    with pytest.raises(CscError, match="no configuration"):
        load_config(str(path))
    path.write_text("seed = ")
    with pytest.raises(CscError, match=r"mine\.toml: .*; correct the file"):
        load_config(str(path))
    path.write_text("seed = 1\nsede = 2\n[[ingest.corpora]]\nname = 'a'\nroot = '.'\n")
    with pytest.raises(CscError, match=r"mine\.toml: unknown key sede; did you mean seed\?"):
        load_config(str(path))
    path.write_text("seed = 1\n")
    with pytest.raises(CscError, match=r"mine\.toml: ingest: Field required"):
        load_config(str(path))


def test_values_are_taken_as_toml_or_else_as_text() -> None:
    config = load_config("demo", ["train.lr=1e-4", "workspace=s3://a/b", "mlflow.uri='http://x'"])
    assert config.train.lr == 1e-4
    assert config.workspace == "s3://a/b"
    assert config.mlflow.uri == "http://x"


def test_the_learned_encoder_with_galr_is_a_choice_of_the_demo() -> None:
    config = load_config(
        "demo",
        ["model.frontend=conv", "model.trunk=galr", "model.window=16", "model.hop=8"],
    )
    assert config.model.trunk == "galr"


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["build.mixing.mixit_share=0.5"], "need 4 slots"),
        (
            [
                "train.contrast.set='batch'",
                "train.contrast.label_free=true",
                "build.mixing.conditions=1",
                "build.mixing.by_recording=true",
            ],
            "conditions to 2 or more",
        ),
        (
            ["train.contrast.set='batch'", "train.contrast.label_free=true"],
            "build.mixing.by_recording=true",
        ),
        (["build.mixing.by_recording=true", "build.mixing.same_gender_share=0.5"], "no label"),
        (["train.balance='norms'", "train.separation_weight=0.0"], "train.separation_weight"),
        (
            [
                "train.balance='norms'",
                "model.speaker_features='mel'",
                "model.detach_separation=true",
            ],
            "the contrastive loss has none there",
        ),
        (["train.freeze_separator=true"], "keeps the separator of train.init_from"),
        (["train.task='extract'", "train.init_from='m'"], "set model.extractor=film"),
        (["train.task='extract'", "model.extractor='film'"], "train.init_from to that model"),
        (["model.extractor='film'"], "set train.task=extract"),
        ([*EXTRACT, "build.mixing.conditions=1"], "build.mixing.conditions to 2 or more"),
        ([*EXTRACT, "build.mixing.mixit_share=1.0", *FOUR], "set build.mixing.mixit_share below 1"),
        ([*EXTRACT, "train.contrastive_weight=0.0"], "a training of separation alone"),
        ([*EXTRACT, "build.mixing.by_recording=true"], "by other words"),
        (
            [*EXTRACT, "model.frontend='conv'", "train.extraction_loss='power_law'"],
            "power_law compares spectra",
        ),
        (["train.contrastive_weight=0.0", "train.separation_weight=0.0"], "nothing is trained"),
        (["train.balance='norms'", "train.contrastive_weight=0.0"], "only one of them is trained"),
        (["train.views=1", "train.contrast.set='batch'"], "only with train.contrast.set=table"),
        (["train.views=4"], "up to 3 views"),
        (["train.speeds=[3.0]"], "less than or equal to 2"),
        (["train.speeds=[0.9, 0.9]"], "different whole hundredths"),
        (["train.speeds=[1.0]"], "different whole hundredths"),
        (["train.refined=[0.0, 0.0]"], "trains nothing"),
        (["model.speaker_net='ecapa'"], "reads log-mel features"),
        (["model.hop=512"], "nothing can be restored"),
        (["train.refined=[-1.0, 1.0]"], "greater than or equal to 0"),
        (["build.valid_episodes=8"], "fewer than one batch"),
        (["train.accumulate=3"], "not a multiple of accumulate 3"),
        (["build.episodes_per_group=5"], "is no multiple of it"),
    ],
)
def test_what_would_fail_or_train_nothing_is_refused_at_once(
    overrides: list[str], reason: str
) -> None:
    with pytest.raises(CscError, match=reason):
        load_config("demo", overrides)


def test_a_build_that_is_not_used_is_not_looked_at() -> None:
    unused = ["build.mixing.conditions=1", "build.mixing.mixit_share=1.0", "build.valid_episodes=1"]
    config = load_config("demo", [*EXTRACT, *unused, "train.dataset='3f2a'"])
    assert config.build.mixing.mixit_share == 1
