"""What loggers hold of a run, read back."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

from tagi_ray.tracking import WARNINGS


def mlflow_runs(folder: Path) -> list[tuple[str, str, dict, dict[str, list[tuple[int, float]]]]]:
    """Id, status, parameters and metrics of all runs in a folder of MLflow's files."""
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow import MlflowClient

    client = MlflowClient((folder / "mlruns").as_uri())
    found = client.search_runs([one.experiment_id for one in client.search_experiments()])
    return [
        (
            one.info.run_id,
            one.info.status,
            dict(one.data.params),
            {
                name: [(m.step, m.value) for m in client.get_metric_history(one.info.run_id, name)]
                for name in one.data.metrics
            },
        )
        for one in found
    ]


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Steps and values that TensorBoard's event files hold."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, list[tuple[int, float]]] = {}
    for path in sorted((folder / "tensorboard").iterdir()):
        content, place = path.read_bytes(), 0  # size, 4 bytes of checksum, event, 4 more
        while place < len(content):
            size = int.from_bytes(content[place : place + 8], "little")
            event = Event.FromString(content[place + 12 : place + 12 + size])
            place += size + 16
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, []).append((event.step, value.simple_value))
    return {tag: sorted(points) for tag, points in found.items()}


def warnings_in(folder: Path) -> list[dict]:
    path = folder / WARNINGS
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def closed_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
