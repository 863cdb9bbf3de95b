"""Settings every test runs under."""

import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("WANDB_MODE", "disabled")

# Before nnsight, which gives every object a method, `save`; beartype's import trips over that.
import beartype  # noqa: F401
import jaxtyping
import pytest
import torch

from tests.toolkits import HAS_SAES

# Tests run in as many processes as there are cores; more threads would only get in their way.
torch.set_num_threads(1)

# All about SAEs, from their imports on.
collect_ignore = [] if HAS_SAES else ["cli", "demonstration", "faults", "saes"]


@pytest.fixture(autouse=True)
def _grad_mode_is_restored():
    """A test that leaves gradients off would make later ones pass for the wrong reason."""
    assert torch.is_grad_enabled()
    yield
    assert torch.is_grad_enabled()


@pytest.fixture
def as_users_run():
    """No run-time type checks, which would refuse bad input before the package's own errors do."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="session")
def ray_here():
    """A Ray on this machine that tests share: those of the group "ray", in one process of pytest.

    It has two CPUs, whatever there are.
    """
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = pytest.importorskip("ray")
    before = signal.getsignal(signal.SIGTERM)
    ray.init(
        address="local",
        num_cpus=2,
        num_gpus=0,
        object_store_memory=100 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    signal.signal(signal.SIGTERM, before)
    yield
    ray.shutdown()
