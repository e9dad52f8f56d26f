"""How the model is trained: the `[train]` table of a configuration."""

from typing import Annotated, Literal, Self

from pydantic import Field, field_validator, model_validator

from csc_model.contrast import ContrastConfig
from csc_model.mixit import Search
from pipeline.schema import Strict
from pipeline.trials import CLEAN


class TrainConfig(Strict):
    """How the model is trained. Batches are global: more workers mean smaller shares."""

    workers: int = Field(2, ge=1, description="processes, each with a GPU if there are as many")
    min_workers: int = Field(
        0, ge=0, description="to go on with when nodes are lost; 0: always as many as `workers`"
    )
    retries: int = Field(
        2, ge=-1, description="from the last checkpoint, when workers or nodes die; -1: for ever"
    )
    task: Literal["csc", "extract"] = Field(
        "csc", description="extract: train model.extractor; all else stays as in init_from"
    )
    extraction_loss: Literal["snr", "si_snr", "power_law"] = Field(
        "snr", description="power_law: VoiceFilter's, of compressed magnitudes; si_snr: any level"
    )
    extraction_others: float = Field(
        0.05, ge=0, le=0.5, description="of mixtures asked for somebody who is not in them"
    )
    dataset: str | None = Field(
        None, description="one that is there, by id or address; none: what csc build makes"
    )
    valid_dataset: str | None = Field(
        None, description="of the valid mixtures, where dataset has none"
    )
    steps: int = Field(10_000, ge=1)
    batch_size: int = Field(16, ge=1, description="episodes of a global batch")
    remix: bool = Field(True, description="mix the voices of a batch anew in every epoch")
    speeds: list[Annotated[float, Field(ge=0.5, le=2)]] = Field(
        [], description="that voices are also played at, as other speakers: [0.9, 1.1]"
    )
    lr: float = Field(1e-3, gt=0)
    table_lr_scale: float = Field(
        2.0, gt=0, description="of the speaker table and the scale of distances, over lr"
    )
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
    precision: Literal["auto", "fp32", "bf16"] = Field(
        "auto", description="auto: bf16 on GPUs that have it"
    )
    compile: bool = Field(False, description="torch.compile; LSTMs (galr, blstm) break its graph")
    checkpoint_minutes: float = Field(
        10.0, gt=0, description="after which a checkpoint is due; asked for every 20 steps"
    )
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
    mixit: Search = Field(
        "all", description="how outputs are given to mixtures of mixtures: try all, or one solve"
    )
    attend: bool = Field(True, description="to a speaker's other conditions, in training")
    contrast: ContrastConfig = ContrastConfig()
    validate_every: int = Field(500, ge=1, description="steps between validations")
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

    @field_validator("refined")
    @classmethod
    def _refined_trains(cls, refined: list[float]) -> list[float]:
        if refined and not any(refined):
            raise ValueError("a refined schedule of nothing but 0 trains nothing")
        return refined

    @property
    def elastic(self) -> bool:
        """Whether the number of workers may change while training goes on."""
        return 0 < self.min_workers < self.workers

    @property
    def separation_only(self) -> bool:
        """Whether voices are pulled apart and nobody's is learned: a run to begin others with."""
        return self.contrastive_weight == 0

    @property
    def learns_voices(self) -> bool:
        """Whether speakers are learned, and error rates say which weights are the best."""
        return self.task == "csc" and not self.separation_only

    @model_validator(mode="after")
    def _batch_can_be_shared(self) -> Self:
        if self.batch_size % self.workers:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of workers {self.workers}"
            )
        if self.valid_dataset is not None and self.dataset is None:
            raise ValueError("valid_dataset stands beside dataset: name both")
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
