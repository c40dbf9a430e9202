"""Pallas' interpreter for Mosaic GPU kernels, taught what it lacks.

That is the `wgmma` that takes its left operand from registers, that a product may be NaN, and that columns of tensor
memory with two names (a `RefUnion`) are columns: as it comes, a write to some races with a read of others under the
other name.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu


@functools.cache
def interpreter():
    """What `interpret=` takes. It finds races between the warpgroups of a block. Skips the test if jax is too old."""
    try:
        from jax._src import effects
        from jax._src.pallas.mosaic_gpu import core
        from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

        # Loops around a wgmma keep its effect when they are interpreted.
        effects.lowerable_effects.add_type(core._WGMMAPipelineEffect)
        gpu_callbacks.wgmma = gpu_callbacks.fail_on_exception(_wgmma)
        gpu_callbacks.TcGen05Mma.__call__ = np.errstate(invalid="ignore")(gpu_callbacks.TcGen05Mma.__call__)
        _tell_columns_apart()
        return plgpu.InterpretGPUParams(detect_races=True)
    except (ImportError, AttributeError) as error:
        pytest.skip(f"jax {jax.__version__} cannot interpret the kernel: {error}")


@contextlib.contextmanager
def interpreting(wanted: bool = True) -> Iterator[object]:
    """What `interpret=` takes; False if it is not wanted. What is interpreted is compiled quickly, to be slow."""
    if not wanted:
        yield False
        return
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    try:
        yield interpreter()
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


def assert_no_races() -> None:
    """Of the kernel that was interpreted last; the interpreter has printed them."""
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    assert not gpu_callbacks.get_races().races_found, "the interpreter found a race"


def _tell_columns_apart() -> None:
    """Halves of the columns of a union in tensor memory are unions of their own, where an access is to one half."""
    from jax._src.pallas.mosaic_gpu.core import MemorySpace
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks
    from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState as State

    whole = State._check_ref_union
    tensor_memory = gpu_callbacks.memory.get_memory_space_idx(MemorySpace.TMEM)

    def checked(kind):
        per_buffer = getattr(super(State, State), kind)

        def check(self, thread, clock, key, access, source_info=None):
            per_buffer(self, thread, clock, key, access.range, source_info)
            if key not in self.ref_union_members:
                return
            if key.memory_space_id != tensor_memory:
                whole(self, thread, clock, key, kind == "check_write", source_info)
                return
            width = gpu_callbacks._get_shared_memory().buffer_shape_and_dtype(key).shape[-1]
            columns = access.range[-1]
            first, last = 2 * columns.start // width, 2 * (columns.stop - 1) // width
            for half in range(first, last + 1):
                union, group = self.ref_union_members[key]
                self.ref_union_members[key, half] = ((union, half), group)
                whole(self, thread, clock, (key, half), kind == "check_write", source_info)

        return check

    State.check_read, State.check_write = checked("check_read"), checked("check_write")


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

    with np.errstate(invalid="ignore", over="ignore"):  # as a GPU has it: what is NaN may be masked later
        result = value("acc") + value("a") @ value("b")
    memory.store_buffer_content(*place("acc"), result, thread, logging_info=info)
    return token
