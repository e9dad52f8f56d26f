"""The systems that are compared, each as the stages of its training.

A stage is a dataset, a number of steps and what differs from the configuration of the campaign.
Steps are chosen for about 2,000 core-seconds on the machine of the published results.
"""

from typing import Literal, NamedTuple

SEPARATION_STEPS, HEAD_STEPS = 5100, 2000
SEPARATOR_STEPS = 1700
NO_SEPARATION_STEPS = 3800
PAIRS = (
    "build.mixing.interferer_shares=[0.0, 1.0]",
    "build.mixing.noise_share=0.0",
    "build.mixing.sir_max_db=5.0",
)


Dataset = Literal["pairs", "pairs_10", "pairs_1", "mixed", "wild", "unnamed", "asked"]


class Stage(NamedTuple):
    """One training, which begins with the weights of the stage before."""

    dataset: Dataset
    steps: int
    changes: tuple[str, ...] = ()


SEPARATION = Stage(
    "pairs",
    SEPARATION_STEPS,
    ("train.contrastive_weight=0.0", "train.views=0", "train.speeds=[0.9, 1.1]"),
)
FROZEN = ("train.freeze_separator=true", "train.init_from='the stage before'")
HEAD = Stage("wild", HEAD_STEPS, FROZEN)


def _contrast(*changes: str, dataset: Dataset = "wild") -> tuple[Stage, Stage]:
    """Return CSC with another loss: sets that compare vectors with each other hear all views."""
    changes = (*FROZEN, "train.contrast.margin=0.0", "train.views=0", *changes)
    return SEPARATION, Stage(dataset, HEAD_STEPS // 2, changes)


def _label_free(*changes: str) -> tuple[Stage, Stage]:
    """Return CSC whose head is told nothing but which mixtures hold the same recording."""
    label_free = ("train.contrast.set='batch'", "train.contrast.label_free=true")
    return _contrast(*label_free, *changes, dataset="unnamed")


def _trunk(steps: int, *changes: str) -> tuple[Stage, Stage]:
    """Return CSC with another separator, which is trained for as long, not for as many steps."""
    head = HEAD._replace(steps=HEAD_STEPS * 2 // 3, changes=(*FROZEN, *changes))
    return SEPARATION._replace(steps=steps, changes=(*SEPARATION.changes, *changes)), head


FINE = ("model.frontend='conv'", "model.window=128", "model.hop=64", "model.num_bins=256")
"""A learned encoder with four times as many frames as the STFT."""

ALPHAS = (0.1, 0.2, 0.4)

CSC_SYSTEMS: dict[str, tuple[Stage, ...]] = {
    "csc": (SEPARATION, HEAD),
    "csc_gaussian": (
        SEPARATION,
        HEAD._replace(
            changes=(
                *FROZEN,
                "train.contrast.kernel='gaussian'",
                "train.contrast.margin=0.0",
                "train.contrast.scale=10.0",
                "train.contrast.learn_scale=true",
            )
        ),
    ),
    "csc_all_views": (
        SEPARATION,
        HEAD._replace(steps=HEAD_STEPS // 2, changes=(*FROZEN, "train.views=0")),
    ),
    "csc_no_attention": (SEPARATION, HEAD._replace(changes=(*FROZEN, "train.attend=false"))),
    "csc_no_separation": (
        Stage(
            "wild",
            NO_SEPARATION_STEPS,
            ("train.separation_weight=0.0", "model.detach_separation=false"),
        ),
    ),
    "csc_table": _contrast(),
    "csc_batch": _contrast("train.contrast.set='batch'"),
    "csc_in_mix": _contrast("train.contrast.set='in_mix'"),
    "csc_tcn": _trunk(
        4300,
        "model.trunk='tcn'",
        "model.dilation_cycle=6",
        "model.hidden=192",
        "model.shared_blocks=6",
        "model.separation_blocks=6",
    ),
    "csc_conv_tasnet": _trunk(
        1100,
        *FINE,
        "model.trunk='conv_tasnet'",
        "model.dilation_cycle=6",
        "model.hidden=192",
        "model.shared_blocks=6",
        "model.separation_blocks=6",
    ),
    "csc_galr": _trunk(
        1700,
        *FINE,
        "model.trunk='galr'",
        "model.channels=64",
        "model.hidden=64",
        "model.segment=32",
    ),
    "csc_label_free": _label_free(),
} | {f"csc_label_free_{alpha}": _label_free(f"train.contrast.alpha={alpha}") for alpha in ALPHAS}
"""Ablations whose head hears all views take half the steps, each of which costs twice as much."""

BY_ALPHA = {0.0: "csc_label_free"} | {alpha: f"csc_label_free_{alpha}" for alpha in ALPHAS}
"""Systems that differ in the uniform share of p alone."""

DATASETS: dict[str, tuple[str, ...]] = {
    "wild": (),
    "unnamed": ("build.mixing.by_recording=true",),
    "pairs": PAIRS,
    "asked": (
        "build.mixing.interferer_shares=[0.2, 0.8]",
        "build.mixing.absent_share=0.05",
        "build.mixing.sir_max_db=5.0",
    ),
    "pairs_10": (*PAIRS, "build.train_episodes=400", "build.slice_mb=0.65"),
    "pairs_1": (*PAIRS, "build.train_episodes=40", "build.slice_mb=0.065"),
    "mixed": (
        "build.mixing.mixit_share=1.0",
        "build.mixing.interferer_shares=[0.0, 0.0, 0.0, 1.0]",
        "build.mixing.noise_share=0.0",
        "build.mixing.sir_max_db=5.0",
        "model.num_slots=4",
    ),
}
"""What differs in the mixtures; of `mixed` no voice is known: they are sums of two mixtures."""


def _extractor(name: str, steps: int, *changes: str) -> Stage:
    """Return an extractor for what CSC has come to."""
    begun = ("train.init_from='the stage before'", "train.views=0", "train.speeds=[0.9, 1.1]")
    told = ("train.task='extract'", f"model.extractor='{name}'", *begun, *changes)
    return Stage("asked", steps, told)


EXTRACTORS = {
    "extract_film": _extractor("film", 4000),
    "extract_voicefilter": _extractor(
        "voicefilter", 400, "model.extractor_channels=16", "train.extraction_loss='power_law'"
    ),
}
"""Networks that let one voice through, each trained for what `csc` of the same seed has come to."""

SEPARATORS = {
    "isolated_100": SEPARATION._replace(steps=SEPARATOR_STEPS),
    "isolated_10": SEPARATION._replace(dataset="pairs_10", steps=SEPARATOR_STEPS),
    "isolated_1": SEPARATION._replace(dataset="pairs_1", steps=SEPARATOR_STEPS),
    "mixit": SEPARATION._replace(dataset="mixed", steps=SEPARATOR_STEPS),
}
"""Separators for as many steps, told the voices of all mixtures, of a part of them, or of none."""

PEERS = {"ecapa": 9000, "same_trunk": 10700}
"""Plain networks on the mixture as it is, trained with AAM-softmax on the anchor; their steps."""
