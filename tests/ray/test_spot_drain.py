from __future__ import annotations

import importlib
import sys
from pathlib import Path

import pytest
import ray

sys.path.append(str(Path(__file__).parents[2] / "cluster"))
spot_drain = importlib.import_module("spot_drain")

pytestmark = pytest.mark.ray


def test_the_node_finds_its_own_id_and_address(ray_session):
    context = ray.get_runtime_context()
    assert (context.get_node_id(), context.gcs_address) in set(spot_drain.raylets())
