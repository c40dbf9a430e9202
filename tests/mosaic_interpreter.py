"""Pallas' interpreter for Mosaic GPU kernels, taught the `wgmma` that takes its left operand from registers."""

from __future__ import annotations

import functools

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


@functools.cache
def interpreter():
    """What `interpret=` takes: see `assert_no_race`. Skips the test if jax is too old."""
    try:
        from jax._src import effects
        from jax._src.pallas.mosaic_gpu import core
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        # Loops around a wgmma keep its effect when they are interpreted.
        effects.lowerable_effects.add_type(core._WGMMAPipelineEffect)
        gpu_callbacks.wgmma = gpu_callbacks.fail_on_exception(_wgmma)
        return plgpu.InterpretGPUParams(detect_races=True)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"jax {jax.__version__} cannot interpret the kernel: {error}")


def assert_no_race():
    """In the kernel that was interpreted last: the interpreter itself only prints what it finds."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found


def _wgmma(*, token, mesh_location, thread, source_info=None, **operands):
    """As the interpreter's own, but `a` may be an array."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks as own

    memory = own._get_shared_memory()
    info = own.memory.GPULoggingInfo(mesh_location, thread, source_info)

    def place(name):
        key = own.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
        transforms = jax.tree.map(int, own._remove_noop_transforms(operands[f"{name}_transforms"]))
        return key, memory.access(key, transforms)

    def value(name):
        given = operands[f"{name}_allocation_key_as_array"]
        if given.ndim == 2:
            return np.asarray(given, np.float32)
        return np.asarray(memory.get_buffer_content(*place(name), thread, logging_info=info)[0], np.float32)

    with np.errstate(invalid="ignore"):  # what is masked later may be NaN
        result = value("acc") + value("a") @ value("b")
    memory.store_buffer_content(*place("acc"), result, thread, logging_info=info)
    return token
