"""What mixtures are like, as distributions that recipes are drawn from, and how much is built."""

from typing import Any, Self

from pydantic import Field, model_validator

from pipeline.schema import SAMPLE_RATE_HZ, Strict

RANGES = (
    ("sir_min_db", "sir_max_db"),
    ("snr_min_db", "snr_max_db"),
    ("overlap_min", "overlap_max"),
)


FIRM = ("seconds", "balance")  # what a dataset has one value of


class Curriculum(Strict):
    """From easy to hard: distributions that begin elsewhere and move to where they are to be."""

    epochs: int = Field(0, ge=0, description="until the configured values are reached")
    start: dict[str, float | list[float]] = Field({}, description="values of the first epoch")


class MixingConfig(Strict):
    """Distributions of one mixture and of an episode, several mixtures with one speaker."""

    seconds: float = Field(4.0, gt=0.1, le=30)
    conditions: int = Field(2, ge=1, description="mixtures of an episode")
    by_recording: bool = Field(
        False,
        description="no label is read: an utterance, or what is of nobody known, is a speaker",
    )
    interferer_shares: list[float] = Field(
        [0.1, 0.9], description="shares of mixtures with 0, 1, 2, .. other speakers"
    )
    same_gender_share: float | None = Field(
        None, ge=0, le=1, description="interferers of the anchor's gender, where it is known"
    )
    sir_min_db: float = -5.0
    sir_max_db: float = 10.0
    overlap_min: float = Field(1.0, ge=0, le=1, description="share of the mixture in which target")
    overlap_max: float = Field(1.0, ge=0, le=1, description="and interferers speak at once")
    absent_share: float = Field(0.0, ge=0, le=1, description="mixtures that lack the target")
    noise_share: float = Field(0.1, ge=0, le=1, description="mixtures with noise")
    snr_min_db: float = 0.0
    snr_max_db: float = 15.0
    babble_share: float = Field(0.0, ge=0, le=1, description="of the noises, made of other voices")
    babble_voices: int = Field(5, ge=2, le=20)
    room_share: float = Field(0.0, ge=0, le=1, description="mixtures that sound in a room")
    mixit_share: float = Field(0.0, ge=0, le=1, description="episodes of mixtures of mixtures")
    mixit_voices: int = Field(2, ge=1, le=4, description="speakers that make one of them")
    balance: float = Field(0.0, ge=0, le=1, description="0 draws speakers evenly, 1 by utterances")
    curriculum: Curriculum = Curriculum()

    @model_validator(mode="after")
    def _values_make_sense(self) -> Self:
        for low, high in RANGES:
            if getattr(self, low) > getattr(self, high):
                raise ValueError(f"{low} is above {high}: {getattr(self, low)}")
        shares = self.interferer_shares
        if not 2 <= len(shares) <= 4 or min(shares) < 0 or abs(sum(shares) - 1) > 1e-6:
            raise ValueError("interferer_shares are two to four shares that sum to 1")
        if self.by_recording and self.same_gender_share is not None:
            raise ValueError("by_recording reads no label: leave same_gender_share out")
        if bool(self.curriculum.start) != bool(self.curriculum.epochs):
            raise ValueError("curriculum: epochs and start belong together")
        if self.curriculum.start:
            self._check_start()
        most = (self.conditions - 1) / self.conditions
        if self.absent_share > most:
            raise ValueError(
                f"absent_share is at most {most:g}: one of the {self.conditions} mixtures of an "
                "episode has its target"
            )
        return self

    def _check_start(self) -> None:
        for name, value in self.curriculum.start.items():
            end = getattr(self, name, None)
            if name in FIRM or not _moves(value, end):
                raise ValueError(f"curriculum.start: {name} cannot move from {value} to {end}")
        self._with(self.curriculum.start)

    def _with(self, values: dict[str, Any]) -> "MixingConfig":
        return MixingConfig.model_validate(self.model_dump(exclude={"curriculum"}) | values)

    def at(self, epoch: int) -> "MixingConfig":
        """Return the distributions of an epoch."""
        moved = self.curriculum
        left = max(0.0, 1 - epoch / moved.epochs) if moved.epochs else 0.0
        return self._with(
            {name: _between(getattr(self, name), at, left) for name, at in moved.start.items()}
        )

    @property
    def final(self) -> "MixingConfig":
        """The distributions that a curriculum ends with."""
        return self._with({})

    @property
    def speakers_needed(self) -> int:
        """Speakers of which an episode can have as many different ones as it asks for."""
        rivals = 2 * self.mixit_voices - 1 if self.ever("mixit_share") else 0
        babble = 2 if self.ever("babble_share") else 0  # one voice is no babble
        needed = 1 + self.conditions * max(self.interferers, rivals)
        return max(needed, 1 + self.interferers + babble)

    def ever(self, share: str) -> bool:
        """Tell whether a share is above 0 in some epoch."""
        return getattr(self, share) > 0 or bool(self.curriculum.start.get(share))

    @property
    def utterances_needed(self) -> int:
        """Utterances that a speaker has who is the anchor of an episode."""
        return 1 if self.by_recording else self.conditions

    @property
    def interferers(self) -> int:
        """Other speakers in a mixture, at most."""
        return len(self.interferer_shares) - 1

    @property
    def num_samples(self) -> int:
        """Samples of a mixture."""
        return round(self.seconds * SAMPLE_RATE_HZ)

    @property
    def num_slots(self) -> int:
        """Places for sources in a mixture: target, interferers, noise."""
        return self.interferers + 2


