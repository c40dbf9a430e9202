"""What all tests share: the devices they run on, and small caches over strict memory."""

from __future__ import annotations

import functools
import gc
import os
from collections.abc import Iterator

# Before jax starts: its own pool would leave the page pool little of a GPU.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

# Threads of XLA: those of an interpreted kernel wait for each other, and with fewer than they are they would for ever.
os.environ.setdefault("NPROC", "16")

# Without a GPU jax's CUDA plugin, which compiles for others, would refuse to start.
os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")

import jax
import pytest


@functools.cache
def _gpus() -> list[jax.Device]:
    try:
        return jax.devices("gpu")
    except RuntimeError:
        return []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if "compile_b200" not in config.option.markexpr:  # test_compile_gpu.py runs them in a process of their own
        alone = [item for item in items if item.get_closest_marker("compile_b200")]
        config.hook.pytest_deselected(items=alone)
        items[:] = [item for item in items if item not in alone]
    if _gpus():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU"))


@pytest.fixture(autouse=True, scope="module")
def _compiled_programs_end_with_their_module() -> Iterator[None]:
    """Each takes mappings of the process, of which Linux grants 65,530; pages of the host backend take some too."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(params=["host", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> jax.Device:
    """One device for each memory backend: what is tested with it passes on both."""
    return jax.devices("cpu")[0] if request.param == "host" else _gpus()[0]


@pytest.fixture
def page_bytes(device: jax.Device) -> int:
    """The smallest page of the device's backend."""
    return 4096 if device.platform == "cpu" else 2 * 1024 * 1024


@pytest.fixture
def strict(device: jax.Device) -> bool:
    """The host backend faults on stray reads in tests; CUDA always does."""
    return device.platform == "cpu"
