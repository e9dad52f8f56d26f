"""As much of Kubernetes' API as kubectl needs: a few kinds of objects in one namespace."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.manifests import problems

KINDS = {
    ("v1", "configmaps"): "ConfigMap",
    ("batch/v1", "cronjobs"): "CronJob",
    ("ray.io/v1", "raycronjobs"): "RayCronJob",
}
VERBS = ["create", "delete", "get", "list", "patch"]


def merged(value: Any, patch: Any) -> Any:
    """Apply a JSON merge patch (RFC 7386)."""
    if not isinstance(patch, dict):
        return patch
    result = dict(value) if isinstance(value, dict) else {}
    for key, inner in patch.items():
        if inner is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), inner)
    return result


def chosen(labels: dict[str, str], selector: str) -> bool:
    """Say whether labels answer to `key=value,key`."""
    for part in filter(None, selector.split(",")):
        key, equals, value = part.partition("=")
        if key not in labels or (equals and labels[key] != value):
            return False
    return True


class Kubernetes(ThreadingHTTPServer):
    """Keeps objects by resource and name, and refuses those that its schemas refuse."""

    def __init__(self, *, kuberay: bool) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        kinds = KINDS.items()
        self.kinds = {key: kind for key, kind in kinds if kuberay or key[0] != "ray.io/v1"}
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}

    def kubeconfig(self, path: Path) -> Path:
        """Write a file that leads kubectl here."""
        cluster = {"name": "c", "cluster": {"server": f"http://127.0.0.1:{self.server_port}"}}
        context = {"name": "c", "context": {"cluster": "c", "user": "u", "namespace": "csc"}}
        about = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [cluster],
            "users": [{"name": "u", "user": {}}],
            "contexts": [context],
            "current-context": "c",
        }
        path.write_text(json.dumps(about))
        return path

    def answer(self, method: str, path: str, query: str, body: Any) -> tuple[int, Any]:
        """Return status and answer."""
        words = path.strip("/").split("/")
        if "namespaces" not in words:
            return 200, self._discovery(path.strip("/"))
        place = words.index("namespaces")
        if len(words) == place + 2:
            namespace = {"apiVersion": "v1", "kind": "Namespace"}
            return 200, namespace | {"metadata": {"name": words[-1]}}
        version = "/".join(words[1:place])
        return self._object(method, version, words[place + 2 :], query, body)

    def _discovery(self, path: str) -> Any:
        groups = sorted({version for version, _ in self.kinds if "/" in version})
        if path == "version":
            return {"major": "1", "minor": "32", "gitVersion": "v1.32.0"}
        if path == "api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "apis":
            versions = [{"groupVersion": group, "version": "v1"} for group in groups]
            named = [{"name": v["groupVersion"].split("/")[0], "versions": [v]} for v in versions]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": named}
        if path == "openapi/v3":
            places = {"api/v1": "v1"} | {f"apis/{group}": group for group in groups}
            return {"paths": {p: {"serverRelativeURL": f"/openapi/v3/{p}"} for p in places}}
        version = path.removeprefix("openapi/v3/").partition("/")[2]
        if path.startswith("openapi/"):
            return self._openapi(version)
        resources = [
            {
                "name": name,
                "singularName": kind.lower(),
                "namespaced": True,
                "kind": kind,
                "verbs": VERBS,
            }
            for (group, name), kind in self.kinds.items()
            if group == version
        ]
        return {"kind": "APIResourceList", "groupVersion": version, "resources": resources}

    def _openapi(self, version: str) -> Any:
        """Say of each kind that this server checks fields itself."""
        group, _, number = version.rpartition("/")
        paths = {
            f"/x/{name}": {
                "patch": {
                    "parameters": [{"name": "fieldValidation", "in": "query"}],
                    "x-kubernetes-group-version-kind": {
                        "group": group,
                        "version": number,
                        "kind": kind,
                    },
                    "responses": {},
                }
            }
            for (of, name), kind in self.kinds.items()
            if of == version
        }
        return {"openapi": "3.0.0", "info": {"title": "x", "version": "1"}, "paths": paths}

    def _object(
        self, method: str, version: str, words: list[str], query: str, body: Any
    ) -> tuple[int, Any]:
        resource, name = words[0], (words[1:] or [""])[0]
        if method == "POST":
            return self._keep(resource, body)
        if not name:
            selector = parse_qs(query).get("labelSelector", [""])[0]
            items = [
                one
                for (of, _), one in sorted(self.objects.items())
                if of == resource and chosen(one["metadata"]["labels"], selector)
            ]
            kind = f"{self.kinds[version, resource]}List"
            return 200, {"apiVersion": version, "kind": kind, "metadata": {}, "items": items}
        there = self.objects.get((resource, name))
        if there is None:
            gone = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 404}
            return 404, gone | {"reason": "NotFound", "message": f"{name} not found"}
        if method == "PATCH":
            return self._keep(resource, merged(there, body))
        if method == "DELETE":
            del self.objects[resource, name]
            return 200, {"kind": "Status", "apiVersion": "v1", "status": "Success"}
        return 200, there

    def _keep(self, resource: str, body: Any) -> tuple[int, Any]:
        wrong = problems({key: value for key, value in body.items() if key != "status"})
        if wrong:
            status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 422}
            return 422, status | {"reason": "Invalid", "message": wrong[0]}
        self.objects[resource, body["metadata"]["name"]] = body
        return 200, body


class _Request(BaseHTTPRequestHandler):
    server: Kubernetes

    def _answer(self) -> None:
        text = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = urlsplit(self.path)
        body = json.loads(text) if text else None
        status, answer = self.server.answer(self.command, parts.path, parts.query, body)
        data = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    do_GET = do_POST = do_PATCH = do_DELETE = _answer  # noqa: N815

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def kubernetes(*, kuberay: bool = True) -> Iterator[Kubernetes]:
    """Have such a server on loopback for a while."""
    server = Kubernetes(kuberay=kuberay)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
