"""The cluster files that ship have no mistake, and each mistake that costs is caught in each of them."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from ray.runtime_env import RuntimeEnv

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "cluster"))
check = importlib.import_module("check")
fields = importlib.import_module("check_fields")

DEFINITIONS = ROOT.parent / "shared" / "data" / "kuberay"
CLOUDS = {"cluster.yaml": "aws", "cluster/gcp.yaml": "gcp", "cluster/azure.yaml": "azure"}
MANIFESTS = ["cluster/kuberay/raycluster.yaml", "cluster/kuberay/rayjob.yaml"]
FILES = [*CLOUDS, *MANIFESTS, "cluster/kuberay/storage.yaml"]

SPOT_HEAD = {
    "cluster.yaml": ("InstanceType: m5.2xlarge", "InstanceMarketOptions: {MarketType: spot}"),
    "cluster/gcp.yaml": ("machineType: n2-standard-8", "scheduling: [{preemptible: true}]"),
    "cluster/azure.yaml": ("vmSize: Standard_D8s_v5", "priority: Spot"),
}
IN_A_CLOUD_FILE = [
    # (what stands there, what a person writes by mistake, what the sentence says)
    ("max_workers: 8", "max_wrokers: 8", "max_wrokers"),
    ("GPU: 1", "GPU: 0.5", "0.5 is not of type 'integer'"),
    ("head_node_type: head", "head_node_type: haed", "head_node_type"),
    ("min_workers: 0", "min_workers: 99", "sum of `min_workers`"),
    ("max_workers: 8", "max_workers: 80", r"gpu_spot.max_workers=80.*12"),
    ("resources: {CPU: 0}", "resources: {CPU: 8}", "work would run on the head"),
    ("tagi-pool: data", "ray.io/pool: data", "Ray keeps this prefix"),
    ("image: rayproject/ray:2.60.0", "image: rayproject/ray:2.59.0", "2.60.0-py311-gpu"),
    ("py311-gpu", "py312-gpu", "2.60.0-py311-gpu"),
    ("image: rayproject/ray:2.60.0-py311-gpu", "image: rayproject/ray:latest", "2.60.0-py311-gpu"),
    ("2.60.0-py311-gpu", "2.60.0-py311-cpu", "needs an image with CUDA"),
    ("idle_timeout_minutes: ", "idle_timeout_minutes: 1 # ", "while it still installs"),
    ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "opens the jobs API"),
    ("RAY_AUTH_MODE=token ray start --head", "ray start --head", "lets everybody in"),
    ("RAY_AUTH_MODE=token ray start --address", "ray start --address", "lets everybody in"),
    ("/home/ray/.ray/auth_token: ~/.ray/auth_token", "", "no node has the token"),
    ("RAY_AUTH_MODE=token setsid", "setsid", "spot_drain.py needs RAY_AUTH_MODE"),
    ("spot_drain.py ", "spot_drian.py ", "takes its run's last steps"),
    ("spot_drain.py ", "spot_drain.py other-", "takes its run's last steps"),
    ("--shm-size=30g", "--memory=30g", "no --shm-size"),
    ("--object-store-memory=$((", "--object-store-memory=99000000000 $((", "--shm-size=5g of head"),
    ("--object-store-memory=$((", "--x=$((", "without --object-store-memory"),
    ("-v /mnt/shared:/mnt/shared", "-v /mnt/other:/mnt/other", "do not share a file system"),
    ("mount -t nfs", "echo mount", "do not share a file system"),
    ("bash /home/ray/tagi/cluster/install.sh", "pip install torch", "the pinned packages"),
    ("/home/ray/tagi/pyproject.toml: pyproject.toml", "", "the pinned packages"),
    (": constraints.txt\n", ": requirements.txt\n", "requirements.txt: no such file"),
    ("head_start_ray_commands:", "head_start_commands:", "head_start_commands"),
]
IN_A_MANIFEST = [
    ("rayVersion: 2.60.0", "rayVersion: 2.59.0", "constraints.txt has 2.60.0"),
    ("tagi:2.60.0-py311-cpu", "tagi:latest", "2.60.0-py311-cpu"),
    ("2.60.0-py311-gpu", "2.60.0-py311-cpu", "needs an image with CUDA"),
    ("mode: token", "mode: disabled", "set mode: token"),
    ("secretName: tagi-auth", "", "secretName"),
    ("version: v2", "version: v1", "version: v2"),
    ("serviceType: ClusterIP", "serviceType: LoadBalancer", "open to the outside"),
    ("serviceType: ClusterIP", "enableIngress: true", "open to the outside"),
    ('num-cpus: "0"', 'num-cpus: "4"', "work would run on the head"),
    ("operator: NotIn", "operator: In", "the head can come to a spot node"),
    (
        "{fsGroup: 100}",
        "{fsGroup: 100}\n@tolerations: [{key: cloud.google.com/gke-spot}]",
        "gke-spot",
    ),
    ("tagi-pool: data", "ray.io/pool: data", "Ray keeps this prefix"),
    ("maxReplicas: 4", "maxReplicas: -1", "less than minReplicas"),
    ("terminationGracePeriodSeconds: 120", "terminationGracePeriodSeconds: 60", "105 or more"),
    ('value: "90"', 'value: "120"', "135 or more"),
    ("sizeLimit: 9Gi", "sizeLimit: 7Gi", "has to fit"),
    ("sizeLimit: 25Gi", "sizeLimit: 60Gi", "counts as memory"),
    ("mountPath: /dev/shm", "mountPath: /dev/shn", "has to fit"),
    (
        "persistentVolumeClaim: {claimName: tagi-shared}",
        "emptyDir: {}",
        "do not share a file system",
    ),
    ("env: &drain", "env: &drain\n@  - {name: WANDB_API_KEY, value: abc}", "put it into a Secret"),
    ('cpu: "7"', 'cpu: "seven"', "Ray's autoscaler refuses"),
]
IN_A_JOB = [
    ("backoffLimit: 3", "backoffLimit: 0", "a lost head would end the run"),
    ("shutdownAfterJobFinishes: true", "shutdownAfterJobFinishes: false", "stay and cost"),
    ("storage=/mnt/shared/runs", "storage=/tmp/runs", "next try would not find the run"),
    ("storage=/mnt/shared/runs", "", "next try would not find the run"),
    ("dashboard-host: 0.0.0.0", "dashboard-host: 127.0.0.1", "the operator asks for the job"),
]
AGAINST_THE_DEFINITION = [
    ("maxReplicas: 8", "maxReplicaz: 8", "maxReplicaz"),
    ("tolerations:", "tolerationz:", "tolerationz"),
    ("mode: token", "mode: basic", "'basic' is not one of"),
    ("minReplicas: 0", "minReplicas: none", "'none' is not of type 'integer'"),
    ("upscalingMode: Default", "upscalingMode: Fast", "'Fast' is not one of"),
    ("ray.io/v1", "ray.io/v2", "KubeRay serves ray.io/v1"),
    ('num-cpus: "0"', "num-cpus: 0", "0 is not of type 'string'"),
]


def changed(tmp_path: Path, file: str, old: str, new: str) -> Path:
    """Write the file with a mistake; `@` in it stands for the indent of the line before."""
    text = (ROOT / file).read_text(encoding="utf-8")
    assert old in text
    line = text[: text.index(old)].rpartition("\n")[2]
    indent = re.match(r" *", line)[0]
    path = tmp_path / Path(file).name
    path.write_text(text.replace(old, new.replace("@", indent), 1), encoding="utf-8")
    return path


def definitions() -> Path:
    if not DEFINITIONS.is_dir():
        pytest.skip(f"KubeRay's definitions are not in {DEFINITIONS}")
    return DEFINITIONS


@pytest.mark.parametrize("file", FILES)
def test_the_files_that_ship_have_no_mistake(file):
    assert check.problems(ROOT / file) == []


@pytest.mark.parametrize("file", FILES)
def test_only_what_is_each_users_own_is_left_open(file):
    for line in check.placeholders(ROOT / file):
        assert re.search(
            r"ImageId|efs|project_id|FILESTORE|subscription_id|windows|image:|storageClass", line
        )


@pytest.mark.parametrize("file", MANIFESTS)
def test_the_manifests_follow_the_definitions_of_kuberay(file):
    assert check.problems(ROOT / file, definitions()) == []


@pytest.mark.parametrize("file", CLOUDS)
@pytest.mark.parametrize(("old", "new", "said"), IN_A_CLOUD_FILE)
def test_a_mistake_in_a_cloud_file_is_caught(tmp_path, file, old, new, said):
    found = check.problems(changed(tmp_path, file, old, new))
    assert re.search(said, "\n".join(found)), found


@pytest.mark.parametrize("file", CLOUDS)
def test_a_spot_head_is_caught(tmp_path, file):
    old, spot = SPOT_HEAD[file]
    found = check.problems(changed(tmp_path, file, old, f"{old}\n@{spot}"))
    assert any("the head is a spot machine" in one for one in found), found


def test_a_dashboard_left_to_rays_defaults_is_caught(tmp_path):
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8")
    path = tmp_path / "cluster.yaml"
    path.write_text(re.sub(r"head_start_ray_commands:\n(?:  .*\n)+", "", text), encoding="utf-8")
    assert any("--dashboard-host=0.0.0.0" in one for one in check.problems(path))


@pytest.mark.parametrize("file", MANIFESTS)
@pytest.mark.parametrize(("old", "new", "said"), IN_A_MANIFEST)
def test_a_mistake_in_a_manifest_is_caught(tmp_path, file, old, new, said):
    found = check.problems(changed(tmp_path, file, old, new))
    assert re.search(said, "\n".join(found)), found


@pytest.mark.parametrize(("old", "new", "said"), IN_A_JOB)
def test_a_mistake_in_a_job_is_caught(tmp_path, old, new, said):
    found = check.problems(changed(tmp_path, MANIFESTS[1], old, new))
    assert re.search(said, "\n".join(found)), found


@pytest.mark.parametrize("host", ["0.0.0.0", None])
def test_an_open_dashboard_of_a_cluster_that_stays_is_caught(tmp_path, host):
    new = f"dashboard-host: {host}" if host else ""
    found = check.problems(changed(tmp_path, MANIFESTS[0], "dashboard-host: 127.0.0.1", new))
    assert any("every pod reaches the jobs API" in one for one in found), found


@pytest.mark.parametrize("file", MANIFESTS)
@pytest.mark.parametrize(("old", "new", "said"), AGAINST_THE_DEFINITION)
def test_what_kuberay_does_not_know_is_caught(tmp_path, file, old, new, said):
    found = check.problems(changed(tmp_path, file, old, new), definitions())
    assert re.search(said, "\n".join(found)), found


def test_storage_of_one_node_is_caught(tmp_path):
    path = changed(tmp_path, FILES[-1], "ReadWriteMany", "ReadWriteOnce")
    assert "use [ReadWriteMany]" in check.problems(path)[0]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [", "YAML"),
        ("", "empty"),
        ("kind: Pod", "none of RayCluster"),
        ("- a", "another shape"),
    ],
)
def test_another_file_gets_a_sentence(tmp_path, text, said):
    path = tmp_path / "x.yaml"
    path.write_text(text, encoding="utf-8")
    assert said in check.problems(path)[0]
    assert "no such file" in check.problems(tmp_path / "y.yaml")[0].lower()


def test_the_command_says_what_is_open_and_ends_with_two(tmp_path, capsys):
    assert check.main([str(ROOT / "cluster.yaml")]) == 2
    assert "line 37: ImageId: ami-REPLACE_ME" in capsys.readouterr().out
    text = (ROOT / "cluster.yaml").read_text(encoding="utf-8").replace("REPLACE_ME", "0123456789")
    path = tmp_path / "cluster.yaml"
    path.write_text(text, encoding="utf-8")
    assert check.main([str(path)]) == 0
    assert capsys.readouterr().out == "No mistake found.\n"


def test_a_job_has_the_cluster_that_stays():
    stays, job = (yaml.safe_load((ROOT / file).read_text(encoding="utf-8")) for file in MANIFESTS)
    one, other = stays["spec"], job["spec"]["rayClusterSpec"]
    for spec in (one, other):
        del spec["headGroupSpec"]["rayStartParams"]["dashboard-host"]
    assert one == other


@pytest.mark.parametrize("file", MANIFESTS)
def test_rays_autoscaler_reads_the_groups_as_they_are_meant(file):
    from ray.autoscaler._private.kuberay import autoscaling_config as reader

    manifest = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))
    spec = manifest["spec"].get("rayClusterSpec", manifest["spec"])
    read = reader._derive_autoscaling_config_from_ray_cr(
        {"metadata": {"name": "tagi", "namespace": "default"}, "spec": spec}
    )
    kinds = read["available_node_types"]
    assert kinds[read["head_node_type"]]["resources"]["CPU"] == 0
    assert {name: kind["resources"].get("GPU", 0) for name, kind in kinds.items()} == {
        read["head_node_type"]: 0, "gpu-spot": 1, "gpu-on-demand": 1, "data-cpu": 0
    }  # fmt: skip
    assert {kind["labels"]["tagi-pool"] for kind in kinds.values()} == {"head", "train", "data"}
    assert read["idle_timeout_minutes"] == 15


@pytest.mark.parametrize("file", CLOUDS)
def test_a_cloud_file_has_each_kind_of_node(file):
    kinds = yaml.safe_load((ROOT / file).read_text(encoding="utf-8"))["available_node_types"]
    pools = {
        name: (kind["labels"]["tagi-pool"], kind["resources"].get("GPU", 0))
        for name, kind in kinds.items()
    }
    assert pools == {
        "head": ("head", 0), "gpu_spot": ("train", 1), "gpu_on_demand": ("train", 1), "data_cpu": ("data", 0)
    }  # fmt: skip
    assert kinds["gpu_spot"]["priority"] > kinds["gpu_on_demand"].get("priority", 0)
    assert kinds["gpu_spot"]["labels"]["tagi-market"] == "spot"


def test_the_images_are_built_from_the_pinned_ray_and_packages():
    text = (ROOT / "cluster" / "Dockerfile").read_text(encoding="utf-8")
    assert f"ARG RAY={fields.ray_version()}-py311\n" in text
    bases = re.findall(r"^FROM rayproject/ray:\$\{RAY\}-(\w+) AS (\w+)$", text, re.MULTILINE)
    assert bases == [("cpu", "cpu"), ("gpu", "cuda")]
    copied = [name for line in re.findall(r"^COPY (.*)$", text, re.MULTILINE)
              for name in line.split()[1:-1]]  # fmt: skip
    assert all((ROOT / name).exists() for name in copied)
    assert text.count("RUN bash cluster/install.sh") == 2


def test_nodes_install_torch_first_and_all_that_the_project_names(tmp_path):
    """With pip recorded in place of run, and no GPU."""
    for name in ("pyproject.toml", "constraints.txt", "cluster/install.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text((ROOT / name).read_text(encoding="utf-8"), encoding="utf-8")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(
        f'#!/bin/bash\n[ "$1" = -c ] && exec {sys.executable} "$@"\n'
        f'echo "$@" >> {tmp_path}/pip\nfor last; do :; done\n[ -f "$last" ] && cat "$last" >> {tmp_path}/pip\nexit 0\n'
    )
    python.chmod(0o755)
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    torch = re.search(r"^torch==.*$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[0]
    for build, index in (
        ("cpu", " --no-deps --index-url https://download.pytorch.org/whl/cpu"),
        ("cuda", ""),
        ("https://mirror/cu128", " --no-deps --index-url https://mirror/cu128"),
    ):
        (tmp_path / "pip").unlink(missing_ok=True)
        subprocess.run(
            ["bash", str(tmp_path / "cluster" / "install.sh"), build],
            check=True,
            env={"PATH": f"{python.parent}:/usr/bin:/bin"},
        )
        first, second, *names = (tmp_path / "pip").read_text().splitlines()
        assert first == f"-m pip install -q{index} {torch}"
        assert second.startswith("-m pip install -q -c constraints.txt -r ")
        assert names == wanted


def test_the_runtime_environment_pins_every_dependency_as_the_constraints_do():
    text = (ROOT / "cluster" / "runtime_env.yaml").read_text(encoding="utf-8")
    runtime = RuntimeEnv(**yaml.safe_load(text))
    pins = runtime.pip_config()["packages"]
    assert set(pins) <= set((ROOT / "constraints.txt").read_text().splitlines())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {name(pin) for pin in pins} == {name(one) for one in project["dependencies"]} - {"ray"}


def test_no_secret_and_no_environment_travels_in_the_runtime_environment():
    text = (ROOT / "cluster" / "runtime_env.yaml").read_text(encoding="utf-8")
    assert yaml.safe_load(text).keys() == {"pip", "config"}


def name(requirement: str) -> str:
    return re.split(r"[^\w.-]", requirement)[0].lower().replace("_", "-")
