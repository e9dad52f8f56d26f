"""What is wrong with a Kubernetes manifest: by Kubernetes' own schemas, unknown keys refused.

Custom resources are held to small schemas of the fields that are used here, the pod templates in
them to Kubernetes' own. Where CSC_KUBERAY_CRDS names a folder with the definitions of KubeRay
(`ray.io_*.yaml`), its objects are held to those as well.
"""

import functools
import json
import os
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import yaml
from referencing import Registry, Resource

Schema = dict[str, Any]

KUBERNETES = "v1.37.0"  # the newest of kubernetes-validate: fields used are far older
_PLACE = "https://kubernetes.io/api/_definitions.json"
STRING: Schema = {"type": "string", "minLength": 1}
BOOLEAN: Schema = {"type": "boolean"}
COUNT: Schema = {"type": "integer", "minimum": 0}
STRINGS: Schema = {"type": "object", "additionalProperties": {"type": "string"}}


def _object(required: str = "", **properties: Schema) -> Schema:
    """Return the schema of an object that has these keys and no others."""
    return {
        "type": "object",
        "required": required.split(),
        "properties": properties,
        "additionalProperties": False,
    }


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items, "minItems": 1}


def _core(name: str) -> Schema:
    return {"$ref": f"{_PLACE}#/$defs/io.k8s.api.core.v1.{name}"}


def _meta(name: str) -> Schema:
    return {"$ref": f"{_PLACE}#/$defs/io.k8s.apimachinery.pkg.apis.meta.v1.{name}"}


def _custom(spec: Schema, version: str) -> Schema:
    """Return the schema of a whole object, given that of its spec."""
    return _object(
        "apiVersion kind metadata spec",
        apiVersion={"const": version},
        kind=STRING,
        metadata=_meta("ObjectMeta"),
        spec=spec,
    )


# What KubeRay 1.7 takes, as far as it is used here.
_POD = _core("PodTemplateSpec")
_CREDENTIAL = _object(value=STRING, valueFrom=_core("EnvVarSource"))
_HEAD = _object(
    "rayStartParams template",
    rayStartParams=STRINGS,
    template=_POD,
    serviceType=STRING,
    labels=STRINGS,
)
_WORKERS = _object(
    "groupName minReplicas maxReplicas rayStartParams template",
    groupName=STRING,
    replicas=COUNT,
    minReplicas=COUNT,
    maxReplicas=COUNT,
    numOfHosts=COUNT,
    idleTimeoutSeconds=COUNT,
    rayStartParams=STRINGS,
    labels=STRINGS,
    template=_POD,
)
_AUTOSCALER = _object(
    version={"enum": ["v1", "v2"]},
    upscalingMode={"enum": ["Default", "Aggressive", "Conservative"]},
    idleTimeoutSeconds=COUNT,
    imagePullPolicy={"enum": ["Always", "IfNotPresent", "Never"]},
    resources=_core("ResourceRequirements"),
    securityContext=_core("SecurityContext"),
    env=_list(_core("EnvVar")),
)
_CLUSTER = _object(
    "headGroupSpec",
    rayVersion=STRING,
    suspend=BOOLEAN,
    enableInTreeAutoscaling=BOOLEAN,
    autoscalerOptions=_AUTOSCALER,
    authOptions=_object(mode={"enum": ["disabled", "token"]}, secretName=STRING),
    gcsFaultToleranceOptions=_object(
        "redisAddress",
        redisAddress=STRING,
        redisUsername=_CREDENTIAL,
        redisPassword=_CREDENTIAL,
        externalStorageNamespace=STRING,
    ),
    headGroupSpec=_HEAD,
    workerGroupSpecs=_list(_WORKERS),
)
_JOB = _object(
    "entrypoint",
    entrypoint=STRING,
    runtimeEnvYAML=STRING,
    jobId=STRING,
    metadata=STRINGS,
    rayClusterSpec=_CLUSTER,
    clusterSelector=STRINGS,
    submissionMode={"enum": ["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"]},
    submitterPodTemplate=_POD,
    submitterConfig=_object(backoffLimit=COUNT),
    entrypointNumCpus={"type": "number", "minimum": 0},
    entrypointNumGpus={"type": "number", "minimum": 0},
    backoffLimit=COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    shutdownAfterJobFinishes=BOOLEAN,
    ttlSecondsAfterFinished=COUNT,
    suspend=BOOLEAN,
)
_CRON = _object(
    "schedule jobTemplate", schedule=STRING, timeZone=STRING, jobTemplate=_JOB, suspend=BOOLEAN
)
_SELECTOR = _meta("LabelSelector")
_ENDPOINT = _object(
    "port", port=STRING, path=STRING, interval=STRING, relabelings={"type": "array"}
)
_RULE = _object(
    "alert expr labels annotations",
    alert=STRING,
    expr=STRING,
    labels=STRINGS,
    annotations=STRINGS,
    **{"for": STRING},
)
_RULES = _object("groups", groups=_list(_object("name rules", name=STRING, rules=_list(_RULE))))
_REQUIREMENT = _object(
    "key operator values",
    key=STRING,
    operator={"enum": ["In", "NotIn", "Exists", "Gt", "Lt"]},
    values=_list(STRING),
)
_NODES = _object(
    "nodeClassRef requirements",
    nodeClassRef=_object("group kind name", group=STRING, kind=STRING, name=STRING),
    requirements=_list(_REQUIREMENT),
    taints=_list(_core("Taint")),
    expireAfter=STRING,
)
_NODE_POOL = _object(
    "template",
    template=_object("spec", metadata=_object(labels=STRINGS), spec=_NODES),
    limits=STRINGS,
    disruption=_object(
        "consolidateAfter",
        consolidationPolicy={"enum": ["WhenEmpty", "WhenEmptyOrUnderutilized"]},
        consolidateAfter=STRING,
    ),
)
_FILES = {"type": "array", "items": STRING}
_SETTINGS = {"type": "object"}  # as kustomize checks them
_KUSTOMIZATION = _object(
    "apiVersion kind resources",
    apiVersion=STRING,
    kind=STRING,
    namespace=STRING,
    resources=_list(STRING),
    configMapGenerator=_list(_object("name files", name=STRING, files=_FILES, options=_SETTINGS)),
    generatorOptions=_object(disableNameSuffixHash=BOOLEAN),
    images=_list(_object("name newName newTag", name=STRING, newName=STRING, newTag=STRING)),
    patches=_list(_object("target patch", target=STRINGS, patch=STRING)),
    replacements=_list(_object("source targets", source=STRINGS, targets=_list(_SETTINGS))),
)
_SPECS = {
    ("karpenter.sh/v1", "NodePool"): _NODE_POOL,
    ("ray.io/v1", "RayCluster"): _CLUSTER,
    ("ray.io/v1", "RayJob"): _JOB,
    ("ray.io/v1", "RayCronJob"): _CRON,
    ("monitoring.coreos.com/v1", "PrometheusRule"): _RULES,
    ("monitoring.coreos.com/v1", "PodMonitor"): _object(
        "selector podMetricsEndpoints",
        selector=_SELECTOR,
        podMetricsEndpoints=_list(_ENDPOINT),
        podTargetLabels=_list(STRING),
    ),
}


