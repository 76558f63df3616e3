"""`ray job submit` of every job to a cluster of its own that asks for a token."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from zipfile import ZipFile

import pytest
from ray._private.runtime_env.packaging import create_package

from tagi_ray.report import read_records
from tagi_ray.trials import read_trials

pytestmark = pytest.mark.ray
ROOT = Path(__file__).parents[2]
RAY = str(Path(sys.executable).parent / "ray")
AHEAD = ("finetune.steps=20000", "teachers.enabled=false", "evaluation.systems=[tagi]")
"""Settings with which the tiny recipe trains for longer than a test waits."""


@dataclass(frozen=True)
class Cluster:
    """A head node, the folder that is submitted to it, and how a client with the token sees it."""

    address: str
    session: Path
    tree: Path
    storage: Path
    env: dict[str, str]

    def submit(self, name: str, *command: str, wait: bool = True) -> subprocess.CompletedProcess:
        options = [f"--submission-id={name}", "--working-dir=.", *([] if wait else ["--no-wait"])]
        return self.ray("submit", *options, "--", "python", *command)

    def ray(self, verb: str, *arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            [RAY, "job", verb, *arguments],
            cwd=self.tree, env=self.env, capture_output=True, text=True, timeout=400,
        )  # fmt: skip

    def last_line(self, name: str) -> str:
        """The last line of `ray job logs`."""
        return self.ray("logs", name).stdout.rstrip().splitlines()[-1]

    def driver(self, *command: str, **env: str) -> subprocess.CompletedProcess:
        """Run a job from outside the cluster, as RAY_ADDRESS allows."""
        return subprocess.run(
            [sys.executable, *command], cwd=self.tree, capture_output=True, text=True, timeout=60,
            env={**self.env, "RAY_ADDRESS": self.address, "PYTHONPATH": str(self.tree), **env},
        )  # fmt: skip


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clean copy of the project, with the tiny recipe where an upload takes it along."""
    tree = tmp_path_factory.mktemp("tree")
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).exists():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, tree / name)
    shutil.copy(ROOT / "tests" / "recipes" / "tiny.yaml", tree / "small.yaml")
    (tree / "ranks.yaml").write_text(
        "search: grid\nscheduler: none\nseeds: [0]\nspace: {lora.rank: [2]}\n"
    )
    return tree


