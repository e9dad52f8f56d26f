"""One strict configuration tree: TOML files and `--set key=value`, checked as a whole."""

import difflib
import json
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args, get_origin

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from csc_model.config import ModelConfig
from csc_model.contrast import ContrastConfig
from pipeline.corpora import IngestConfig
from pipeline.distributions import BuildConfig
from pipeline.errors import CscError
from pipeline.schema import SAMPLE_RATE_HZ, Strict
from pipeline.trials import CLEAN, TrialConfig

Tree = dict[str, Any]
EMBEDDED = Path(__file__).parent / "configs"


class TrainConfig(Strict):
    """How the model is trained. Batches are global: more workers mean smaller shares."""

    workers: int = Field(2, ge=1, description="processes, each with a GPU if there are as many")
    min_workers: int = Field(
        0, ge=0, description="to go on with when nodes are lost; 0: always as many as `workers`"
    )
    retries: int = Field(
        2, ge=-1, description="from the last checkpoint, when workers or nodes die; -1: for ever"
    )
    steps: int = Field(10_000, ge=1)
    batch_size: int = Field(16, ge=1, description="episodes of a global batch")
    remix: bool = Field(True, description="mix the voices of a batch anew in every epoch")
    speeds: list[Annotated[float, Field(ge=0.5, le=2)]] = Field(
        [], description="that voices are also played at, as other speakers: [0.9, 1.1]"
    )
    lr: float = Field(1e-3, gt=0)
    table_lr_scale: float = Field(2.0, gt=0, description="of the speaker table, over lr")
    warmup_steps: int = Field(50, ge=0)
    schedule: Literal["linear", "rex", "cosine", "constant"] = "linear"
    init_from: str | None = Field(
        None, description="models:/NAME@champion, or a folder, to begin with"
    )
    refined: list[Annotated[float, Field(ge=0, le=1)]] = Field(
        [], description="schedule of an earlier run's gradient norms"
    )
    ema_decay: float = Field(
        0.0, ge=0, lt=1, description="of the averaged weights that are judged and kept; 0: none"
    )
    accumulate: int = Field(1, ge=1, description="parts of a worker's share before each step")
    precision: Literal["auto", "fp32", "bf16"] = Field("auto", description="auto: bf16 on GPUs")
    compile: bool = Field(False, description="torch.compile; GALR's LSTM breaks its graph")
    checkpoint_minutes: float = Field(10.0, gt=0, description="between checkpoints, at most")
    early_stop: int = Field(0, ge=0, description="validations without a better one; 0: never")
    weight_decay: float = Field(0.01, ge=0)
    clip_norm: float = Field(5.0, gt=0)
    separation_weight: float = Field(0.1, ge=0)
    contrastive_weight: float = Field(1.0, ge=0, description="0: separation is all that is trained")
    freeze_separator: bool = Field(False, description="leave that of init_from as it is")
    views: int = Field(
        0, ge=0, description="of each mixture that the speaker head hears in a step; 0: all"
    )
    contrastive_ramp_steps: int = Field(0, ge=0, description="separation alone at first")
    spread_weight: float = Field(0.1, ge=0)
    activity_weight: float = Field(0.1, ge=0, description="of telling slots that nobody speaks in")
    balance: Literal["fixed", "norms"] = Field(
        "fixed", description="norms: contrastive_weight is a ratio of gradient norms on the trunk"
    )
    attend: bool = Field(True, description="to a speaker's other conditions, in training")
    contrast: ContrastConfig = ContrastConfig()
    validate_every: int = Field(500, ge=1, description="steps between checkpoints")
    validate_on: list[str] = Field(
        [CLEAN, "sir_5_db", "sir_0_db"], min_length=1, description="conditions; their mean decides"
    )
    threads: int = Field(1, ge=1, description="CPU threads of a worker")

    @field_validator("speeds")
    @classmethod
    def _speeds_differ(cls, speeds: list[float]) -> list[float]:
        hundredths = {round(100 * speed) for speed in speeds}
        whole = all(abs(100 * speed - round(100 * speed)) < 1e-6 for speed in speeds)
        if len(hundredths) < len(speeds) or 100 in hundredths or not whole:
            raise ValueError("speeds are different whole hundredths, without 1.0, which is there")
        return speeds

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while training goes on."""
        return 0 < self.min_workers < self.workers

    @property
    def separation_only(self) -> bool:
        """Whether voices are pulled apart and nobody's is learned: a run to begin others with."""
        return self.contrastive_weight == 0

    @model_validator(mode="after")
    def _batch_can_be_shared(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of workers {self.workers}"
            )
        if self.min_workers > self.workers:
            raise ValueError(f"min_workers {self.min_workers} are more than workers {self.workers}")
        if self.elastic and (self.accumulate > 1 or self.contrast.set != "table"):
            raise ValueError(
                "min_workers makes shares of a batch uneven: leave it out, or set accumulate to 1 "
                "and contrast.set to table"
            )
        if self.batch_size // self.workers % self.accumulate:
            raise ValueError(
                f"a worker's share of batch_size, {self.batch_size // self.workers}, is not a "
                f"multiple of accumulate {self.accumulate}"
            )
        return self


