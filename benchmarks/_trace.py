"""What a GPU ran, read from a trace of jax.profiler."""

from __future__ import annotations

import dataclasses
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax

_NOT_KERNELS = ("Memcpy", "Memset", "MemoryAlloc", "MemoryFree", "CUPTI")


class Operation(NamedTuple):
    """Something that a GPU did, once."""

    name: str
    """Of the kernel; or the kind of copy."""
    kernel: bool
    """Not a copy or a fill."""
    in_graph: bool
    """A node of a CUDA graph, or a whole graph if the trace has no nodes."""
    start_ns: float
    duration_ns: float


@dataclasses.dataclass(frozen=True)
class Trace:
    """What all GPUs did, in order of time, and what the host asked the driver for."""

    operations: tuple[Operation, ...]
    graph_launches: int
    """Calls of cuGraphLaunch."""

    @classmethod
    def of(cls, profile: Any) -> Trace:
        """Reads a `jax.profiler.ProfileData`."""
        operations: list[Operation] = []
        graph_launches = 0
        for plane in profile.planes:
            on_device = plane.name.startswith("/device:GPU")
            for line in plane.lines:
                # Other lines of a device repeat the same work by operation and by module of XLA.
                if on_device and line.name.startswith("Stream #"):
                    operations += map(_operation, line.events)
                elif not on_device:
                    # Calls that launch one kernel bear its name there, not that of the call.
                    graph_launches += sum(event.name.startswith("cuGraphLaunch") for event in line.events)
        operations.sort(key=lambda operation: operation.start_ns)
        return cls(tuple(operations), graph_launches)

    def busy_ns(self) -> float:
        """Of all operations, one after the other."""
        return sum(operation.duration_ns for operation in self.operations)

    def by_name(self) -> dict[str, list[Operation]]:
        """The operations of each name; the name that took longest first."""
        found: dict[str, list[Operation]] = {}
        for operation in self.operations:
            found.setdefault(operation.name, []).append(operation)
        return dict(sorted(found.items(), key=lambda item: -sum(each.duration_ns for each in item[1])))


def _operation(event: Any) -> Operation:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of the type of the statistics, in Python 3.12
        # Of a node the graph; of a whole graph what was made of it.
        in_graph = any(key in ("cuda_graph_id", "cuda_graph_exec_id") and value for key, value in event.stats)
    kernel = not event.name.startswith(_NOT_KERNELS)
    return Operation(event.name, kernel, in_graph, event.start_ns, event.duration_ns)


def record(action: Callable[[], Any]) -> Trace:
    """The trace of a call of `action`, which must wait for what it starts."""
    from jax.profiler import ProfileData

    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # thousands of calls that nothing here looks at
    options.advanced_configuration = {"gpu_enable_cupti_activity_graph_trace": False}  # each node of a graph instead
    with tempfile.TemporaryDirectory() as folder:
        jax.profiler.start_trace(folder, profiler_options=options)
        try:
            action()
        finally:
            jax.profiler.stop_trace()
        [file] = Path(folder).rglob("*.xplane.pb")
        return Trace.of(ProfileData.from_file(str(file)))
