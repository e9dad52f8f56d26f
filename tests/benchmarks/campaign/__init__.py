"""The learning campaign: what CSC is worth beside plain networks, part by part.

    C="python -m tests.benchmarks.campaign"
    $C prepare [--set KEY=VALUE]            # ingest, and two datasets: pairs, and the wild
    $C run csc --seed 1 [--set ...]         # one system, to its end; again: nothing is done twice
    $C table [--against csc] [--set ...]    # error rates with intervals of all that has run
    $C extraction extract_film [...]        # what an extractor lets through, by condition
    $C figure [--set ...]                   # error rates against alpha, of what has run of it

`--set` overrides `campaign.toml`, which names the shipped sample, a third of the speech that the
published results were made on. All systems are trained by plain loops of one process on one core,
with as many steps as cost about the same core-seconds (`systems.py`, measured values are in the
table); nothing is chosen on the test split, and the averaged weights of the end are judged.
"""
