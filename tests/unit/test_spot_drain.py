"""The poller against a server that plays the three metadata services, with `ray` recorded."""

from __future__ import annotations

import importlib
import inspect
import json
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "cluster" / "spot_drain.py"
sys.path.append(str(SCRIPT.parent))
spot_drain = importlib.import_module("spot_drain")

NODE = "c4" * 28
ADDRESS = "10.0.0.7:6379"
HEADERS = {
    # (what each page demands, as the clouds do)
    "/latest/api/token": ("X-aws-ec2-metadata-token-ttl-seconds", "60"),
    "/latest/meta-data/spot/instance-action": ("X-aws-ec2-metadata-token", "a-token"),
    "/computeMetadata/v1/instance/preempted": ("Metadata-Flavor", "Google"),
    "/metadata/instance/compute/name": ("Metadata", "true"),
    "/metadata/scheduledevents": ("Metadata", "true"),
}


class Metadata(ThreadingHTTPServer):
    """Has no page but those of `pages`, which a test changes while the poller asks."""

    def __init__(self) -> None:
        self.pages: dict[str, str] = {"/latest/api/token": "a-token"}
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), Page)
        self.base = f"http://127.0.0.1:{self.server_port}"


class Page(BaseHTTPRequestHandler):
    server: Metadata

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(path)
        header, value = HEADERS.get(path, ("", ""))
        text = self.server.pages.get(path)
        allowed = self.headers.get(header) == value
        allowed &= self.command == ("PUT" if path == "/latest/api/token" else "GET")
        self.send_response(404 if text is None else 200 if allowed else 401)
        self.end_headers()
        if text is not None and allowed:
            self.wfile.write(text.encode())

    do_PUT = do_GET

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def metadata():
    server = Metadata()
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def node(tmp_path, monkeypatch) -> Path:
    """A node with one raylet, and a `ray` that writes its arguments down; returns where."""
    calls = tmp_path / "calls"
    ray = tmp_path / "bin" / "ray"
    ray.parent.mkdir()
    ray.write_text(
        f"#!{sys.executable}\nimport json, os, sys\n"
        f"print(json.dumps(sys.argv[1:]), file=open({str(calls)!r}, 'a'))\n"
        "sys.exit(int(os.environ.get('REFUSE', '0')))\n"
    )
    ray.chmod(0o755)
    monkeypatch.setenv("PATH", str(ray.parent), prepend=":")
    worker = "python default_worker.py --node-id=ffff --gcs-address=1.1.1.1:1 --raylet-name=x"
    for pid, command in {
        "17": ["/bin/bash", "-c", "ray start --node_id=abc"],
        "42": ["/x/ray/core/src/ray/raylet/raylet", "--raylet_socket_name=/tmp/ray/s/raylet",
               f"--node_id={NODE}", f"--python_worker_command={worker}", "--labels=",
               f"--gcs-address={ADDRESS}", "--head", ""],
        "43": ["ray::IDLE", "", ""],
    }.items():  # fmt: skip
        (tmp_path / "proc" / pid).mkdir(parents=True)
        (tmp_path / "proc" / pid / "cmdline").write_bytes("\0".join(command).encode())
    (tmp_path / "proc" / "44").mkdir()  # a process that ended meanwhile
    return calls


def watch(cloud: str, base: str, calls: Path) -> threading.Thread:
    thread = threading.Thread(
        target=lambda: spot_drain.watch(cloud, base, poll=0.02, proc=calls.parent / "proc"),
        daemon=True,
    )
    thread.start()
    return thread


def wait_for(said, seconds: float = 10.0) -> None:
    until = time.monotonic() + seconds
    while not said():
        assert time.monotonic() < until
        time.sleep(0.01)


def later(seconds: float) -> datetime:
    return datetime.now(UTC) + timedelta(seconds=seconds)


def notice(cloud: str) -> tuple[str, str, str]:
    """Return a page, what it says before, and what it says in a notice."""
    if cloud == "aws":
        said = {"action": "terminate", "time": f"{later(120):%Y-%m-%dT%H:%M:%SZ}"}
        return "/latest/meta-data/spot/instance-action", "", json.dumps(said)
    if cloud == "gcp":
        return "/computeMetadata/v1/instance/preempted", "FALSE", "TRUE"
    quiet = {"DocumentIncarnation": 1, "Events": []}
    said = quiet | {"Events": [event("Preempt", "gpu-1", format_datetime(later(45), usegmt=True))]}
    return "/metadata/scheduledevents", json.dumps(quiet), json.dumps(said)


