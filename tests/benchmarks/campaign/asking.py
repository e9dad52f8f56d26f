"""What an extractor lets through, by condition: the figures of an evaluation, in this process."""

from pathlib import Path

import numpy as np

from jobs.extraction import choose_pairs, measure_condition, unit_vectors
from jobs.extraction_report import extraction_rows
from jobs.extraction_summary import summarise_extraction
from tests.benchmarks.campaign.scoring import Judge, csc_embed

SIDES = 100


def asked(folder: Path, judge: Judge) -> str:
    """Return a table of what comes out when a model is asked for who is there, and who is not."""
    (embed, model), trials = csc_embed(folder), judge.trials
    pairs = choose_pairs(trials, SIDES)
    enrolled = trials.enrolled[trials.enrolment[np.stack(pairs)]]
    vectors, tests = unit_vectors(model, judge.audio, enrolled), trials.test[pairs.target].tolist()
    found = {}
    for name in trials.conditions:
        found[name] = measure_condition(model, judge.audio, tests, name, vectors)
        print(f"{folder.parent.name}/{folder.name}: {name}", flush=True)
    scores = judge.scores(embed)
    rows = list(extraction_rows(summarise_extraction(found, scores, pairs, trials, judge.config)))
    lines = ["| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row.values()) + " |" for row in rows)])
