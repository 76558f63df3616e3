"""Drain this Ray node when its cloud announces that it takes the machine back.

    RAY_AUTH_MODE=token python cluster/spot_drain.py aws|gcp|azure

A drained node gets no new work, and a run that it holds continues on other nodes. One of
these runs beside each worker's `ray start`; it needs nothing but Python and the `ray` command.
"""

from __future__ import annotations

import argparse
import contextlib
import email.utils
import fcntl
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

POLL_SECONDS = 2.0
"""A notice is as short as 30 seconds, of which Ray's own look takes five."""
SHORT_NOTICE = 30.0
"""Seconds that Google Cloud gives, and Azure where an event names no time any more."""
CLOUDS = {
    "aws": "http://169.254.169.254",
    "gcp": "http://metadata.google.internal",
    "azure": "http://169.254.169.254",
}
LOCK = Path("/tmp/tagi-spot-drain.lock")


def aws_notice(base: str) -> float | None:
    """Return the seconds until EC2 ends this spot instance, or None while it does not."""
    token = _ask(
        f"{base}/latest/api/token", {"X-aws-ec2-metadata-token-ttl-seconds": "60"}, method="PUT"
    )
    said = _ask(
        f"{base}/latest/meta-data/spot/instance-action", {"X-aws-ec2-metadata-token": token}
    )
    if not said:
        return None
    at = datetime.strptime(json.loads(said)["time"], "%Y-%m-%dT%H:%M:%SZ").replace(tzinfo=UTC)
    return (at - datetime.now(UTC)).total_seconds()


def gcp_notice(base: str) -> float | None:
    """Return the seconds until Compute Engine ends this spot VM, or None while it does not."""
    said = _ask(f"{base}/computeMetadata/v1/instance/preempted", {"Metadata-Flavor": "Google"})
    return SHORT_NOTICE if said.strip() == "TRUE" else None


def azure_notice(base: str) -> float | None:
    """Return the seconds until Azure evicts this spot VM, or None while it does not.

    Events of other machines of the same group come along and are passed over.
    """
    header = {"Metadata": "true"}
    name = _ask(
        f"{base}/metadata/instance/compute/name?api-version=2021-02-01&format=text", header
    ).strip()
    said = _ask(f"{base}/metadata/scheduledevents?api-version=2020-07-01", header)
    for event in json.loads(said or "{}").get("Events", []):
        if event["EventType"] == "Preempt" and name in event["Resources"]:
            if not event.get("NotBefore"):
                return SHORT_NOTICE
            at = email.utils.parsedate_to_datetime(event["NotBefore"])
            return (at - datetime.now(UTC)).total_seconds()
    return None


NOTICES: dict[str, Callable[[str], float | None]] = {
    "aws": aws_notice,
    "gcp": gcp_notice,
    "azure": azure_notice,
}


def _ask(url: str, headers: dict[str, str], method: str = "GET") -> str:
    """Return what a metadata service says; nothing where it has no such page."""
    request = urllib.request.Request(url, headers=headers, method=method)
    # Proxies are for the world outside; the address of the service is this machine's own.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=5) as answer:
            return answer.read().decode()
    except urllib.error.HTTPError as error:
        if error.code == 404:
            return ""
        raise


def raylets(proc: Path = Path("/proc")) -> Iterator[tuple[str, str]]:
    """Yield node id and GCS address of each raylet here, from its own command line.

    Nothing else on a node says its id without a driver that joins the cluster.
    """
    for path in proc.glob("[0-9]*/cmdline"):
        try:
            program, *arguments = path.read_bytes().decode().split("\0")
        except (OSError, UnicodeDecodeError):  # it ended meanwhile, or is not ours
            continue
        if Path(program).name == "raylet":
            flags = dict(each[2:].split("=", 1) for each in arguments if "=" in each)
            yield flags["node_id"], flags["gcs-address"]


def drain(seconds: float, reason: str, proc: Path = Path("/proc")) -> bool:
    """Ask the cluster to drain this node; say whether it agreed."""
    found = list(raylets(proc))
    if not found:
        print("spot_drain: no raylet runs here, nothing to drain", flush=True)
    done = bool(found)
    for node, address in found:
        command = ["ray", "drain-node", "--address", address, "--node-id", node]
        command += ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", reason]
        command += ["--deadline-remaining-seconds", str(max(1, int(seconds)))]
        print("spot_drain:", *command, flush=True)
        done = subprocess.run(command, check=False).returncode == 0 and done
    return done


def watch(cloud: str, base: str, *, poll: float = POLL_SECONDS, proc: Path = Path("/proc")) -> None:
    """Wait for a notice and drain this node once; ends when the cluster has agreed."""
    until: float | None = None
    last = ""
    while True:
        try:
            left = NOTICES[cloud](base) if until is None else None
            if left is not None:
                until = time.monotonic() + left
        except (OSError, ValueError, KeyError) as error:
            if str(error) != last:  # a service that is away is named once, not every two seconds
                last = str(error)
                print(f"spot_drain: {base} did not answer: {error}", flush=True)
        if until is not None and drain(
            until - time.monotonic(), f"{cloud} takes this machine back", proc
        ):
            return
        time.sleep(poll)


@contextlib.contextmanager
def alone(path: Path = LOCK) -> Iterator[bool]:
    """Say whether this is the only one here: `ray up` starts one each time it starts Ray."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            first = False
        else:
            first = True
        yield first


def main(arguments: list[str] | None = None) -> int:
    """Watch until the machine is taken back."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("cloud", choices=sorted(CLOUDS))
    parser.add_argument("--metadata", help="address of the metadata service, for a trial")
    given = parser.parse_args(arguments)
    with alone() as first:
        if first:
            watch(given.cloud, given.metadata or CLOUDS[given.cloud])
    return 0


if __name__ == "__main__":
    sys.exit(main())
