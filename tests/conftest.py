"""What all tests share: an offline environment with one thread, and one local Ray."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator

import pytest

# Set before any test module imports torch, transformers or ray; Ray's workers inherit it.
os.environ.update(
    {
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "HF_HUB_OFFLINE": "1",
        # Ray would write a token into the home directory, which a hermetic test leaves alone.
        "RAY_AUTH_MODE": "disabled",
    }
)
# A job under test starts its own cluster rather than join one that runs on this machine.
os.environ.pop("RAY_ADDRESS", None)


@pytest.fixture(scope="session", autouse=True)
def process_group() -> Iterator[None]:
    """End the process group that an engine made in this process, before the interpreter ends."""
    yield
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local cluster for the whole session, with logical CPUs for two workers and Ray Data."""
    import ray

    ray.init(
        address="local",
        num_cpus=6,
        num_gpus=0,
        object_store_memory=200 * 2**20,
        include_dashboard=True,  # Ray Train asks its state API, and complains for ever without it
        dashboard_port=0,
        log_to_driver=False,
        configure_logging=False,
        runtime_env={"env_vars": {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}},
    )
    yield
    ray.shutdown()