@pytest.fixture(scope="module")
def cluster(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    home = tmp_path_factory.mktemp("home")
    (home / "token").write_text(secrets.token_hex(32))
    env = {
        **os.environ,
        "HOME": str(home),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(home / "token"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    session = Path(tempfile.mkdtemp(prefix="tagi", dir="/tmp"))  # a socket's path has to be short
    port, dashboard, client = free_ports(3)
    command = [
        RAY, "start", "--head", "--block", "--node-ip-address=127.0.0.1", f"--port={port}",
        f"--temp-dir={session}",
        "--num-cpus=4", "--num-gpus=0", "--object-store-memory=300000000",
        "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}",
        f"--ray-client-server-port={client}", "--dashboard-agent-listen-port=0",
        "--dashboard-agent-grpc-port=0", "--metrics-export-port=0",
        "--min-worker-port=0", "--max-worker-port=0",
    ]  # fmt: skip
    url = f"http://127.0.0.1:{dashboard}"
    with (home / "head.log").open("w") as log:
        head = subprocess.Popen(
            command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        ready = [RAY, "job", "list", "--address", url]
        until(lambda: subprocess.run(ready, env=env, capture_output=True).returncode == 0)
        storage = tmp_path_factory.mktemp("storage")
        env["RAY_API_SERVER_ADDRESS"] = url
        yield Cluster(f"127.0.0.1:{port}", session, tree, storage, env)
    finally:
        os.killpg(head.pid, signal.SIGKILL)
        head.wait()
        shutil.rmtree(session, ignore_errors=True)


def free_ports(count: int) -> list[int]:
    held = [socket.socket() for _ in range(count)]
    for one in held:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in held]
    for one in held:
        one.close()
    return ports


def until(true: Callable[[], bool], seconds: float = 150) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_upload_is_small_and_holds_what_a_job_needs(tree: Path, tmp_path: Path) -> None:
    work = shutil.copytree(tree, tmp_path / "work")
    left = ("tests", "runs", ".git", ".ci", ".venv", "build", "tagi_ray.egg-info")
    for folder in left:
        (work / folder).mkdir(exist_ok=True)
        (work / folder / "large.bin").write_bytes(secrets.token_bytes(2**23))
    create_package(str(work), tmp_path / "upload.zip", include_gitignore=True)
    names = ZipFile(tmp_path / "upload.zip").namelist()
    assert {"jobs/finetune.py", "tagi_ray/demo_backbone/model.safetensors"} <= set(names)
    assert not [name for name in names if name.split("/")[0] in left]
    assert (tmp_path / "upload.zip").stat().st_size < 8 * 2**20


WHERE = """
import ray, tagi_ray
ray.init(log_to_driver=False)

def where():
    import tagi_ray
    return tagi_ray.__file__

worker = ray.remote(where).options(runtime_env={"env_vars": {"OMP_NUM_THREADS": "1"}})
print("driver", tagi_ray.__file__)
print("worker", ray.get(worker.remote()))
"""


def test_driver_and_workers_import_the_submitted_copy(cluster: Cluster) -> None:
    (cluster.tree / "where.py").write_text(WHERE)
    done = cluster.submit("where", "where.py")
    assert done.returncode == 0, done.stdout + done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    paths = {line[0]: line[1] for line in found if line and line[0] in ("driver", "worker")}
    assert paths.keys() == {"driver", "worker"}
    assert all("/working_dir_files/_ray_pkg_" in path for path in paths.values()), paths


def test_a_submitted_job_ends_with_what_it_made(cluster: Cluster, tmp_path: Path) -> None:
    done = cluster.submit("one", "jobs/prepare_data.py", "small.yaml", f"storage={tmp_path}")
    assert done.returncode == 0, done.stdout + done.stderr
    last = cluster.last_line("one")
    assert last.startswith("Done in "), last
    assert last.endswith(f" s: shards in {tmp_path}/small/shards")
    assert (tmp_path / "small" / "shards" / "manifest.json").exists()


def test_without_the_token_a_submission_is_refused(cluster: Cluster) -> None:
    bare = {k: v for k, v in cluster.env.items() if not k.startswith("RAY_AUTH_")}
    stranger = Cluster(**{**vars(cluster), "env": {**bare, "RAY_AUTH_MODE": "disabled"}})
    refused = stranger.submit("stranger", "jobs/prepare_data.py", "demo")
    assert refused.returncode != 0
    assert "Missing authentication token" in refused.stderr
    assert "stranger" not in cluster.ray("list").stdout


def test_a_client_that_cannot_join_gets_one_sentence(cluster: Cluster, tmp_path: Path) -> None:
    (tmp_path / "wrong").write_text("0" * 64)
    prepare = ("jobs/prepare_data.py", "small.yaml", f"storage={tmp_path}")
    started = time.monotonic()
    for env in ({"RAY_AUTH_TOKEN_PATH": str(tmp_path / "wrong")}, {"RAY_AUTH_MODE": "disabled"}):
        refused = cluster.driver(*prepare, **env)
        assert refused.returncode == 2
        assert refused.stderr == (
            f"Failed (exit code 2): RAY_ADDRESS={cluster.address}: the token is missing or not that"
            " of the cluster: set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH to a file that holds"
            " the cluster's token\n"
        )
    (tmp_path / "sitecustomize.py").write_text("import ray\nray.__version__ = '2.59.0'\n")
    refused = cluster.driver(*prepare, PYTHONPATH=f"{tmp_path}:{cluster.tree}")
    assert refused.returncode == 2
    assert refused.stderr.count("\n") == 1
    assert "cluster has Ray version 2.60.0 but local Ray version is 2.59.0" in refused.stderr
    assert time.monotonic() - started < 60


def test_what_can_never_fit_is_refused_at_once(cluster: Cluster, tmp_path: Path) -> None:
    refused = cluster.driver(
        "jobs/prepare_data.py", "demo", f"storage={tmp_path}", "resources.gpus_per_worker=8"
    )
    assert refused.returncode == 2
    assert "at most 4 CPUs and 0 GPUs on 1 node: not even one fits" in refused.stderr


@pytest.mark.parametrize(
    ("job", "arguments", "field"),
    [
        ("finetune", ("small.yaml",), "storage=runs"),
        ("generate", ("small.yaml", "--instruction=x"), "storage=runs"),
        ("benchmark", ("train_step",), "--storage=runs"),
        ("train_demo_backbone", ("demo_backbone", "storage=/mnt"), "--output="),
    ],
)
def test_what_would_be_lost_is_refused(
    tree: Path, job: str, arguments: tuple[str, ...], field: str
) -> None:
    submitted = json.dumps({"runtime_env": {"working_dir": "gcs://_ray_pkg_1.zip"}})
    refused = subprocess.run(
        [sys.executable, f"jobs/{job}.py", *arguments], cwd=tree, capture_output=True, text=True,
        env={**os.environ, "RAY_JOB_CONFIG_JSON_ENV_VAR": submitted, "PYTHONPATH": str(tree)},
    )  # fmt: skip
    assert refused.returncode == 2
    assert refused.stderr.startswith(f"Failed (exit code 2): {field}")
    assert "would be lost: `ray job submit --working-dir` starts the job in a" in refused.stderr


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_every_job_can_be_submitted(cluster: Cluster) -> None:
    storage = f"storage={cluster.storage}"
    adapters = cluster.storage / "adapters"
    short = ("metatrain.steps=2", "metatrain.valid_groups=2", "data.train_instances=8")
    texts = cluster.storage / "texts.txt"
    texts.write_text("\n\n".join(f"tool number {n} is small and green . " * 9 for n in range(400)))
    raw = {"enabled": "true", "path": texts, "steps": 2, "groups": 4, "micro_groups": 2}
    pretraining = [f"pretrain.{field}={value}" for field, value in raw.items()]
    for name, arguments, end in (
        ("prepare_data", ("small.yaml", storage), "shards in"),
        ("train_teachers", ("small.yaml", storage), "teachers in"),
        ("pretrain", ("small.yaml", storage, "name=pre", *pretraining), "checkpoints in"),
        ("finetune", ("small.yaml", storage), "report in"),
        ("evaluate", ("small.yaml", storage), "report in"),
        ("generate", ("small.yaml", storage, "--instruction=Go.", f"--output={adapters}"), "adapt"),
        ("benchmark", ("train_step", f"--storage={cluster.storage}"), "rows in"),
        (
            "train_demo_backbone",
            ("demo_backbone", storage, f"--output={cluster.storage}/backbone", *short),
            "backbone in",
        ),
    ):
        done = cluster.submit(name, f"jobs/{name}.py", *arguments)
        assert done.returncode == 0, done.stdout + done.stderr
        last = cluster.last_line(name)
        assert last.startswith("Done in "), last
        assert f" s: {end}" in last
        assert str(cluster.storage) in last
    assert list(adapters.glob("*/adapter_model.safetensors"))
    assert (cluster.storage / "backbone" / "model.safetensors").exists()
    assert list((cluster.storage / "benchmark").glob("*.json"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sweep_can_be_submitted_and_continues_in_another_copy(cluster: Cluster) -> None:
    command = ("jobs/sweep.py", "small.yaml", "--space=ranks.yaml", f"storage={cluster.storage}")
    table = cluster.storage / "small_ranks" / "trials.csv"
    cluster.submit("sweep", *command, wait=False)
    until(lambda: table.exists() and "done" in table.read_text(), 400)
    stopped = cluster.ray("stop", "sweep")
    assert stopped.returncode == 0, stopped.stderr
    # A changed file is another package, which is unpacked elsewhere.
    (cluster.tree / "README.md").open("a").write("\n")
    again = cluster.submit("sweep_again", *command)
    assert again.returncode == 0, again.stdout + again.stderr
    last = cluster.last_line("sweep_again")
    assert last.startswith("Done in ")
    assert last.endswith(f"report in {table.with_name('sweep.html')}")
    assert [row.status for row in read_trials(table)] == ["done", "done"]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stopped_job_says_so_and_is_continued_by_the_same_command(cluster: Cluster) -> None:
    metrics = cluster.storage / "stopped" / "metrics.jsonl"
    command = ("jobs/finetune.py", "small.yaml", f"storage={cluster.storage}", "name=stopped")
    for name in ("first", "second"):
        before = read_records(metrics)[-1]["step"] if metrics.exists() else 0
        cluster.submit(name, *command, *AHEAD, wait=False)
        until(lambda: metrics.exists() and read_records(metrics)[-1]["step"] >= before + 10)  # noqa: B023
        stopped = cluster.ray("stop", name)
        assert stopped.returncode == 0, stopped.stderr
        assert "was stopped" in stopped.stdout + stopped.stderr
        log = cluster.ray("logs", name).stdout
        assert "Traceback" not in log
        last = log.rstrip().splitlines()[-1]
        assert last.startswith("Stopped after "), log
        assert last.endswith(" s. The same command continues the run.")
    assert f"step {before + 2}/20000" in log
    assert "step 2/20000" not in log
    assert not killed(cluster, "second")


def killed(cluster: Cluster, name: str) -> bool:
    """Whether Ray had to kill the job, which did not end soon enough."""
    logs = cluster.session.glob("session_latest/logs/*")
    said = f"Attempt to gracefully terminate job {name} "
    return any(said in log.read_text(errors="replace") for log in logs if log.is_file())


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_end_a_local_run_with_their_exit_code(
    tmp_path: Path, number: signal.Signals, code: int
) -> None:
    recipe = ROOT / "tests" / "recipes" / "tiny.yaml"
    command = ["jobs/finetune.py", str(recipe), f"storage={tmp_path}", *AHEAD]
    with (tmp_path / "log").open("w") as log:
        job = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        # A shell lets what it runs in the background ignore Ctrl-C, and that is inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    try:
        until(lambda: job.poll() is not None or (tmp_path / "tiny" / "metrics.jsonl").exists())
        job.send_signal(number)
        assert job.wait(timeout=30) == code
    finally:
        job.kill()
        job.wait()
    said = (tmp_path / "log").read_text()
    assert "Traceback" not in said
    assert said.splitlines()[-1].startswith("Stopped after ")