@functools.cache
def _definitions() -> Schema:
    folder = files("kubernetes_validate") / "kubernetes-json-schema" / f"{KUBERNETES}-local-strict"
    definitions: Schema = json.loads((folder / "_definitions.json").read_text())
    return definitions


@functools.cache
def _places() -> dict[tuple[str, str], str]:
    """Return where the schema of a kind is, by (apiVersion, kind)."""
    places = {}
    for name, definition in _definitions()["$defs"].items():
        for kind in definition.get("x-kubernetes-group-version-kind", []):
            version = "/".join(part for part in (kind["group"], kind["version"]) if part)
            places[version, kind["kind"]] = name
    return places


def _full(definition: Any) -> Any:
    """Return a schema of a custom resource as JSON schema that refuses unknown keys."""
    if isinstance(definition, list):
        return [_full(item) for item in definition]
    if not isinstance(definition, dict):
        return definition
    schema = {key: _full(value) for key, value in definition.items()}
    if definition.get("x-kubernetes-int-or-string"):
        schema["type"] = ["integer", "string"]
    keeps_unknown = definition.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(definition.get("properties"), dict) and not keeps_unknown:
        schema.setdefault("additionalProperties", False)
    return schema


@functools.cache
def _kuberay(folder: str, kind: str) -> Schema:
    definition = yaml.load(
        (Path(folder) / f"ray.io_{kind.lower()}s.yaml").read_text(), yaml.CSafeLoader
    )
    versions = {version["name"]: version for version in definition["spec"]["versions"]}
    schema: Schema = _full(versions["v1"]["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def _schemas(version: str, kind: str) -> list[Schema]:
    if kind == "Kustomization":
        return [_KUSTOMIZATION]
    if (version, kind) in _SPECS:
        schemas = [_custom(_SPECS[version, kind], version)]
        folder = os.environ.get("CSC_KUBERAY_CRDS")
        if folder and version == "ray.io/v1":
            schemas.append(_kuberay(folder, kind))
        return schemas
    if (version, kind) in _places():
        return [{"$ref": f"{_PLACE}#/$defs/{_places()[version, kind]}"}]
    return []


def problems(manifest: dict[str, Any]) -> list[str]:
    """Return what is wrong with a manifest, each as `kind/name: place: reason`."""
    version, kind = str(manifest.get("apiVersion")), str(manifest.get("kind"))
    name = f"{kind}/{manifest.get('metadata', {}).get('name', '?')}"
    schemas = _schemas(version, kind)
    if not schemas:
        return [f"{name}: no schema for {version} {kind}"]
    registry: Registry[Any] = Resource.from_contents(_definitions()) @ Registry()
    found = []
    for schema in schemas:
        validator = jsonschema.Draft202012Validator(schema, registry=registry)
        for error in validator.iter_errors(manifest):
            place = ".".join(map(str, error.absolute_path)) or "."
            found.append(f"{name}: {place}: {error.message[:300]}")
    return found
