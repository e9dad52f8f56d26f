"""What operators apply is what its readers take: Kubernetes, KubeRay, Ray, a container engine."""

import json
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from jobs.config import Config, load_config
from tests.infra_files import (
    COMPOSE,
    CONFIG,
    INFRA,
    ROOT,
    documents,
    inner,
    installed,
    manifests,
    one,
    run,
)
from tests.manifests import problems

KUSTOMIZATIONS = sorted(path.parent for path in INFRA.glob("**/kustomization.yaml"))


def job_with_its_cluster() -> dict[str, Any]:
    """Return the RayJob as kustomize makes it."""
    job = one("RayJob")
    job["spec"]["rayClusterSpec"] = one("RayCluster")["spec"]
    return job


@pytest.mark.parametrize(
    "manifest", manifests(), ids=lambda one: f"{one['kind']}/{one.get('metadata', {}).get('name')}"
)
def test_every_manifest_fits_its_schema_and_a_misspelt_key_does_not(
    manifest: dict[str, Any],
) -> None:
    assert problems(manifest) == []
    assert problems(manifest | {"specs": {}})
    for part in ("spec", "template", "containers"):
        for value in list(inner(manifest)):
            if isinstance(value, dict) and value.get(part):
                place = value[part][0] if part == "containers" else value[part]
                place["mispelt"] = 1
                assert problems(manifest), f"mispelt below {part}"
                del place["mispelt"]


def test_a_manifest_survives_being_written_and_read() -> None:
    found = manifests()
    assert list(yaml.safe_load_all(yaml.safe_dump_all(found))) == found


def test_the_definitions_of_kuberay_are_used_where_they_are_at_hand(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}
    spec = {"entrypoint": {"type": "string"}, "rayClusterSpec": cluster}
    spec |= {"backoffLimit": {"x-kubernetes-int-or-string": True}}
    named = {key: {"type": "string"} for key in ("apiVersion", "kind")}
    schema = {"type": "object", "properties": named | {"metadata": {"type": "object"}}}
    schema["properties"]["spec"] = {"type": "object", "properties": spec}  # type: ignore[index]
    versions = [{"name": "v1", "schema": {"openAPIV3Schema": schema}}]
    (tmp_path / "ray.io_rayjobs.yaml").write_text(yaml.safe_dump({"spec": {"versions": versions}}))
    job = job_with_its_cluster()
    job["spec"] = {key: job["spec"][key] for key in spec}
    monkeypatch.setenv("CSC_KUBERAY_CRDS", str(tmp_path))
    assert problems(job) == []
    job["spec"]["shutdownAfterJobFinishes"] = True  # known here, not in this definition
    assert "shutdownAfterJobFinishes" in "".join(problems(job))


@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: folder.name)
def test_kustomizations_name_files_that_are_there_and_render(folder: Path) -> None:
    (settings,) = documents(folder / "kustomization.yaml")
    generated = [name for one in settings.get("configMapGenerator", []) for name in one["files"]]
    missing = [name for name in settings["resources"] + generated if not (folder / name).exists()]
    assert missing == []
    rendered = list(yaml.load_all(run(installed("kubectl"), "kustomize", folder), yaml.CSafeLoader))
    assert [problem for manifest in rendered for problem in problems(manifest)] == []
    if folder.name == "job":
        kinds = {manifest["kind"]: manifest for manifest in rendered}
        assert "RayCluster" not in kinds
        made = kinds["RayJob"]["spec"]["rayClusterSpec"]
        assert made["authOptions"] == one("RayCluster")["spec"]["authOptions"]


def test_the_job_with_its_cluster_fits_the_schema() -> None:
    assert problems(job_with_its_cluster()) == []


def test_accounts_secrets_and_configurations_that_pods_name_are_there() -> None:
    found = manifests()
    secrets = {
        one["metadata"]["name"]: one["stringData"] for one in found if one["kind"] == "Secret"
    }
    accounts = {one["metadata"]["name"] for one in found if one["kind"] == "ServiceAccount"}
    generators = [name for one in found for name in one.get("configMapGenerator", [])]
    parts = [part for one in found for part in inner(one) if isinstance(part, dict)]
    keys = [part["secretKeyRef"] for part in parts if "secretKeyRef" in part]
    assert len(keys) >= 3
    assert all(one["key"] in secrets[one["name"]] for one in keys)
    assert {part["secretRef"]["name"] for part in parts if "secretRef" in part} <= set(secrets)
    token = one("RayCluster")["spec"]["authOptions"]
    assert token["mode"] == "token"
    assert "auth_token" in secrets[token["secretName"]]
    named = {part["serviceAccountName"] for part in parts if "serviceAccountName" in part}
    assert named <= accounts
    volumes = {part["configMap"]["name"] for part in parts if "configMap" in part}
    assert volumes == {"csc-config"} <= {one["name"] for one in generators}


def test_no_file_holds_a_secret() -> None:
    template = documents(INFRA / "kuberay/secrets.example.yaml")
    assert {value for one in template for value in one["stringData"].values()} == {""}
    example = (INFRA / "compose/.env.example").read_text()
    assert re.findall(r"^\w*(?:KEY|PASSWORD|TOKEN)=(.*)$", example, re.MULTILINE) == [""] * 4
    secret = re.compile(r"KEY|SECRET|PASSWORD|TOKEN$")
    for part in (part for found in manifests() for part in inner(found)):
        if isinstance(part, dict) and secret.search(str(part.get("name"))):
            assert "value" not in part, part
    for path in (path for path in INFRA.rglob("*") if path.is_file()):
        assert not re.search(r"AKIA[0-9A-Z]{16}|://[^/\s:@]+:[^/\s@$]+@", path.read_text()), path


