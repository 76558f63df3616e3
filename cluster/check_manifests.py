"""The rules of `check.py` for Kubernetes manifests."""

from __future__ import annotations

import copy
import functools
import gzip
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import yaml
from check_fields import LOOPBACK, Document, image_problem, label_problems, ray_version, size

SAVE_SECONDS = 15
"""What a pod needs after its node is drained, to end by itself."""
SPOT_LABELS = {
    "cloud.google.com/gke-spot",
    "cloud.google.com/gke-preemptible",
    "eks.amazonaws.com/capacityType",
    "karpenter.sh/capacity-type",
    "kubernetes.azure.com/scalesetpriority",
}
_SECRET = re.compile(r"TOKEN|SECRET|PASSWORD|_KEY$|API_KEY")


def manifest_problems(manifest: Document, definitions: Path | None) -> list[str]:
    """Return what KubeRay's definition says, or else what our rules and Ray's autoscaler do."""
    kind = manifest.get("kind")
    if kind == "PersistentVolumeClaim":
        if "ReadWriteMany" in manifest["spec"]["accessModes"]:
            return []
        return ["spec.accessModes: the pods of all nodes write there: use [ReadWriteMany]"]
    if kind not in {"RayCluster", "RayJob"}:
        return [
            f"kind={kind}: not a file for `ray up` (it has a provider), and none of RayCluster,"
            " RayJob, PersistentVolumeClaim"
        ]
    refused = list(_refused_by_definition(manifest, definitions)) if definitions else []
    return refused or list(_manifest(manifest))


def closed(schema: Any) -> Any:
    """Return a definition's schema that refuses fields it does not name, as Kubernetes does."""
    if not isinstance(schema, dict):
        return schema
    kept = {key: closed(value) for key, value in schema.items() if key != "properties"}
    if "properties" in schema:
        kept["properties"] = {key: closed(value) for key, value in schema["properties"].items()}
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept.setdefault("additionalProperties", False)
    return kept


@functools.cache
def _served(file: Path) -> dict[str, Any]:
    """Return the closed schema of each version that a definition serves."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # the definitions are large
    versions = yaml.load(gzip.decompress(file.read_bytes()), loader)["spec"]["versions"]
    return {
        one["name"]: closed(one["schema"]["openAPIV3Schema"]) for one in versions if one["served"]
    }


def _refused_by_definition(manifest: Document, folder: Path) -> Iterator[str]:
    """Yield what KubeRay's definition of the kind says."""
    import jsonschema

    kind, version = manifest["kind"], manifest["apiVersion"].rpartition("/")[2]
    file = folder / f"ray.io_{kind.lower()}s.yaml.gz"
    if not file.exists():
        yield f"{file}: no such definition: --definitions names the folder that has it"
        return
    served = _served(file)
    if version not in served:
        yield f"apiVersion={manifest['apiVersion']}: KubeRay serves ray.io/{' and '.join(served)}"
        return
    for error in jsonschema.Draft202012Validator(served[version]).iter_errors(manifest):
        yield f"{'.'.join(map(str, error.absolute_path))}: {error.message}: see `kubectl explain {kind}`"


def _manifest(manifest: Document) -> Iterator[str]:
    job = manifest["kind"] == "RayJob"
    field = "spec.rayClusterSpec" if job else "spec"
    spec = manifest["spec"]["rayClusterSpec"] if job else manifest["spec"]
    yield from _cluster(field, spec)
    yield from _head(f"{field}.headGroupSpec", spec["headGroupSpec"], job)
    for group in spec["workerGroupSpecs"]:
        yield from _group(f"{field}.workerGroupSpecs.{group['groupName']}", group)
    if job:
        yield from _job(manifest["spec"])
    yield from _refused_by_autoscaler(manifest["metadata"]["name"], spec)


def _cluster(field: str, spec: Document) -> Iterator[str]:
    if spec.get("rayVersion") != ray_version():
        yield f"{field}.rayVersion={spec.get('rayVersion')}: constraints.txt has {ray_version()}"
    auth = spec.get("authOptions", {})
    if auth.get("mode") != "token" or not auth.get("secretName"):
        yield f"{field}.authOptions={auth}: set mode: token, and secretName to the Secret that has it"
    if not spec.get("enableInTreeAutoscaling") or (
        spec.get("autoscalerOptions", {}).get("version") != "v2"
    ):
        yield f"{field}.autoscalerOptions: set enableInTreeAutoscaling: true and version: v2"
    groups = [("head", spec["headGroupSpec"])]
    groups += [(group["groupName"], group) for group in spec["workerGroupSpecs"]]
    for name, group in groups:
        yield from _pod(f"{field}.{name}", group)
    claims = [dict(_claims(group["template"]["spec"])) for _, group in groups]
    if not claims[0] or any(one != claims[0] for one in claims):
        yield (
            f"{field}: the pods do not share a file system for storage=: mount the same"
            " persistentVolumeClaim at the same path in the head and in every group"
        )


def _claims(pod: Document) -> Iterator[tuple[str, str]]:
    """Yield path and claim of each volume of the first container that is a claim."""
    names = {
        volume["name"]: volume["persistentVolumeClaim"]["claimName"]
        for volume in pod.get("volumes", [])
        if "persistentVolumeClaim" in volume
    }
    for mount in pod["containers"][0].get("volumeMounts", []):
        if mount["name"] in names:
            yield mount["mountPath"], names[mount["name"]]


