"""One strict configuration tree: TOML files and `--set key=value`, checked as a whole."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from csc_model.config import ModelConfig
from jobs.ray_config import RayConfig
from jobs.train_config import TrainConfig
from pipeline.corpora import IngestConfig
from pipeline.distributions import BuildConfig
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ, Strict
from pipeline.trials import TrialConfig

Tree = dict[str, Any]
EMBEDDED = Path(__file__).parent / "configs"


class EvaluateConfig(Strict):
    """Trials, and how sure to be of what they say."""

    trials: TrialConfig = TrialConfig()
    bootstrap_replicates: int = Field(1000, ge=100)
    quality: int = Field(
        0, ge=0, description="test sides of a condition to measure PESQ and STOI on (csc[quality])"
    )
    extraction: int = Field(
        100,
        ge=0,
        description="test sides of a condition to measure extraction on, by a model that can",
    )
    recogniser: str | None = Field(
        None, description="package.module:function, for word error rates of extraction (csc[words])"
    )
    arrays: int = Field(
        0, ge=0, description="rooms with an array to listen to in the report (csc[arrays])"
    )
    cohort: int = Field(
        0, ge=0, description="training speakers that scores are normalised by (AS-norm); 0: none"
    )

    @field_validator("cohort")
    @classmethod
    def _nobody_or_some(cls, cohort: int) -> int:
        if cohort == 1:
            raise ValueError("a cohort has two speakers at least, or 0 for none")
        return cohort


class PromoteConfig(Strict):
    """The gate: what a challenger must not be worse at."""

    guarded: list[str] = Field(["clean", "sir_5_db", "sir_0_db"], min_length=1)
    margin: float = Field(0.01, ge=0, description="EER that may be lost to chance")
    extraction_margin_db: float = Field(
        1.0, ge=0, description="SI-SNR and level of extracted voices that may be lost"
    )


class MlflowConfig(Strict):
    """Where runs and models are kept; without a URI, in a SQLite file of the workspace."""

    uri: str | None = None
    experiment: str = "csc"
    model: str = "csc-speaker-encoder"


class Config(Strict):
    """Everything a run depends on."""

    workspace: str = "csc-workspace"
    seed: int = Field(7, ge=0)
    ingest: IngestConfig
    build: BuildConfig = BuildConfig()
    model: ModelConfig = ModelConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    promote: PromoteConfig = PromoteConfig()
    mlflow: MlflowConfig = MlflowConfig()
    ray: RayConfig = RayConfig()

    def shown(self) -> dict[str, Any]:
        """Return all of it but where MLflow is: that address may hold a password."""
        return self.model_dump(exclude={"mlflow": {"uri"}})

    @property
    def learns_attention(self) -> bool:
        """Whether training has a vector attend to several conditions, so that it learns to."""
        attending = {"table": 2 if self.train.attend else None, "batch": None, "in_mix": 3}
        least = attending[self.train.contrast.set]
        enough = least is not None and self.build.mixing.conditions >= least
        return enough and self.train.learns_voices

    @model_validator(mode="after")
    def _losses_have_something_to_do(self) -> Self:
        """Refuse what would fail, or train nothing, after hours of ingest and build."""
        model, train = self.model, self.train
        if train.separation_only and not train.separation_weight:
            raise ValueError(
                "train.contrastive_weight and train.separation_weight are both 0: nothing is "
                "trained; set one of them"
            )
        if train.task == "extract":
            self._check_extraction()
        elif model.extractor != "none":
            raise ValueError(
                "model.extractor is trained for a model that stays as it is: set "
                "train.task=extract and train.init_from to that model, or model.extractor=none"
            )
        if train.freeze_separator and (train.init_from is None or train.separation_only):
            raise ValueError(
                "train.freeze_separator keeps the separator of train.init_from and trains the "
                "speaker head: name a model there, and set train.contrastive_weight above 0"
            )
        if train.views and (train.contrast.set != "table" or train.views > model.num_slots + 1):
            raise ValueError(
                f"train.views {train.views}: up to {model.num_slots + 1} views, and only with "
                "train.contrast.set=table, as other sets compare the views of a batch"
            )
        if train.balance == "norms" and (train.separation_only or train.freeze_separator):
            raise ValueError(
                "train.balance=norms weighs separation against the contrastive loss, and only one "
                "of them is trained: leave it out"
            )
        if train.balance == "norms" and not train.separation_weight:
            raise ValueError("train.balance=norms is relative to train.separation_weight: set it")
        if train.balance == "norms" and model.speaker_features == "mel" and model.detach_separation:
            raise ValueError(
                "train.balance=norms compares gradients on the trunk, and with "
                "speaker_features=mel and detach_separation the contrastive loss has none there: "
                "change one"
            )
        return self

    def _check_extraction(self) -> None:
        if self.model.extractor == "none" or self.train.init_from is None:
            raise ValueError(
                "train.task=extract trains an extractor for a model that embeds: set "
                "model.extractor=film, and train.init_from to that model"
            )
        if self.train.separation_only:
            raise ValueError(
                "train.contrastive_weight=0 is a training of separation alone, and "
                "train.task=extract is none: leave it out"
            )
        if self.train.extraction_loss == "power_law" and self.model.frontend != "stft":
            raise ValueError(
                "train.extraction_loss=power_law compares spectra: set model.frontend=stft"
            )

    @model_validator(mode="after")
    def _elastic_workers_are_counted_right(self) -> Self:
        """Refuse what Ray rounds down: it divides what a node has by what a worker needs."""
        needs, counts = self.ray.workers, range(1, self.train.workers + 1)
        if not self.train.elastic:
            return self
        if needs.placement == "STRICT_PACK":
            raise ValueError("ray.workers.placement=STRICT_PACK has no place for train.min_workers")
        for name, much in needs.resources.items():
            if any(sum([much] * count) // much != count for count in counts):
                raise ValueError(
                    f"ray.workers.resources.{name} {much}: with train.min_workers give a power of "
                    "two, as 0.0625, so that sums of it are exact"
                )
        return self

    @model_validator(mode="after")
    def _build_fits(self) -> Self:
        """Check the build against the rest, unless another dataset stands in for it."""
        if self.train.dataset is not None:
            return self
        self._check_mixing()
        speakers = self.build.mixing.interferers + 1
        if self.model.num_slots != speakers:
            raise ValueError(
                f"model.num_slots is {self.model.num_slots} and build.mixing.interferer_shares "
                f"makes mixtures of {speakers} speakers: set one of them"
            )
        if self.build.valid_episodes < self.train.batch_size:
            raise ValueError(
                f"build.valid_episodes {self.build.valid_episodes} are fewer than one batch "
                f"(train.batch_size {self.train.batch_size}): change one"
            )
        block, share = self.build.episodes_per_group, self.train.batch_size // self.train.workers
        if self.train.remix and share % block:
            raise ValueError(
                f"train.remix moves voices within blocks of build.episodes_per_group {block}, and "
                f"a worker's share of train.batch_size, {share}, is no multiple of it: change one"
            )
        return self

    def _check_mixing(self) -> None:
        """Refuse mixtures that the losses can do nothing with."""
        mixing, train, slots = self.build.mixing, self.train, self.model.num_slots
        outputs = max(3, 2 * mixing.mixit_voices)
        if mixing.ever("mixit_share") and slots < outputs:
            raise ValueError(
                f"build.mixing.mixit_share with model.num_slots {slots}: two mixtures of "
                f"mixit_voices {mixing.mixit_voices} need {outputs} slots, or slots learn to hold "
                "several voices"
            )
        if train.contrast.label_free and (mixing.conditions == 1 or not mixing.by_recording):
            raise ValueError(
                "train.contrast.label_free compares what is heard of one recording under several "
                "conditions: set build.mixing.by_recording=true, and build.mixing.conditions to 2 "
                "or more"
            )
        if train.task == "extract" and mixing.conditions == 1:
            raise ValueError(
                "train.task=extract asks for the voice of one mixture by that of another: set "
                "build.mixing.conditions to 2 or more"
            )
        if train.task == "extract" and mixing.by_recording:
            raise ValueError(
                "train.task=extract asks for a voice by other words than those in the mixture, and "
                "build.mixing.by_recording has it say the same in all conditions: leave it out"
            )
        if train.task == "extract" and mixing.mixit_share == 1:
            raise ValueError(
                "train.task=extract asks for voices that are known, and in mixtures of mixtures "
                "none is: set build.mixing.mixit_share below 1"
            )

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.model.sample_rate_hz != SAMPLE_RATE_HZ:
            raise ValueError(
                f"model.sample_rate_hz is {self.model.sample_rate_hz}, the store holds "
                f"{SAMPLE_RATE_HZ}: leave it out"
            )
        conditions = self.evaluate.trials.conditions
        named = {
            "promote.guarded": self.promote.guarded,
            "train.validate_on": self.train.validate_on,
        }
        for key, names in named.items():
            unknown = sorted(set(names) - set(conditions))
            if unknown:
                raise ValueError(
                    f"{key} names {', '.join(unknown)}; evaluate.trials.conditions has "
                    f"{', '.join(conditions)}"
                )
        return self


def load_config(source: str = "demo", overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, or an embedded configuration by its name, and apply overrides.

    Raises:
        CscError: naming file or override, the key, and the nearest valid one.
    """
    tree = _read(source)
    for override in overrides:
        _apply(tree, override)
    try:
        return Config.model_validate_json(json.dumps(tree, default=str))
    except ValidationError as error:
        raise CscError("\n".join(_explain(error, source, overrides))) from None


