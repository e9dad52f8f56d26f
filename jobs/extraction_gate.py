"""What a promotion must not lose of extraction, of which error rates tell nothing."""

import json
from collections.abc import Mapping
from typing import Any

from jobs.config import Config
from jobs.extraction import EXTRACTION_VERSION
from jobs.extraction_summary import EXTRACTED
from jobs.registry import EXTRACTION, TRIALS, Version

BETTER = {"si_snr_db": 1, "kept_db": 1, "left_db": -1}
"""The figures that are compared, all in dB, and whether more or less of each is better."""
SAME = ("sides", "version")


def extraction_tag(extractor: str, index: Mapping[str, Any]) -> dict[str, str]:
    """Return what a version says of its extraction, given its network and an evaluation's index."""
    told: dict[str, Any] = {"extractor": extractor}
    if "extraction" in index:
        found = index["extraction"]
        told |= {"sides": found["sides"], "version": EXTRACTION_VERSION}
        told["figures"] = {
            row["condition"]: {name: round(row[name]["value"], 2) for name in BETTER}
            for row in found["results"]
            if row["output"] == EXTRACTED
        }
    return {EXTRACTION: json.dumps(told)}


def judge_extraction(challenger: Version, champion: Version, config: Config) -> tuple[bool, str]:
    """Return whether nothing is lost, and what is to be said of it, if anything."""
    ours, theirs = (
        json.loads(version.tags.get(EXTRACTION) or '{"extractor": "none"}')
        for version in (challenger, champion)
    )
    if theirs["extractor"] == "none":
        return True, ""
    if ours["extractor"] == "none":
        return False, f"it has no extractor, and version {champion.number} has one"
    same = challenger.tags[TRIALS] == champion.tags.get(TRIALS)
    if not same or any(key not in ours or ours[key] != theirs.get(key) for key in SAME):
        return True, "extraction was not compared, as it was not measured on the same test sides"
    lost_db = {
        f"{name} {key}": way * (ours["figures"][name][key] - theirs["figures"][name][key])
        for name in config.promote.guarded
        for key, way in BETTER.items()
        if name in ours["figures"]
    }
    worse = [
        f"{what} by {-gained:.1f}"
        for what, gained in lost_db.items()
        if gained < -config.promote.extraction_margin_db
    ]
    why = f"it extracts worse than version {champion.number}: {', '.join(worse)}" if worse else ""
    return not worse, why
