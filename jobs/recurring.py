"""Recurring jobs as Kubernetes objects: what runs on a cluster, and when.

A CronJob's pod submits the command to a cluster that stands and waits for its end; a RayCronJob
makes a cluster of its own for every run. The configuration lies beside, in a ConfigMap.
"""

import json
import math
import re
import shlex
from importlib.metadata import version
from typing import Any, Literal, NamedTuple
from urllib.parse import urlsplit

from jobs.cli_schedule import OVERLAP
from jobs.config import Config
from jobs.cron import checked_cron, checked_time_zone
from jobs.jobserver import STOPPED, server_url
from jobs.kubectl import PART_OF, SCHEDULE, STAGE, Manifest, check_name
from jobs.submission import for_cluster, is_local, places
from pipeline.errors import CscError

Kind = Literal["cronjob", "raycronjob"]

CONFIG_NAME, CONFIG_PATH = "config.json", "/etc/csc/config.json"
TOKEN_FOLDER, TOKEN_NAME = "/etc/csc-token", "auth_token"  # as KubeRay names it in the Secret
MEMORY = re.compile(r"[1-9][0-9]*[MG]i", re.ASCII)
LATE_S = 3600  # that a run may begin after its time; later than that it is left out
KEPT_S = 3600  # that a cluster of its own stays after its job, for a look at its logs
USER_ID = 1000
STAYS = "karpenter.sh/do-not-disrupt"  # no node is emptied for the sake of its price
SHARED_MEMORY = {"name": "shm", "emptyDir": {"medium": "Memory"}}  # of which Ray takes 30 %
GPU_NODES = [
    {"key": "csc/nodes", "value": "gpu", "effect": "NoSchedule"},
    {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"},
]


class Schedule(NamedTuple):
    """A recurring job: what runs, when, and in what pods."""

    name: str
    cron: str
    stage: str
    kind: Kind = "cronjob"
    cluster: str = "http://csc-head-svc:8265"  # job server, as pods reach it; for a CronJob
    time_zone: str = "Etc/UTC"
    namespace: str = ""  # empty: that of kubectl's context
    image: str = ""  # empty: csc-cuda where pods are to have GPUs, else csc-cpu
    token_secret: str = "csc-ray-token"
    env_secret: str = "csc-env"
    deadline_hours: float = 24.0
    retries: int = 3  # of a CronJob's run
    cpus: float = 4.0  # of the pods of a cluster of its own
    memory: str = "16Gi"

    @property
    def object_name(self) -> str:
        return f"csc-{self.name}"

    @property
    def labels(self) -> dict[str, str]:
        return {PART_OF: "csc", SCHEDULE: self.name, STAGE: self.stage}

    @property
    def deadline_s(self) -> int:
        return round(3600 * self.deadline_hours)


def objects(schedule: Schedule, config: Config) -> list[Manifest]:
    """Return the objects of a schedule: its configuration, and what starts its runs.

    Raises:
        CscError: the schedule or its configuration is wrong, or would not work on a cluster.
    """
    config = for_cluster(schedule.stage, config)
    schedule = _checked(schedule)
    if schedule.kind == "cronjob":
        starter = _object("batch/v1", "CronJob", schedule, spec=_cron_job(schedule))
    else:
        _check_pods_find(config)
        starter = _object("ray.io/v1", "RayCronJob", schedule, spec=_ray_cron_job(schedule, config))
    data = {CONFIG_NAME: config.model_dump_json(indent=2)}
    return [_object("v1", "ConfigMap", schedule, data=data), starter]


def _checked(schedule: Schedule) -> Schedule:
    """Return a schedule as Kubernetes takes it."""
    check_name(schedule.name)
    cluster = server_url(schedule.cluster)
    if schedule.kind == "cronjob" and urlsplit(cluster).hostname in ("localhost", "127.0.0.1"):
        raise CscError(
            f"--cluster {cluster}: in a pod, that is the pod itself; give the address of the "
            "head's service, as in http://csc-head-svc:8265"
        )
    if not MEMORY.fullmatch(schedule.memory):
        raise CscError(f"--memory {schedule.memory!r}: write it as 16Gi or 800Mi")
    checked_time_zone(schedule.time_zone)
    return schedule._replace(cron=checked_cron(schedule.cron), cluster=cluster)


def _check_pods_find(config: Config) -> None:
    """Refuse paths: nothing is mounted into the pods of a cluster of its own."""
    for key, place in places(config):
        if is_local(place):
            raise CscError(
                f"{key}: {place} is on a disk, and pods of --kind raycronjob have none but their "
                "own: give an s3:// address (of MLflow, a server), or use --kind cronjob with a "
                "cluster that sees it"
            )


def _object(group: str, kind: str, schedule: Schedule, **parts: Any) -> Manifest:
    metadata: Manifest = {"name": schedule.object_name, "labels": schedule.labels}
    if schedule.namespace:
        metadata["namespace"] = schedule.namespace
    return {"apiVersion": group, "kind": kind, "metadata": metadata, **parts}


def _cron_job(schedule: Schedule) -> Manifest:
    """Return the spec of a CronJob; its pod lives as long as the run that it submits."""
    env = {"CSC_SCHEDULE": schedule.name}
    if schedule.stage == "run":
        env["CSC_IF_NEW"] = "1"
    command = ["csc", "submit", schedule.stage, "--attach", "--config", CONFIG_PATH]
    command += ["--cluster", schedule.cluster, *(word for name in env for word in ("--env", name))]
    env["RAY_AUTH_TOKEN_PATH"] = f"{TOKEN_FOLDER}/{TOKEN_NAME}"
    container = {
        "name": "submit",
        "image": schedule.image or "csc-cpu",
        "command": command,
        "env": [{"name": name, "value": value} for name, value in env.items()],
        "resources": {"requests": {"cpu": "250m", "memory": "1Gi"}, "limits": {"memory": "2Gi"}},
    }
    secret = {"secretName": schedule.token_secret, "defaultMode": 0o440}
    pod = _pod(schedule, container, {TOKEN_FOLDER: {"name": "token", "secret": secret}})
    pod["spec"] |= {
        "restartPolicy": "Never",
        "serviceAccountName": "csc-submit",
        "automountServiceAccountToken": False,
    }
    evicted = {"type": "DisruptionTarget", "status": "True"}
    ended = {"operator": "In", "values": [OVERLAP, STOPPED]}
    rules = [  # the job goes on without the pod that followed it: the next one attaches to it
        {"action": "Ignore", "onPodConditions": [evicted]},
        {"action": "FailJob", "onExitCodes": ended},
    ]
    job = {
        "backoffLimit": schedule.retries,
        "activeDeadlineSeconds": schedule.deadline_s,
        "podFailurePolicy": {"rules": rules},
        "template": pod,
    }
    return {
        "schedule": schedule.cron,
        "timeZone": schedule.time_zone,
        "concurrencyPolicy": "Forbid",
        "startingDeadlineSeconds": LATE_S,
        "successfulJobsHistoryLimit": 3,
        "failedJobsHistoryLimit": 3,
        "jobTemplate": {"metadata": {"labels": schedule.labels}, "spec": job},
    }


def _ray_cron_job(schedule: Schedule, config: Config) -> Manifest:
    """Return the spec of a RayCronJob, whose clusters end with their jobs."""
    command = ["csc", schedule.stage, "--config", CONFIG_PATH, "--schedule", schedule.name]
    command += ["--if-new"] if schedule.stage == "run" else []
    head = {
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": _ray_pod("ray-head", schedule, config, gpus=0),
    }
    job = {
        "entrypoint": shlex.join(command),
        "submissionMode": "HTTPMode",  # by the operator: no third pod
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": KEPT_S,
        "backoffLimit": 0,  # a whole cluster anew, even for a run that found another at work
        "activeDeadlineSeconds": schedule.deadline_s,
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token", "secretName": schedule.token_secret},
            "headGroupSpec": head,
            "workerGroupSpecs": [_workers(schedule, config)],
        },
    }
    return {"schedule": schedule.cron, "timeZone": schedule.time_zone, "jobTemplate": job}


