"""The command of the campaign."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from jobs.config import Config, load_config
from jobs.run import Run
from tests.benchmarks.campaign import __doc__ as about
from tests.benchmarks.campaign.asking import asked
from tests.benchmarks.campaign.figure import by_alpha
from tests.benchmarks.campaign.scoring import (
    SPLITS,
    Judge,
    csc_embed,
    lda_embed,
    peer_embed,
    table,
    write_scores,
)
from tests.benchmarks.campaign.systems import (
    CSC_SYSTEMS,
    DATASETS,
    EXTRACTORS,
    PEERS,
    SEPARATORS,
    Stage,
)
from tests.benchmarks.campaign.training import train_csc, train_peer

FILE = str(Path(__file__).parent / "campaign.toml")
LDA = "mfcc_lda"
SYSTEMS = [*CSC_SYSTEMS, *PEERS, *EXTRACTORS, *SEPARATORS, LDA]
Given = list[str]


def prepare(given: Given) -> None:
    """Ingest, and build the datasets."""
    for changes in DATASETS.values():
        with Run(load_config(FILE, [*given, *changes])) as run:
            _ = run.build


def configured(stage: Stage, seed: int, given: Given) -> Config:
    """Return the configuration of a stage; the seed is that of training, not of the data."""
    changes = [*DATASETS[stage.dataset], *stage.changes]
    return load_config(FILE, [*given, *changes, f"train.steps={stage.steps}"])


def run(name: str, seed: int, given: Given) -> None:
    """Train and score a system."""
    wild = configured(Stage("wild", 1), seed, given)
    root = Path(wild.workspace) / "campaign" / name / str(seed)
    root.mkdir(parents=True, exist_ok=True)
    improvement, cost = {}, 0.0
    judges = {split: Judge.of(wild, split) for split in SPLITS}
    if name in CSC_SYSTEMS:
        folder = None
        for number, stage in enumerate(CSC_SYSTEMS[name]):
            before, folder = folder, stage_folder(root.parent.parent, name, number, seed)
            config = configured(stage, seed, given)
            if not (folder / "cost.json").exists():
                train_csc(config, seed, before, folder)
            cost += json.loads((folder / "cost.json").read_text())["core_s"]
        assert folder is not None, "every system has a stage"
        embed, model = csc_embed(folder)
        improvement = {split: judges[split].improvement_db(model) for split in SPLITS}
    elif name in PEERS:
        config = configured(Stage("wild", PEERS[name]), seed, given)
        if not (root / "cost.json").exists():
            train_peer(name, config, seed, root)
        cost = json.loads((root / "cost.json").read_text())["core_s"]
        embed = peer_embed(name, config, root)
    else:
        embed = lda_embed(wild)
    for split, judge in judges.items():
        gain = {"improvement_db": improvement[split]} if improvement else {}
        write_scores(root, split, judge.scores(embed), {"core_s": cost, **gain})


def run_extractor(name: str, seed: int, given: Given) -> None:
    """Train an extractor for what `csc` of a seed has come to."""
    config = configured(EXTRACTORS[name], seed, given)
    root = Path(config.workspace)
    before = stage_folder(root / "campaign", "csc", len(CSC_SYSTEMS["csc"]) - 1, seed)
    folder = extractor_folder(config, name, seed)
    if not (folder / "cost.json").exists():
        train_csc(config, seed, before, folder)


def extractor_folder(config: Config, name: str, seed: int) -> Path:
    """Return where a trained extractor lies."""
    return Path(config.workspace) / "extraction" / name / str(seed)


def run_separator(name: str, seed: int, given: Given) -> None:
    """Train a separator, to be heard by `tests.benchmarks.arrays`."""
    config = configured(SEPARATORS[name], seed, given)
    folder = Path(config.workspace) / "separators" / name / str(seed)
    if not (folder / "cost.json").exists():
        train_csc(config, seed, None, folder)


def stage_folder(root: Path, name: str, number: int, seed: int) -> Path:
    """Return where a stage lies: equal first stages are one, trained once for each seed."""
    stages = CSC_SYSTEMS[name][: number + 1]
    first = next(other for other, its in CSC_SYSTEMS.items() if its[: number + 1] == stages)
    return root / first / str(seed) / f"stage-{number}"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        "python -m tests.benchmarks.campaign",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["prepare", "run", "table", "figure", "extraction"])
    parser.add_argument("system", nargs="?", choices=SYSTEMS)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--against", default="ecapa", choices=SYSTEMS, help="what ratios in the table are to"
    )
    parser.add_argument("--set", action="append", default=[], dest="given")
    told = parser.parse_args()
    fitting: dict[str, Iterable[str]] = {"run": SYSTEMS, "extraction": EXTRACTORS}
    if told.what in fitting and told.system not in fitting[told.what]:
        parser.error(f"{told.what} which of {', '.join(fitting[told.what])}?")
    torch.set_num_threads(1)
    if told.what == "prepare":
        prepare(told.given)
    elif told.what == "run" and told.system in EXTRACTORS:
        run_extractor(told.system, told.seed, told.given)
    elif told.what == "run" and told.system in SEPARATORS:
        run_separator(told.system, told.seed, told.given)
    elif told.what == "run":
        run(told.system, told.seed, told.given)
    elif told.what == "extraction":
        config = load_config(FILE, told.given)
        folder = extractor_folder(config, told.system, told.seed)
        print(asked(folder, Judge.of(config, "test")))
    elif told.what == "figure":
        config = load_config(FILE, told.given)
        print(by_alpha(Path(config.workspace) / "campaign", Judge.of(config, "test")))
    else:
        config = load_config(FILE, told.given)
        judges = {split: Judge.of(config, split) for split in SPLITS}
        replicates = config.evaluate.bootstrap_replicates
        print(table(Path(config.workspace) / "campaign", judges, replicates, told.against))


if __name__ == "__main__":
    main()
