from __future__ import annotations

import os

import pytest
import ray

pytestmark = pytest.mark.ray


@pytest.mark.usefixtures("ray_session")
def test_the_session_cluster_runs_our_code_with_our_environment():
    @ray.remote
    def environment() -> tuple[str, str]:
        from tagi_ray import recipes

        return os.environ["OMP_NUM_THREADS"], recipes.load("demo").name

    assert ray.get(environment.remote()) == ("1", "demo")
    assert ray.cluster_resources()["CPU"] == 6
