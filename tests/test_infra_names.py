"""What infra/ names is there: metrics, commands of csc, configuration keys, paths."""

import json
import re
import shlex
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import promql_parser
import pytest
import yaml
from typer.main import get_command

from jobs.cli import app
from jobs.config import Config, _keys, load_config
from jobs.submission import for_cluster
from jobs.telemetry import METRICS
from tests.infra_files import INFRA, ROOT, SBATCH, installed, one, rules, run

README = (INFRA / "README.md").read_text()
OURS = re.compile(r"ray_csc_\w+")
# Of kube-state-metrics, which kube-prometheus-stack brings.
OTHERS = {
    *("kube_cronjob_status_last_successful_time", "kube_cronjob_created"),
    *("kube_cronjob_spec_suspend", "kube_job_failed", "kube_job_status_start_time"),
}


def expressions() -> list[str]:
    dashboard = json.loads((INFRA / "monitoring/dashboard.json").read_text())
    shown = [target["expr"] for panel in dashboard["panels"] for target in panel.get("targets", [])]
    return shown + [rule["expr"] for rule in rules()]


def metrics(text: str) -> set[str]:
    """Return the names of metrics in an expression, which is to be valid PromQL."""
    promql_parser.parse(text.replace("$run", ".*"))
    bare = re.sub(r'"[^"]*"|\b(?:by|on) \([^)]*\)', "", text)
    return set(re.findall(r"\b(?:ray|kube)_\w+", bare))


def test_expressions_are_promql_on_metrics_that_are_exported() -> None:
    found = set().union(*map(metrics, expressions()))
    folder = Path(find_spec("ray").submodule_search_locations[0])  # type: ignore[union-attr,index]
    dashboards = (folder / "dashboard/modules/metrics/dashboards").glob("*.py")
    rays = set(re.findall(r"\bray_\w+", "".join(path.read_text() for path in dashboards)))
    assert found - OTHERS - rays == set(filter(OURS.match, found))


def test_metrics_of_csc_are_those_that_it_exports_by_tags_that_they_have() -> None:
    ends = {"counter": "_total", "gauge": ""}
    exported = {f"ray_{name}{ends[one.kind]}": set(one.tags) for name, one in METRICS.items()}
    shown = {text: set(OURS.findall(text)) for text in expressions()}
    assert set().union(*shown.values()) == exported.keys()  # each somewhere, and no other
    for text, names in shown.items():
        labels = set(re.findall(r"\w+", " ".join(re.findall(r"(?:by|on) \(([^)]*)\)", text))))
        assert all(labels <= exported[name] for name in names), text


def test_prometheus_takes_the_rules(tmp_path: Path) -> None:
    promtool, path = installed("promtool"), tmp_path / "rules.yaml"
    path.write_text(yaml.safe_dump(one("PrometheusRule")["spec"]))
    assert f"{len(rules())} rules found" in run(promtool, "check", "rules", path)


HAPPENED = {  # every ten minutes, and for each rule the labels and the value of what it then finds
    "CscScheduleMissed": (
        [
            ('kube_cronjob_created{namespace="csc", cronjob="csc-never"}', "0x400"),
            ('kube_cronjob_created{namespace="csc", cronjob="csc-good"}', "0x400"),
            (
                'kube_cronjob_status_last_successful_time{namespace="csc", cronjob="csc-good"}',
                "180000x400",
            ),
            ('kube_cronjob_created{namespace="csc", cronjob="csc-off"}', "0x400"),
            ('kube_cronjob_spec_suspend{namespace="csc", cronjob="csc-off"}', "1x400"),
            ('kube_cronjob_spec_suspend{namespace="csc", cronjob="csc-never"}', "0x400"),
        ],
        ('{cronjob="csc-never"}', 216000),
    ),
    "CscJobFailed": (
        [
            ('kube_job_failed{namespace="csc", job_name="csc-new", condition="true"}', "1x400"),
            ('kube_job_status_start_time{namespace="csc", job_name="csc-new"}', "180000x400"),
            ('kube_job_failed{namespace="csc", job_name="csc-old", condition="true"}', "1x400"),
            ('kube_job_status_start_time{namespace="csc", job_name="csc-old"}', "3600x400"),
        ],
        ('{job_name="csc-new"}', 1),
    ),
    "CscTrainingStalled": (
        [
            ('ray_csc_train_loss{run="stuck"}', "1x400"),
            ('ray_csc_train_step_seconds{run="stuck"}', "2x400"),
            ('ray_csc_train_loss{run="ended"}', "1x400"),
            ('ray_csc_train_step_seconds{run="ended"}', "NaN+0x400"),
        ],
        ('{run="stuck"}', 0),
    ),
}