def _workers(schedule: Schedule, config: Config) -> Manifest:
    """Return a pod for each worker of a training; tasks of other stages run there as well."""
    count, needs = config.train.workers, config.ray.workers
    wanted = {**config.ray.tasks.resources, **needs.resources}
    labels = json.dumps(dict.fromkeys(sorted(wanted), 1))
    gpus = math.ceil(1 if needs.gpus is None else needs.gpus)
    return {
        "groupName": "workers",
        "replicas": count,
        "minReplicas": count,
        "maxReplicas": count,
        "rayStartParams": {"resources": json.dumps(labels)} if wanted else {},  # for a shell
        "template": _ray_pod("ray-worker", schedule, config, gpus),
    }


def _ray_pod(name: str, schedule: Schedule, config: Config, gpus: int) -> Manifest:
    cpus = max(schedule.cpus, config.ray.tasks.cpus, config.ray.workers.cpus)
    resources = {"cpu": f"{cpus:g}", "memory": schedule.memory}
    if gpus:
        resources["nvidia.com/gpu"] = str(gpus)
    container = {
        "name": name,
        "image": schedule.image or ("csc-cuda" if gpus else "csc-cpu"),
        "envFrom": [{"secretRef": {"name": schedule.env_secret, "optional": True}}],
        "resources": {"requests": resources, "limits": resources},
    }
    volumes: dict[str, Manifest] = {"/dev/shm": SHARED_MEMORY}
    if config.ray.cache_folder:
        volumes[config.ray.cache_folder] = {"name": "cache", "emptyDir": {}}
    pod = _pod(schedule, container, volumes)
    pod["spec"] |= {"serviceAccountName": "csc"} | ({"tolerations": GPU_NODES} if gpus else {})
    return pod


def _pod(schedule: Schedule, container: Manifest, volumes: dict[str, Manifest]) -> Manifest:
    """Return a pod that has the configuration, and other volumes by where they are mounted."""
    config = {"name": "config", "mountPath": CONFIG_PATH, "subPath": CONFIG_NAME, "readOnly": True}
    mounts = [{"name": volume["name"], "mountPath": path} for path, volume in volumes.items()]
    confined = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    spec = {
        "securityContext": {
            "runAsNonRoot": True,
            "runAsUser": USER_ID,
            "fsGroup": USER_ID,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
        "containers": [
            {**container, "securityContext": confined, "volumeMounts": [config, *mounts]}
        ],
        "volumes": [
            {"name": "config", "configMap": {"name": schedule.object_name}},
            *volumes.values(),
        ],
    }
    metadata = {"labels": schedule.labels, "annotations": {STAYS: "true"}}
    return {"metadata": metadata, "spec": spec}