def _moves(start: Any, end: Any) -> bool:
    if isinstance(start, list) and isinstance(end, list):
        return len(start) == len(end)
    return isinstance(start, float) and isinstance(end, float)


def _between(end: Any, start: Any, left: float) -> Any:
    if isinstance(end, list):
        return [_between(*pair, left) for pair in zip(end, start, strict=True)]
    return round(end * (1 - left) + start * left, 9)  # what was in order stays in order


MOST_GROUP_BYTES = 256 * 10**6


class BuildConfig(Strict):
    """How many episodes, and how they lie in shards."""

    train_episodes: int = Field(20_000, ge=1, description="of one pass")
    valid_episodes: int = Field(500, ge=1)
    passes: int = Field(1, ge=1, description="each epoch of training reads another, in turn")
    shard_mb: float = Field(128.0, gt=0, le=1500, description="size of a mixture shard, at most")
    episodes_per_group: int = Field(8, ge=1, description="episodes read in one go")
    slice_mb: float = Field(
        16.0, ge=0.01, description="utterances read from one place of the store"
    )
    window_slices: int = Field(16, ge=1, description="such places that are mixed with each other")
    shards_per_window: int = Field(2, ge=1, description="mixture shards made of one such reading")
    mixing: MixingConfig = MixingConfig()

    @model_validator(mode="after")
    def _parts_fit(self) -> Self:
        if self.mixing.curriculum.epochs >= self.passes and self.mixing.curriculum.epochs:
            raise ValueError(
                f"passes is {self.passes}: more than mixing.curriculum.epochs "
                f"({self.mixing.curriculum.epochs}) are needed, or what it leads to is never built"
            )
        if self.group_bytes > MOST_GROUP_BYTES:
            raise ValueError(
                f"episodes_per_group {self.episodes_per_group} makes row groups of "
                f"{self.group_bytes / 1e6:.0f} MB, at most {MOST_GROUP_BYTES / 1e6:.0f} are read "
                "in one go: set it lower"
            )
        return self

    @property
    def group_bytes(self) -> int:
        """Bytes of a row group in which every slot of every episode is taken."""
        mixing = self.mixing
        slots = mixing.conditions * mixing.num_slots
        return 2 * slots * mixing.num_samples * self.episodes_per_group

    def turn(self, epoch: int) -> int:
        """Return which pass an epoch of training reads: a curriculum is gone through once."""
        first = self.mixing.curriculum.epochs
        return epoch if epoch < first else first + (epoch - first) % (self.passes - first)

    @property
    def episodes_per_shard(self) -> int:
        """Episodes that fit into a shard even where every slot of them is taken."""
        return max(1, int(self.shard_mb * 1e6 / self.group_bytes)) * self.episodes_per_group