@pytest.mark.parametrize("alert", HAPPENED)
def test_a_rule_finds_what_it_is_for_and_nothing_else(alert: str, tmp_path: Path) -> None:
    promtool, path = installed("promtool"), tmp_path / "test.yaml"
    series, (labels, value) = HAPPENED[alert]
    (expression,) = [rule["expr"] for rule in rules() if rule["alert"] == alert]
    found = {
        "expr": expression,
        "eval_time": "60h",
        "exp_samples": [{"labels": labels, "value": value}],
    }
    test = {
        "interval": "10m",
        "input_series": [{"series": name, "values": values} for name, values in series],
        "promql_expr_test": [found],
    }
    path.write_text(yaml.safe_dump({"tests": [test]}))
    run(promtool, "test", "rules", path)


def shell_lines(text: str) -> Iterator[list[str]]:
    """Yield the words of each command in the blocks of a document."""
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(re.sub(r"[$<]\(|\)$", " ", line), comments=True)
            while words and (words[0] == "export" or "=" in words[0]):
                words.pop(0)
            yield words[: words.index("&")] if "&" in words else words


def calls_of_csc() -> list[list[str]]:
    calls = [words[1:] for words in shell_lines(README) if words[:1] == ["csc"]]
    calls += [shlex.split(text) for text in re.findall(r"`csc ([^`]+)`", README)]
    sbatch = re.search(r"csc\.sbatch (.*)", SBATCH.read_text())
    assert sbatch
    return [*calls, shlex.split(sbatch[1]), shlex.split(one("RayJob")["spec"]["entrypoint"])[1:]]


def commands() -> dict[str, Any]:
    command: Any = get_command(app)
    return command.commands


def parse(words: list[str]) -> None:
    """Raise what the command line says to words that it does not take."""
    command: Any = get_command(app)
    context = command.make_context("csc", list(words))
    while hasattr(command, "commands"):
        rest = [*context._protected_args, *context.args]
        if not rest:
            return
        name, command, rest = command.resolve_command(context, rest)
        context = command.make_context(name, rest, parent=context)


@pytest.mark.parametrize("words", calls_of_csc(), ids=" ".join)
def test_commands_that_are_named_are_commands_of_csc(words: list[str]) -> None:
    parse(words)


def test_what_an_alert_advises_is_a_command_of_csc() -> None:
    advised = [name for rule in rules() for name in re.findall(r"(?<!-n )csc (\w+)", str(rule))]
    assert len(advised) >= 5
    assert set(advised) <= set(commands())


def test_the_examples_of_the_readme_make_one_configuration(tmp_path: Path) -> None:
    blocks = re.findall(r"```toml\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    path = tmp_path / "mine.toml"
    path.write_text("\n".join(blocks))
    assert len(blocks) == 2
    config = for_cluster("run", load_config(str(path)))
    assert (config.train.workers, config.ray.tasks.resources) == (8, {"data": 0.01})


def test_paths_and_keys_that_are_named_are_there() -> None:
    spans = re.findall(r"`([^`\n]+)`", README)
    below = [span for span in spans if re.fullmatch(r"[a-z-]+/[\w./-]*", span)]
    words = [word.removeprefix("file://") for line in shell_lines(README) for word in line]
    paths = [word for word in words if word.startswith("infra/") and word != "infra/compose/.env"]
    assert len(below) > 10 < len(paths)
    assert [path for path in below if not any((top / path).exists() for top in (INFRA, ROOT))] == []
    assert [path for path in paths if not (ROOT / path).exists()] == []
    known = set(_keys(Config, ""))
    pattern = re.compile(rf"\b((?:{'|'.join(Config.model_fields)})\.[a-z_]+(?:\.[a-z_]+)*)")
    text = " ".join(spans) + str(rules())
    named = set(pattern.findall(text))
    assert len(named) > 5
    assert named <= known