def event(kind: str, machine: str, not_before: str) -> dict[str, object]:
    return {
        "EventId": "1", "EventType": kind, "ResourceType": "VirtualMachine",
        "Resources": [machine], "EventStatus": "Scheduled", "NotBefore": not_before,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("cloud", "least", "most"), [("aws", 110, 120), ("gcp", 25, 30), ("azure", 35, 45)]
)
def test_a_notice_drains_this_node_once(metadata, node, cloud, least, most):
    page, before, notified = notice(cloud)
    metadata.pages["/metadata/instance/compute/name"] = "gpu-1"
    if before:
        metadata.pages[page] = before
    thread = watch(cloud, metadata.base, node)
    wait_for(lambda: metadata.asked.count(page) > 3)
    assert not node.exists()
    metadata.pages[page] = notified
    thread.join(10)
    assert not thread.is_alive()
    (call,) = [json.loads(line) for line in node.read_text().splitlines()]
    assert call[:-1] == [
        "drain-node", "--address", ADDRESS, "--node-id", NODE,
        "--reason", "DRAIN_NODE_REASON_PREEMPTION",
        "--reason-message", f"{cloud} takes this machine back", "--deadline-remaining-seconds",
    ]  # fmt: skip
    assert least <= int(call[-1]) <= most


def test_a_drain_that_is_refused_is_tried_again(metadata, node, monkeypatch):
    monkeypatch.setenv("REFUSE", "1")
    metadata.pages["/computeMetadata/v1/instance/preempted"] = "TRUE"
    thread = watch("gcp", metadata.base, node)
    wait_for(lambda: node.exists() and len(node.read_text().splitlines()) > 1)
    assert thread.is_alive()
    monkeypatch.setenv("REFUSE", "0")
    thread.join(10)
    assert not thread.is_alive()
    assert metadata.asked == ["/computeMetadata/v1/instance/preempted"]


def test_a_service_that_is_away_for_a_while_ends_nothing(metadata, node, capsys):
    page = "/metadata/scheduledevents"
    metadata.pages |= {"/metadata/instance/compute/name": "gpu-1", page: "not json"}
    thread = watch("azure", metadata.base, node)
    wait_for(lambda: metadata.asked.count(page) > 3)
    assert thread.is_alive()
    metadata.pages[page] = notice("azure")[2]
    thread.join(10)
    assert not thread.is_alive()
    assert capsys.readouterr().out.count("did not answer") == 1


@pytest.mark.parametrize(
    ("kind", "machine", "left"),
    [("Preempt", "gpu-2", None), ("Reboot", "gpu-1", None), ("Preempt", "gpu-1", 30.0)],
)
def test_an_event_of_another_machine_or_kind_is_passed_over(metadata, kind, machine, left):
    metadata.pages["/metadata/instance/compute/name"] = "gpu-1"
    said = {"Events": [event(kind, machine, "")]}
    metadata.pages["/metadata/scheduledevents"] = json.dumps(said)
    assert spot_drain.azure_notice(metadata.base) == left


def test_without_a_raylet_nothing_is_drained(tmp_path, capsys):
    assert not spot_drain.drain(30, "x", tmp_path)
    assert "no raylet runs here" in capsys.readouterr().out


def test_ray_starts_its_raylet_with_the_flags_that_are_read():
    from ray._private import services

    source = inspect.getsource(services.start_raylet)
    assert 'f"--node_id={node_id}"' in source
    assert 'f"--gcs-address={gcs_address}"' in source
    assert Path(services.RAYLET_EXECUTABLE).name == "raylet"


def test_rays_command_takes_what_is_passed():
    from ray.scripts.scripts import cli

    command = cli.commands["drain-node"]
    flags = {flag for option in command.params for flag in option.opts}
    assert {"--address", "--node-id", "--reason-message", "--deadline-remaining-seconds"} <= flags
    (reason,) = [option for option in command.params if option.name == "reason"]
    assert "DRAIN_NODE_REASON_PREEMPTION" in reason.type.choices


def test_a_second_poller_leaves_at_once(tmp_path):
    with (
        spot_drain.alone(tmp_path / "lock") as first,
        spot_drain.alone(tmp_path / "lock") as second,
    ):
        assert first
        assert not second
    with spot_drain.alone(tmp_path / "lock") as again:
        assert again


def test_it_needs_nothing_but_python():
    done = subprocess.run(
        [sys.executable, "-I", "-S", str(SCRIPT), "mars"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "invalid choice: 'mars'" in done.stderr