# Nodes, as Ray reads them


def test_the_configuration_asks_for_what_the_groups_have() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import (
        _derive_autoscaling_config_from_ray_cr,
    )

    cluster, config = one("RayCluster"), load_config(str(CONFIG))
    cluster["metadata"]["namespace"] = "csc"
    for group in cluster["spec"]["workerGroupSpecs"]:
        group["replicas"] = 0  # as the operator fills it in
    nodes = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert nodes["headgroup"]["resources"]["CPU"] == 0
    check_nodes(nodes, config)
    gpu = cluster["spec"]["workerGroupSpecs"][1]["template"]["spec"]["containers"][0]
    assert config.ray.cache_folder in {mount["mountPath"] for mount in gpu["volumeMounts"]}


def check_nodes(nodes: dict[str, Any], config: Config) -> None:
    """Assert that data nodes bear a task, and GPU nodes as many workers as there are."""
    data, gpu = nodes["data"]["resources"], nodes["gpu"]["resources"]
    assert config.ray.address == "auto"
    assert config.ray.workers.gpus == 1 == gpu["GPU"]
    assert config.ray.tasks.resources.keys() == {"data"} <= data.keys() - gpu.keys()
    assert config.ray.workers.resources.keys() == {"gpu_node"} <= gpu.keys() - data.keys()
    assert nodes["gpu"]["max_workers"] >= config.train.workers
    assert nodes["data"]["min_workers"] == nodes["gpu"]["min_workers"] == 0


def test_the_cluster_launcher_takes_its_file_and_installs_nothing() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(documents(INFRA / "aws/cluster.yaml")[0])
    validate_config(prepared)
    nodes = prepared["available_node_types"]
    assert nodes["head"]["resources"]["CPU"] == 0
    check_nodes(nodes, load_config(str(CONFIG)))
    assert nodes["data"]["node_config"]["InstanceMarketOptions"] == {"MarketType": "spot"}
    commands = [text for key, text in prepared.items() if key.endswith("setup_commands")]
    assert commands == [[], [], []]
    assert "RAY_AUTH_MODE=token" in " ".join(prepared["docker"]["run_options"])


def test_roles_of_eks_and_ec2_reach_the_same_bucket() -> None:
    (eks,) = documents(INFRA / "aws/eks.yaml")
    policies = [one["attachPolicy"] for one in eks["iam"]["serviceAccounts"]]
    assert policies == [json.loads((INFRA / "aws/bucket.json").read_text())] * 2
    roles = {f"arn:aws:iam::000000000000:role/{one['roleName']}": one["metadata"]["name"]
             for one in eks["iam"]["serviceAccounts"]}  # fmt: skip
    annotated = {
        one["metadata"]["annotations"]["eks.amazonaws.com/role-arn"]: one["metadata"]["name"]
        for one in manifests()
        if one["kind"] == "ServiceAccount" and "annotations" in one["metadata"]
    }
    assert annotated == roles


# Images


def test_images_hold_versions_that_the_project_allows() -> None:
    lines = (INFRA / "image/constraints.txt").read_text().splitlines()
    pins = dict(line.split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extra = (INFRA / "image/mlflow.txt").read_text().splitlines()
    wanted = project["dependencies"] + [line for line in extra if not line.startswith("#")]
    for requirement in map(Requirement, wanted):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)])
    assert one("RayCluster")["spec"]["rayVersion"] == pins["ray"]
    assert "boto3" in pins


def test_the_dockerfile_is_clean_and_its_context_holds_what_it_reads() -> None:
    dockerfile = INFRA / "image/Dockerfile"
    text = dockerfile.read_text()
    read = re.findall(r"^COPY (\S+)|source=([^,\s]+)", text, re.MULTILINE)
    paths = {copied or bound for copied, bound in read}
    packages = {"csc_model", "jobs", "pipeline", "README.md", "LICENSE"}
    allowed = re.findall(r"^!(\S+)", (INFRA / "image/Dockerfile.dockerignore").read_text(), re.M)
    assert all((ROOT / path).exists() for path in [*paths, *allowed])
    assert packages <= set(allowed)
    assert all(any(f"{path}/".startswith(f"{name}/") for name in allowed) for path in paths)
    assert set(re.findall(r"^USER (\S+)", text, re.MULTILINE)) == {"1000"}
    run(installed("hadolint"), dockerfile)


def test_every_image_has_a_tag() -> None:
    parts = [part for one in [*manifests(), *documents(COMPOSE)] for part in inner(one)]
    images = {part["image"] for part in parts if isinstance(part, dict) and "image" in part}
    (cluster,) = documents(INFRA / "kuberay/cluster/kustomization.yaml")
    (mlflow,) = documents(INFRA / "mlflow/kustomization.yaml")
    ours = {image["name"] for image in cluster["images"] + mlflow["images"]}
    assert ours == {"csc-cpu", "csc-cuda", "csc-mlflow"} <= images
    assert all(re.search(r":[^:/]*\d", image) for image in images - ours)
