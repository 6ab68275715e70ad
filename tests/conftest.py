"""Eight emulated devices and a fixed thread pool for every test process."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("PJRT_NPROC", "8")

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session", autouse=True)
def devices():
    """The pool; a test that gets fewer would prove nothing."""
    found = jax.devices()
    assert len(found) == 8
    return found
