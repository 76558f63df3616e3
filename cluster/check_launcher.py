"""The rules of `check.py` for the files of `ray up`."""

from __future__ import annotations

import contextlib
import copy
import io
import logging
import re
from collections.abc import Iterator

from check_fields import LOOPBACK, ROOT, Document, image_problem, label_problems, size

IDLE_MINUTES = 10
"""Below it a node can be called idle while it still installs."""


def launcher_problems(cluster: Document) -> list[str]:
    """Return what Ray's own schema and checks say, or else what our rules do."""
    import jsonschema
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray.autoscaler").setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            prepared = prepare_config(copy.deepcopy(cluster))
        validate_config(prepared)
    except jsonschema.ValidationError as error:
        field = ".".join(map(str, error.absolute_path)) or "the file"
        return [f"{field}: {error.message}: see Ray's cluster YAML options"]
    except Exception as error:  # Ray asserts, raises KeyError, ValueError and RuntimeError
        said = f"{type(error).__name__}: {error}"
        return [f"Ray refuses the file ({said}): see its cluster YAML options"]
    return list(_rules(prepared))  # with Ray's defaults, which would open the dashboard


def _is_spot(node_config: Document) -> bool:
    """Say whether a cloud may take the machine back: EC2, Compute Engine, or Azure."""
    scheduling = node_config.get("scheduling") or {}
    parts = (
        scheduling if isinstance(scheduling, list) else [scheduling]
    )  # Ray's examples have lists
    return (
        (node_config.get("InstanceMarketOptions") or {}).get("MarketType") == "spot"
        or any(one.get("preemptible") or one.get("provisioningModel") == "SPOT" for one in parts)
        or (node_config.get("azure_arm_parameters") or {}).get("priority") == "Spot"
    )


def _rules(cluster: Document) -> Iterator[str]:
    kinds, head = cluster["available_node_types"], cluster["head_node_type"]
    if _is_spot(kinds[head]["node_config"]):
        yield (
            f"available_node_types.{head}.node_config: the head is a spot machine, and a run does not"
            " outlive its head: take the spot setting out"
        )
    if kinds[head]["resources"].get("CPU") != 0 or kinds[head]["resources"].get("GPU"):
        yield (
            f"available_node_types.{head}.resources={kinds[head]['resources']}: work would run on the"
            " head: set {CPU: 0}"
        )
    if cluster["idle_timeout_minutes"] < IDLE_MINUTES:
        yield (
            f"idle_timeout_minutes={cluster['idle_timeout_minutes']}: a node would end while it still"
            f" installs: use {IDLE_MINUTES} or more"
        )
    for name, kind in kinds.items():
        yield from _node_type(cluster, name, kind, name == head)
    yield from _commands(cluster, any(_is_spot(kind["node_config"]) for kind in kinds.values()))
    yield from _files(cluster)


def _node_type(cluster: Document, name: str, kind: Document, is_head: bool) -> Iterator[str]:
    field = f"available_node_types.{name}"
    yield from label_problems(f"{field}.labels", kind.get("labels", {}))
    low, high = kind["min_workers"], kind["max_workers"]
    if not is_head and not low <= high <= cluster["max_workers"]:
        yield (
            f"{field}.max_workers={high}: it has to be from min_workers={low} to the max_workers="
            f"{cluster['max_workers']} of the file"
        )
    docker = {**cluster.get("docker", {}), **kind.get("docker", {})}
    role = "head" if is_head else "worker"
    image = docker.get(f"{role}_image") or docker.get("image")
    yield from image_problem(f"the image of {field}", image, bool(kind["resources"].get("GPU")))
    options = " ".join(docker.get("run_options", []) + docker.get(f"{role}_run_options", []))
    shared = re.findall(r"--shm-size[= ](\S+)", options)
    if not shared:
        yield f"docker.{role}_run_options: {name} has no --shm-size, which holds the object store: set it"
    store = re.search(r"--object-store-memory[= ](\d+)", _starts(cluster, role))
    if shared and store and int(store[1]) > size(shared[-1]):
        yield (
            f"--object-store-memory={store[1]}: more than the --shm-size={shared[-1]} of {name}:"
            " raise the one or lower the other"
        )


def _starts(cluster: Document, role: str) -> str:
    return "\n".join(cluster[f"{role}_start_ray_commands"])


def _commands(cluster: Document, spot: bool) -> Iterator[str]:
    """Yield what is wrong with how Ray is started, and with what is started beside it."""
    for role in ("head", "worker"):
        field = f"{role}_start_ray_commands"
        starts = [line for line in cluster[field] if re.search(r"\bray start\b", line)]
        for line in starts:
            if "RAY_AUTH_MODE=token" not in line:
                yield f"{field}: `ray start` without RAY_AUTH_MODE=token lets everybody in: put it before"
            if "--object-store-memory" not in line:
                yield f"{field}: `ray start` without --object-store-memory: give it what /dev/shm holds"
        if not starts:
            yield f"{field}: no `ray start`: take the one of the shipped file"
    for host in re.findall(r"--dashboard-host[= ](\S+)", _starts(cluster, "head")):
        if host not in LOOPBACK:
            yield (
                f"head_start_ray_commands: --dashboard-host={host} opens the jobs API to the network:"
                " use 127.0.0.1 and reach it with `ray dashboard`"
            )
    cloud = cluster["provider"]["type"]
    poller = [line for line in cluster["worker_start_ray_commands"] if "spot_drain.py" in line]
    if spot and not any(re.search(rf"spot_drain\.py {cloud}\b", line) for line in poller):
        yield (
            "worker_start_ray_commands: a spot node that is taken back takes its run's last steps"
            f" along: start `spot_drain.py {cloud}` beside Ray"
        )
    if any("RAY_AUTH_MODE=token" not in line for line in poller):
        yield "worker_start_ray_commands: spot_drain.py needs RAY_AUTH_MODE=token before it, to be let in"


def _files(cluster: Document) -> Iterator[str]:
    """Yield what is wrong with what nodes get: the token, the pinned packages, the shared storage."""
    mounts = cluster["file_mounts"]
    if not any(target.endswith(".ray/auth_token") for target in mounts):
        yield "file_mounts: no .ray/auth_token, so no node has the token: mount ~/.ray/auth_token there"
    for target, source in mounts.items():
        if not str(source).startswith(("~", "/")) and not (ROOT / source).exists():
            yield f"file_mounts.{target}={source}: no such file in the project: correct the path"
    commands = cluster["setup_commands"]
    scripts = re.findall(r"(/\S+)/cluster/install\.sh", "\n".join(commands))
    if not scripts or not {f"{scripts[0]}/{one}" for one in (
        "cluster", "constraints.txt", "pyproject.toml"
    )} <= set(mounts):  # fmt: skip
        yield (
            "setup_commands: nodes do not get the pinned packages: run cluster/install.sh, and mount"
            " cluster, constraints.txt and pyproject.toml beside each other"
        )
    mounted = re.findall(
        r"mount -t \S+[^;&|]*?\s(/[^\s;&|]+)\s*(?=[;&|}]|$)",
        "\n".join(cluster["initialization_commands"]),
        re.MULTILINE,
    )
    options = " ".join(cluster.get("docker", {}).get("run_options", []))
    if not any(f"-v {path}:{path}" in options for path in mounted):
        yield (
            "initialization_commands: nodes do not share a file system for storage=: mount one, and"
            " give it to the container with docker.run_options `-v PATH:PATH`"
        )