def _pod(field: str, group: Document) -> Iterator[str]:
    """Yield what is wrong with one kind of pod, head or worker."""
    pod = group["template"]["spec"]
    container = pod["containers"][0]
    gpu = any(key.endswith("/gpu") for key in container["resources"].get("limits", {}))
    yield from image_problem(f"{field}.image", container.get("image"), gpu)
    yield from label_problems(f"{field}.labels", group.get("labels", {}))
    for one in container.get("env", []):
        if _SECRET.search(one["name"]) and "value" in one:
            yield f"{field}.env.{one['name']}: a secret in the file: put it into a Secret"
    shm = {
        volume["name"]: volume["emptyDir"].get("sizeLimit")
        for volume in pod.get("volumes", [])
        if volume.get("emptyDir", {}).get("medium") == "Memory"
    }
    limits = [
        shm[mount["name"]]
        for mount in container.get("volumeMounts", [])
        if mount["mountPath"] == "/dev/shm" and shm.get(mount["name"])
    ]
    store = group.get("rayStartParams", {}).get("object-store-memory")
    if not limits or not store or size(store) > size(limits[0]):
        yield (
            f"{field}: object-store-memory={store} has to fit into the sizeLimit of a Memory emptyDir"
            f" at /dev/shm ({limits[0] if limits else 'none'})"
        )
    memory = container["resources"].get("limits", {}).get("memory")
    if limits and memory and size(limits[0]) >= size(memory):
        yield f"{field}: the sizeLimit={limits[0]} of /dev/shm counts as memory, of which limits has {memory}"


def _spot_terms(pod: Document, operator: str) -> Iterator[list[str]]:
    """Yield the spot labels that each node selector term names with an operator."""
    affinity = pod.get("affinity", {}).get("nodeAffinity", {})
    required = affinity.get("requiredDuringSchedulingIgnoredDuringExecution", {})
    for term in required.get("nodeSelectorTerms", []):
        yield [
            one["key"]
            for one in term.get("matchExpressions", [])
            if one["key"] in SPOT_LABELS and one["operator"] == operator
        ]


def _head(field: str, head: Document, job: bool) -> Iterator[str]:
    pod = head["template"]["spec"]
    asked = [key for term in _spot_terms(pod, "In") for key in term]
    asked += [key for key in pod.get("nodeSelector", {}) if key in SPOT_LABELS]
    asked += [one["key"] for one in pod.get("tolerations", []) if one.get("key") in SPOT_LABELS]
    kept_off = [bool(term) for term in _spot_terms(pod, "NotIn")]
    if asked or not kept_off or not all(kept_off):
        yield (
            f"{field}.template: the head can come to a spot node{f' ({asked[0]})' if asked else ''},"
            " and a run does not outlive its head: keep it off with a node affinity NotIn"
        )
    start = head.get("rayStartParams", {})
    if start.get("num-cpus") != "0":
        yield f'{field}.rayStartParams.num-cpus={start.get("num-cpus")}: work would run on the head: set "0"'
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield f"{field}: the jobs API is open to the outside: serviceType ClusterIP, and no ingress"
    host = start.get("dashboard-host", "0.0.0.0")  # KubeRay's own default
    if not job and host not in LOOPBACK:
        yield (
            f"{field}.rayStartParams.dashboard-host={host}: every pod reaches the jobs API: use"
            " 127.0.0.1 and `kubectl port-forward`"
        )
    if job and host in LOOPBACK:
        yield f"{field}.rayStartParams.dashboard-host={host}: the operator asks for the job there: 0.0.0.0"


def _group(field: str, group: Document) -> Iterator[str]:
    if not group["minReplicas"] <= group["maxReplicas"]:
        yield f"{field}.maxReplicas={group['maxReplicas']}: less than minReplicas={group['minReplicas']}"
    pod = group["template"]["spec"]
    env = {one["name"]: one.get("value") for one in pod["containers"][0].get("env", [])}
    drain = float(env.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if grace < drain + SAVE_SECONDS:
        yield (
            f"{field}.terminationGracePeriodSeconds={grace}: the pod is killed while its node drains"
            f" ({drain:g} s) and saves: use {drain + SAVE_SECONDS:g} or more"
        )


def _job(spec: Document) -> Iterator[str]:
    if not spec.get("backoffLimit"):
        yield "spec.backoffLimit: a lost head would end the run: set how often it may be tried again"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes: the cluster would stay and cost: set true"
    storage = re.findall(r"\bstorage=(\S+)", spec["entrypoint"])
    shared = [
        path for path, _ in _claims(spec["rayClusterSpec"]["headGroupSpec"]["template"]["spec"])
    ]
    if not storage or not any(PurePosixPath(storage[-1]).is_relative_to(path) for path in shared):
        yield (
            f"spec.entrypoint: storage={''.join(storage[-1:])} is not on the shared file system, so the"
            f" next try would not find the run: use a folder of {' or '.join(shared) or 'a claim'}"
        )


def _refused_by_autoscaler(name: str, spec: Document) -> Iterator[str]:
    """Yield what Ray says when it reads the groups as KubeRay's autoscaler does."""
    from ray.autoscaler._private.kuberay import autoscaling_config as reader

    manifest = {"metadata": {"name": name, "namespace": "default"}, "spec": copy.deepcopy(spec)}
    try:
        reader._derive_autoscaling_config_from_ray_cr(manifest)
    except Exception as error:  # it asserts, and raises ValueError and KeyError
        yield f"Ray's autoscaler refuses the groups ({type(error).__name__}: {error}): correct them"