class EvaluateConfig(Strict):
    """Trials, and how sure to be of what they say."""

    trials: TrialConfig = TrialConfig()
    bootstrap_replicates: int = Field(1000, ge=100)
    quality: int = Field(
        0, ge=0, description="test sides of a condition to measure PESQ and STOI on (csc[quality])"
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


class MlflowConfig(Strict):
    """Where runs and models are kept; without a URI, in a SQLite file of the workspace."""

    uri: str | None = None
    experiment: str = "csc"
    model: str = "csc-speaker-encoder"


class TaskNeeds(Strict):
    """What a task of ingest, build or evaluation needs of a node."""

    cpus: float = Field(1.0, gt=0)
    memory_gb: float = Field(0.0, ge=0, description="that must be free; 0: not asked for")
    resources: dict[str, float] = Field({}, description="as nodes are labelled: {data = 0.01}")

    def asked(self, gpus: float = 0) -> dict[str, Any]:
        """Return it in Ray's words."""
        needs: dict[str, Any] = {"num_cpus": self.cpus}
        if gpus:
            needs["num_gpus"] = gpus
        if self.memory_gb:
            needs["memory"] = self.memory_gb * 1e9
        return needs | ({"resources": self.resources} if self.resources else {})


class WorkerNeeds(Strict):
    """What a training worker needs of a node."""

    cpus: float = Field(1.0, gt=0)
    gpus: float | None = Field(
        None, ge=0, description="unset: one each, if the cluster has them already; 1: waits for it"
    )
    resources: dict[str, float] = Field(
        {}, description="as nodes are labelled: {gpu_node = 0.0625}"
    )
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"


class RayConfig(Strict):
    """Which Ray to use, and what each stage needs of its nodes."""

    address: str = Field("local", description="`local` starts one that ends with the command")
    tasks: TaskNeeds = TaskNeeds()
    workers: WorkerNeeds = WorkerNeeds()
    cache_gb: float = Field(
        20.0, ge=0, description="of remote mixture shards that a node keeps; 0: none"
    )
    cache_folder: str = Field("", description="for them; unset: the system's temporary folder")

    @field_validator("cache_folder")
    @classmethod
    def _same_for_all_processes(cls, folder: str) -> str:
        if folder and not Path(folder).is_absolute():
            raise ValueError(f"cache_folder {folder!r} is to be an absolute path on every node")
        return folder


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

    @model_validator(mode="after")
    def _losses_have_something_to_do(self) -> Self:
        """Refuse what would fail, or train nothing, after hours of ingest and build."""
        mixing, model, train = self.build.mixing, self.model, self.train
        outputs = max(3, 2 * mixing.mixit_voices)
        if mixing.ever("mixit_share") and model.num_slots < outputs:
            raise ValueError(
                f"build.mixing.mixit_share with model.num_slots {model.num_slots}: two mixtures of "
                f"mixit_voices {mixing.mixit_voices} need {outputs} slots, or slots learn to hold "
                "several voices"
            )
        if train.contrast.label_free and mixing.conditions == 1:
            raise ValueError(
                "train.contrast.label_free compares the conditions of an episode: set "
                "build.mixing.conditions to 2 or more"
            )
        if train.separation_only and not train.separation_weight:
            raise ValueError(
                "train.contrastive_weight and train.separation_weight are both 0: nothing is "
                "trained; set one of them"
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
    def _parts_fit(self) -> Self:
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
