"""What an extractor lets through, by condition: the figures of an evaluation, in this process."""

from pathlib import Path

import numpy as np

from csc_model.model import CSC
from jobs.extraction import Measured, choose_pairs, measure_side, unit_vectors
from jobs.extraction_report import extraction_rows
from jobs.extraction_summary import summarise_extraction
from tests.benchmarks.campaign.scoring import Judge, csc_embed

SIDES = 100


def asked(folder: Path, judge: Judge) -> str:
    """Return a table of what comes out when a model is asked for who is there, and who is not."""
    model, trials = CSC.load(folder), judge.trials
    pairs = choose_pairs(trials, SIDES)
    enrolled = trials.enrolled[trials.enrolment[np.stack(pairs)]]
    vectors = unit_vectors(model, judge.audio, enrolled)
    found = {}
    for name, condition in trials.conditions.items():
        sides = [
            measure_side(model, judge.audio.side(place, name), 1 + condition.interferers, whose)
            for place, whose in zip(
                trials.test[pairs.target].tolist(), vectors.unbind(1), strict=True
            )
        ]
        found[name] = Measured(*(np.stack(parts) for parts in zip(*sides, strict=True)))
        print(f"{folder.parent.name}/{folder.name}: {name}", flush=True)
    scores = judge.scores(csc_embed(folder)[0])
    rows = list(extraction_rows(summarise_extraction(found, scores, pairs, trials, judge.config)))
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])
