"""Settings every test runs under."""

import os

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
