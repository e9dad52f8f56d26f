"""The compose file and the scripts of infra/ do what they say, with stand-ins for Slurm and Ray."""

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.infra_files import COMPOSE, INFRA, SBATCH, documents, installed, run


def test_compose_names_only_what_it_defines() -> None:
    text, (compose,) = COMPOSE.read_text(), documents(COMPOSE)
    services = compose["services"]
    needed = [set(service.get("depends_on", {})) for service in services.values()]
    assert set.union(*needed) <= set(services)
    volumes = {name.split(":")[0] for one in services.values() for name in one.get("volumes", [])}
    assert volumes == set(compose["volumes"])
    secrets = {name for one in services.values() for name in one.get("secrets", [])}
    assert secrets == set(compose["secrets"])
    assert {name["source"] for name in services["s3"]["configs"]} == set(compose["configs"])
    used = set(re.findall(r"\$\{(\w+)", text)) | {compose["secrets"]["ray_token"]["environment"]}
    given = re.findall(r"^(\w+)=", (COMPOSE.parent / ".env.example").read_text(), re.MULTILINE)
    assert used == set(given)
    ports = [port for service in services.values() for port in service.get("ports", [])]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)
    waited_for = set.union(*needed) - {"buckets"}  # which ends
    assert all("healthcheck" in services[name] for name in waited_for | {"ray"})


def test_compose_reads_the_file_and_asks_for_what_is_not_filled_in(tmp_path: Path) -> None:
    command, example = installed("docker-compose"), COMPOSE.parent / ".env.example"
    filled = tmp_path / "env"
    filled.write_text(re.sub(r"=$", "=a-value", example.read_text(), flags=re.MULTILINE))
    run(command, "-f", COMPOSE, "--env-file", filled, "config", "--quiet")
    empty = [command, "-f", str(COMPOSE), "--env-file", str(example), "config", "--quiet"]
    done = subprocess.run(empty, capture_output=True, text=True, timeout=60)
    assert done.returncode != 0
    assert "set it in .env" in done.stderr


STAND_INS = {
    "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "a\\nb\\n"; else echo "$@" >> calls; fi',
    "ray": 'echo "ray $*" >> calls; exec sleep 60',
    # Asked to wait for a number of nodes.
    "python": 'cat > /dev/null; until [ "$(grep -c ^ray calls)" -ge "$2" ]; do sleep 0.02; done',
    "csc": 'trap "echo interrupted >> calls; exit ${INTERRUPTED:-130}" INT\n'
    "token=$RAY_AUTH_TOKEN_PATH\n"
    'echo "$(stat -c %a "$token") $(wc -c < "$token") csc $*" >> calls\n'
    "for _ in $(seq ${NAPS:-0}); do sleep 0.1; done; exit 3",
}


@pytest.fixture
def slurm(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Give a folder with stand-ins for the commands of Slurm and Ray, and an environment."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in STAND_INS.items():
        (folder / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (folder / name).chmod(0o755)
    allocation = {
        "SLURM_JOB_ID": "70123",
        "SLURM_JOB_NODELIST": "n[1-2]",
        "SLURM_CPUS_ON_NODE": "4",
    }
    paths = {"PATH": f"{folder}:{os.environ['PATH']}", "CSC_TMPDIR": str(tmp_path)}
    return tmp_path, os.environ | allocation | paths


def test_the_slurm_script_starts_ray_runs_the_command_and_ends_as_it_does(
    slurm: tuple[Path, dict[str, str]],
) -> None:
    folder, environment = slurm
    words = ["bash", str(SBATCH), "run", "--config", "my file.toml"]
    done = subprocess.run(words, env=environment, cwd=folder, capture_output=True, timeout=30)
    calls = (folder / "calls").read_text()
    assert done.returncode == 3
    assert re.findall(r"--port=(\d+)", calls) == ["20123"]
    assert re.search(r"ray start --block --num-cpus=4 --address=\S+:20123\n", calls)
    assert "\n600 64 csc run --config my file.toml\n" in calls
    assert "requeue" not in calls
    assert {path.name for path in folder.iterdir()} == {"bin", "calls"}  # no token stays


@pytest.mark.parametrize(
    ("status", "said"),
    [(130, "interrupted\nrequeue 70123\n"), (0, "interrupted\n")],  # or it ended just then
)
def test_out_of_time_the_slurm_script_interrupts_the_command_and_queues_what_was_stopped(
    slurm: tuple[Path, dict[str, str]], status: int, said: str
) -> None:
    folder, environment = slurm
    naps = {"NAPS": "200", "INTERRUPTED": str(status)}
    script = subprocess.Popen(["bash", str(SBATCH), "run"], env=environment | naps, cwd=folder)
    calls, deadline = folder / "calls", time.monotonic() + 20
    while not (calls.exists() and "csc run" in calls.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    script.send_signal(signal.SIGUSR1)
    assert script.wait(20) == status
    assert calls.read_text().endswith(said)


@pytest.mark.parametrize("script", [SBATCH, INFRA / "image/constraints.sh"], ids=lambda p: p.name)
def test_scripts_are_clean(script: Path) -> None:
    run("bash", "-n", script)
    run(installed("shellcheck"), "--severity=warning", script)
