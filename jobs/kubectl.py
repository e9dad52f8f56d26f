"""Schedules on a Kubernetes cluster, through kubectl: whom it lets in, and where, is its matter."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml

from pipeline.errors import CscError

Manifest = dict[str, Any]

PART_OF, SCHEDULE, STAGE = "app.kubernetes.io/part-of", "csc.schedule", "csc.stage"  # labels
CRON_JOBS, RAY_CRON_JOBS = "cronjobs.batch", "raycronjobs.ray.io"
NAME = re.compile(r"[a-z0-9]([-a-z0-9]{0,30}[a-z0-9])?")  # KubeRay adds to it, up to 47 characters
RESERVED = ("add", "list", "suspend", "resume", "remove")
RESOURCES = {"CronJob": CRON_JOBS, "RayCronJob": RAY_CRON_JOBS}
NO_SUCH_KIND = "the server doesn't have a resource type"
ANSWER = "--request-timeout=30s"


def check_name(name: str) -> None:
    """Refuse what cannot name a schedule.

    Raises:
        CscError: it is no name of a Kubernetes object, too long, or a word of the command.
    """
    if not NAME.fullmatch(name) or name in RESERVED:
        raise CscError(
            f"{name!r} cannot name a schedule: use up to 32 small letters, digits and dashes, with "
            f"no dash at either end, and none of {', '.join(RESERVED)}"
        )


class Found(NamedTuple):
    """A schedule as the cluster has it."""

    name: str
    kind: str
    object_name: str
    cron: str
    time_zone: str
    suspended: bool
    last_run: str  # of when it was due, or empty
    last_success: str
    stage: str


class Kubectl:
    """The kubectl of this machine, for one namespace."""

    def __init__(self, namespace: str = "") -> None:
        """Look for kubectl.

        Raises:
            CscError: it is not there.
        """
        program = shutil.which("kubectl")
        if program is None:
            raise CscError(
                "there is no kubectl here: install it, or have --render print what to apply"
            )
        where = [f"--namespace={namespace}"] if namespace else []
        self._command = [program, ANSWER, *where]

    def _ask(self, *words: str, given: str | None = None) -> str:
        done = subprocess.run(
            [*self._command, *words], input=given, capture_output=True, text=True, check=False
        )
        if done.returncode:
            said = done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"]
            raise CscError(f"kubectl {words[0]}: {said[-1]}")
        return done.stdout

    def apply(self, manifests: Sequence[Manifest]) -> str:
        """Make or change the objects of a schedule; return what kubectl says.

        Raises:
            CscError: the schedule is there as another kind of object, which would run as well.
        """
        starter = manifests[-1]
        name, kind = starter["metadata"]["labels"][SCHEDULE], starter["kind"]
        for there in self.schedules(name):
            if there.kind != kind:
                raise CscError(
                    f"schedule {name} is there as a {there.kind}, and both would run: first "
                    f"csc schedule remove {name}"
                )
        return self._ask("apply", "-f", "-", given=as_yaml(list(manifests)))

    def schedules(self, name: str = "") -> list[Found]:
        """Return all schedules, or those of a name."""
        chosen = f"{PART_OF}=csc,{SCHEDULE}" + (f"={name}" if name else "")
        items: list[Any] = []
        for resource in RESOURCES.values():
            try:
                told = self._ask("get", resource, "-l", chosen, "-o", "json")
            except CscError as error:
                if resource == RAY_CRON_JOBS and NO_SUCH_KIND in str(error):
                    continue  # KubeRay is not there, or older
                raise
            items += json.loads(told)["items"]
        return sorted(map(_found, items))

    def suspend(self, name: str, *, suspended: bool) -> None:
        """Have a schedule start nothing, or start again; what runs goes on.

        Raises:
            CscError: there is no such schedule.
        """
        patch = json.dumps({"spec": {"suspend": suspended}})
        for there in self._named(name):
            resource = RESOURCES[there.kind]
            self._ask("patch", resource, there.object_name, "--type=merge", "-p", patch)

    def remove(self, name: str) -> None:
        """Delete a schedule and its configuration.

        Raises:
            CscError: there is no such schedule.
        """
        resources = {RESOURCES[there.kind] for there in self._named(name)}
        chosen = f"{PART_OF}=csc,{SCHEDULE}={name}"
        self._ask("delete", ",".join([*sorted(resources), "configmaps"]), "-l", chosen)

    def _named(self, name: str) -> list[Found]:
        check_name(name)
        found = self.schedules(name)
        if not found:
            names = ", ".join(there.name for there in self.schedules()) or "none"
            raise CscError(f"there is no schedule {name!r}; there are: {names}")
        return found


def _found(item: Any) -> Found:
    about, spec, status = item["metadata"], item["spec"], item.get("status") or {}
    return Found(
        name=about["labels"][SCHEDULE],
        kind=item["kind"],
        object_name=about["name"],
        cron=spec["schedule"],
        time_zone=spec.get("timeZone", ""),
        suspended=bool(spec.get("suspend")),
        last_run=status.get("lastScheduleTime") or "",
        last_success=status.get("lastSuccessfulTime") or "",
        stage=about["labels"].get(STAGE, ""),
    )


def as_yaml(manifests: list[Manifest]) -> str:
    """Return objects as one file of several documents."""
    return str(yaml.dump_all(manifests, Dumper=_Plain, sort_keys=False, width=100))


class _Plain(yaml.SafeDumper):  # type: ignore[misc]
    """Writes texts of several lines as they are, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:  # noqa: ARG002
        return True


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar(
        "tag:yaml.org,2002:str", text, style="|" if "\n" in text else None
    )


_Plain.add_representer(str, _text)
