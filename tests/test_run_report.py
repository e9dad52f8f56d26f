"""The page of an evaluation: in a browser, with sounds that play, and the trials it shows."""

import base64
import io
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile

from jobs.examples import KINDS, OF_EACH_KIND, choose, hardest, sound
from jobs.report import sir_plot
from pipeline.shards import read_catalogue
from pipeline.storage import Folder
from pipeline.trials import Condition, TrialConfig, make_trials
from tests.test_ingest_report import browse
from tests.whole_run import evaluation_in


@pytest.fixture(scope="module")
def report(workspace: Path) -> Path:
    return Path(evaluation_in(workspace).path("report.html"))


@pytest.mark.skipif(not shutil.which("chromium"), reason="no chromium on the PATH")
def test_the_report_opens_in_a_browser_and_asks_for_nothing(report: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_bytes(report.read_bytes())
    dom, console = browse(page)
    assert console == []
    assert dom.count("<table>") == 2
    examples = dom.count("<section class=")
    assert 4 < examples <= len(KINDS) * OF_EACH_KIND
    assert dom.count("<audio ") == 4 * examples
    assert dom.count("<img ") == 4 * examples + 3
    assert not re.search(r"<script|src=\"(?!data:)|href=", dom)
    for word in ("sir_0_db", "noise_0_db", "untrained", "mfcc", "same speaker, taken for another"):
        assert word in dom


def test_the_sounds_are_what_they_are_said_to_be(report: Path) -> None:
    text = report.read_text()
    sounds = re.findall(r"data:audio/mpeg;base64,([^\"]+)", text)
    lengths = []
    for data in sounds:
        samples, rate_hz = soundfile.read(io.BytesIO(base64.b64decode(data)))
        assert rate_hz == 16_000
        assert np.abs(samples).max() > 0.001
        lengths.append(len(samples))
    heard = np.array(lengths).reshape(-1, 4)[:, 1:]
    assert (heard == heard[:, :1]).all()  # slots are as long as the mixture


def test_examples_are_the_worst_errors_and_ordinary_trials(store: Folder) -> None:
    config = TrialConfig(nontargets_per_test=20)
    trials = make_trials(read_catalogue(store), "test", config, seed=1)
    score = np.random.default_rng(0).normal(size=len(trials.target)) + trials.target
    chosen = list(choose(score, trials, many=2))
    assert [kind for kind, _ in chosen] == [kind for kind in KINDS for _ in range(2)]
    places = np.array([trial for _, trial in chosen])
    assert len(set(trials.test[places].tolist())) == len(chosen)
    target, nontarget = score[trials.target], score[~trials.target]
    assert trials.target[places].tolist() == [True, True, False, False] * 2
    assert score[places[0]] == target.min()
    assert np.isin(score[places[2]], np.sort(nontarget)[-5:])  # but for a test side shown before
    rank = (target < score[places[4]]).mean()
    assert 0.3 < rank < 0.7


def test_the_hardest_condition_is_shown(store: Folder) -> None:
    trials = make_trials(read_catalogue(store), "test", TrialConfig(), seed=1)
    rates = {"clean": 0.1, "noise_0_db": 0.5, "sir_0_db": 0.3, "two_0_db": 0.2}
    results = [
        {"system": "csc", "condition": name, "eer": {"value": rate}} for name, rate in rates.items()
    ]
    assert hardest(trials, results, "csc") == "sir_0_db"  # of those with somebody to separate
    assert hardest(trials, results[:2], "csc") == "noise_0_db"


def test_a_curve_needs_two_points() -> None:
    one = {"clean": Condition(), "sir_5_db": Condition(interferers=1, sir_db=5.0)}
    assert sir_plot([], one) is None


def test_loud_samples_are_not_cut_off() -> None:
    loud = 3 * np.sin(np.arange(16_000) / 10).astype(np.float32)
    samples, _ = soundfile.read(io.BytesIO(sound("loud", "", loud).mp3))
    assert 0.8 < np.abs(samples).max() < 1.2
    assert abs(np.corrcoef(samples, loud[: len(samples)])[0, 1]) > 0.99  # a sine still