def rebuilt(config: Config, build: BuildConfig, source: str) -> Config:
    """Return a configuration with the build of a dataset in place of its own, checked again.

    Raises:
        CscError: naming `source`, the key, and why the rest does not fit it.
    """
    train = config.train.model_dump() | {"dataset": None, "valid_dataset": None}
    try:
        return Config.model_validate(
            config.model_dump() | {"build": build.model_dump(), "train": train}
        )
    except ValidationError as error:
        raise CscError("\n".join(_explain(error, source, ()))) from None


def _read(source: str) -> Tree:
    path, embedded = Path(source), EMBEDDED / f"{source}.toml"
    try:
        if path.suffix == ".json":  # as csc config prints it
            return json.loads(path.read_text())
        text = path.read_text() if path.suffix == ".toml" else embedded.read_text()
        return tomllib.loads(text)
    except FileNotFoundError:
        names = sorted(path.stem for path in EMBEDDED.glob("*.toml"))
        raise CscError(
            f"no configuration {source!r}: give the path of a .toml or .json file, or one of "
            f"{', '.join(names)}"
        ) from None
    except (OSError, tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise CscError(f"{source}: {error}; correct the file") from None


def _apply(tree: Tree, override: str) -> None:
    """Set `key.of.tree=value` in place; the value is TOML, or else a plain string."""
    key, equals, text = override.partition("=")
    if not equals:
        raise CscError(f"--set {override}: write it as key=value, as in --set train.lr=1e-3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    node: Any = tree
    *parents, last = key.split(".")
    try:
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[int(last) if isinstance(node, list) else last] = value
    except (ValueError, IndexError, TypeError, AttributeError):
        raise CscError(f"--set {override}: there is no such key{_nearest(key)}") from None


def _explain(error: ValidationError, source: str, overrides: Sequence[str]) -> Iterator[str]:
    for problem in error.errors():
        key = ".".join(map(str, problem["loc"])) or "the configuration"
        given = [text for text in overrides if f"{text.partition('=')[0]}.".startswith(f"{key}.")]
        place = f"--set {given[-1]}" if given else source
        if problem["type"] == "extra_forbidden":
            yield f"{place}: unknown key {key}{_nearest(key)}"
        else:
            reason = problem["msg"].removeprefix("Value error, ")
            shown = f" (given: {problem['input']!r})" if problem["type"] != "value_error" else ""
            yield f"{place}: {key}: {reason}{shown}"


def _nearest(key: str) -> str:
    keys = list(_keys(Config, ""))
    key = re.sub(r"\.\d+(?=\.|$)", ".0", key)
    last = key.rpartition(".")[2]
    same_name = [known for known in keys if known.rpartition(".")[2] == last]
    close = difflib.get_close_matches(key, keys, 1, 0.5) or same_name
    return f"; did you mean {(same_name or close)[0]}?" if close else ""


def _keys(model: type[BaseModel], prefix: str) -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        inner, place = field.annotation, f"{prefix}{name}."
        if get_origin(inner) is list:
            inner, place = get_args(inner)[0], f"{place}0."
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _keys(inner, place)
