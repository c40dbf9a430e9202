"""Kernels that a GPU starts in each layer of a decode step, how long they take, and whether CUDA graphs start them.

A layer of a decode step is short: what starting its kernels costs counts as much as what they do.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks import _attention, _machine, decode_step
from benchmarks._attention import Outcome, Sizes, Work
from benchmarks._report import Column, Report, Table
from benchmarks._timing import Timing, back_to_back
from benchmarks._trace import Trace, record
from jax_vattention import KVCache, KVCacheManager, RaggedBatch, attention
from jax_vattention.engine.programs import Programs
from jax_vattention.spec import Layout

_STEPS = 8  # of one trace
_NAME_CHARACTERS = 72  # of a kernel, in the table
_WORKS = {"llama-3-8b": Work.uniform("64x1024", 64, 1, 1024), "tiny": Work.uniform("2x96", 2, 1, 96)}
_PROGRAMS = ("attention", "engine")


class Measured(NamedTuple):
    """One program: what a GPU did in so many steps of so many layers, and the time of a step without a trace."""

    trace: Trace
    wall: Timing
    layers: int
    steps: int = _STEPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _attention.add_arguments(parser)
    parser.add_argument("--programs", nargs="+", choices=_PROGRAMS, default=list(_PROGRAMS), help="default: both")


def run(arguments: argparse.Namespace) -> Report:
    sizes, seconds, names = _attention.checked(arguments)
    [work] = _attention.chosen([_WORKS[arguments.shapes]], arguments.only)
    others = _machine.OtherLoad()
    limit = _attention.Limit(arguments.limit)
    rows: list[dict[str, Any]] = []
    kernels: list[dict[str, Any]] = []

    def add(program: str, measure: Callable[[], Measured]) -> None:
        found: list[Measured] = []

        def action() -> Outcome:
            found.append(measure())
            return Outcome(None)

        failure = limit.attempt(action).error
        rows.append({"program": program, "note": failure} | (summary(found[0]) if found else {}))
        kernels.extend({"program": program} | row for each in found for row in by_kernel(each))

    if "attention" in arguments.programs:
        for layout in arguments.layouts:
            for program, measure in _layers(work, sizes, layout, names, seconds):
                add(program, measure)
    if "engine" in arguments.programs:
        add("engine decode", functools.partial(_engine, work, arguments.shapes, seconds))
    tables = (
        Table("Launches of a layer of a decode step", _COLUMNS, tuple(rows)),
        Table("By kernel, of a layer", _KERNEL_COLUMNS, tuple(kernels)),
    )
    return _attention.report("launches", arguments, tables, (*_NOTES, f"{work.name}: requests x keys."), others)


def summary(measured: Measured) -> dict[str, Any]:
    """A row: of one layer, but for what the host launches, which is of one step."""
    trace, _, layers, steps = measured
    row: dict[str, Any] = {"wall_us": measured.wall.median / layers * 1e6, "layers": layers}
    if not trace.operations:
        return row | {"note": "nothing of a GPU in the trace"}
    count, in_graphs = len(trace.operations), sum(operation.in_graph for operation in trace.operations)
    return row | {
        "launches": count / steps / layers,
        "copies": sum(not operation.kernel for operation in trace.operations) / steps / layers,
        "busy_us": trace.busy_ns() / 1e3 / steps / layers,
        "in_graphs": in_graphs / count,
        "graph_launches": trace.graph_launches / steps,
        "single_launches": (count - in_graphs) / steps,
    }


def by_kernel(measured: Measured) -> list[dict[str, Any]]:
    """A row for each name."""
    per_layer = measured.steps * measured.layers
    return [
        {
            "kernel": name[:_NAME_CHARACTERS].replace("|", "/"),
            "launches": len(found) / per_layer,
            "busy_us": sum(operation.duration_ns for operation in found) / 1e3 / per_layer,
            "in_graphs": sum(operation.in_graph for operation in found) / len(found),
        }
        for name, found in measured.trace.by_name().items()
    ]


def _measure(launch: Callable[[], Any], layers: int, seconds: float) -> Measured:
    """`launch` starts a step; it is timed first, which also compiles and warms up."""
    wall = back_to_back(launch, jax.block_until_ready, seconds=seconds)

    def steps() -> None:
        for _ in range(_STEPS):
            result = launch()
        jax.block_until_ready(result)

    return Measured(record(steps), wall, layers)


def _layers(
    work: Work, sizes: Sizes, layout: Layout, names: tuple[str, ...], seconds: float
) -> Iterator[tuple[str, Callable[[], Measured]]]:
    """For each implementation its name, and what measures it while the iterator waits."""
    layers = tuple(range(sizes.num_layers))
    with _attention.manager_for(work, sizes, layout) as manager:
        slots = _attention.fill(manager, work.kv_lens, layers)
        batch = work.batch(slots)
        queries = _attention.random_arrays(1, (len(slots), sizes.num_q_heads, sizes.head_dim), seed=1)[0]
        kv = _attention.random_arrays(1, (len(slots), 2, sizes.num_kv_heads, sizes.head_dim), seed=2)[0]

        def measure(name: str) -> Measured:
            program = jax.jit(
                functools.partial(append_and_attend, layers=layers, implementation=name),
                compiler_options=_attention.compiler_options(),
            )
            cache = manager.step({})
            measured = _measure(lambda: program(queries, kv, cache, batch), len(layers), seconds)
            manager.finish(program(queries, kv, cache, batch)[1])
            return measured

        for name in names:
            yield f"append and {name}, {layout}", functools.partial(measure, name)


def append_and_attend(
    q: jax.Array, kv: jax.Array, cache: KVCache, batch: RaggedBatch, *, layers: tuple[int, ...], implementation: str
) -> tuple[jax.Array, jax.Array]:
    """What a decode step does with the cache, and nothing else: each layer attends with the result of the last."""
    at = batch.token_index(q.shape[0])
    for layer in layers:
        cache = cache.append(kv, layer=layer, slots=at.slots, positions=at.positions, mask=at.mask)
        q, cache = attention(q, cache, layer=layer, batch=batch, implementation=implementation)
    return q, cache.order


def _engine(work: Work, shapes: str, seconds: float) -> Measured:
    """The decode program of the engine, one token a call, with random weights."""
    device = jax.local_devices()[0]
    config = decode_step.SHAPES[shapes]
    context = work.kv_lens[0]
    spec = config.kv_cache_spec(num_slots=len(work.kv_lens), max_seq_len=config.max_position_embeddings)
    pool_bytes = len(work.kv_lens) * (spec.pages_for(context) + 1) * spec.page_bytes
    programs = Programs(decode_step.random_model(config), eos_ids=frozenset(), decode_tokens=1, device=device)
    with KVCacheManager(spec, pool_bytes=pool_bytes, background=False) as manager:
        slots = np.asarray([manager.allocate(context) for _ in work.kv_lens], np.int32)
        decode_step.fill(manager, slots, np.full(spec.num_slots, context - 1, np.int32), context)
        rows, tokens = decode_step.rows(slots, context - 1), np.zeros(slots.size, np.int32)

        def measure() -> Measured:
            cache = manager.step({})
            # Every step writes the same token again.
            measured = _measure(lambda: programs.decode(cache, rows, tokens), spec.num_layers, seconds)
            manager.finish(programs.decode(cache, rows, tokens)[2])
            return measured

        return measure()


_BUSY = Column("busy_us", "kernels, µs", ".2f")
_IN_GRAPHS = Column("in_graphs", "in CUDA graphs", ".0%")
_LAUNCHES = Column("launches", "launches", ".2f")
_COLUMNS = (
    Column("program", "program"),
    _LAUNCHES,
    Column("copies", "of them copies", ".2f"),
    _BUSY,
    Column("wall_us", "wall, µs", ".2f"),
    _IN_GRAPHS,
    Column("graph_launches", "cuGraphLaunch a step", ".1f"),
    Column("single_launches", "single launches a step", ".1f"),
    Column("note", "note"),
)
_KERNEL_COLUMNS = (Column("program", "program"), Column("kernel", "kernel"), _LAUNCHES, _BUSY, _IN_GRAPHS)
_NOTES = (
    f"launches, kernels, in CUDA graphs: what a GPU ran in a trace of {_STEPS} steps, divided by steps and layers, "
    "with the work that layers share. copies: memcpy and memset. kernels: their times one after the other.",
    "cuGraphLaunch, single launches: calls of the host in a step, one for each graph and one for each operation "
    "that is in none.",
    "wall: of a step without a trace, divided by layers. What is not kernels is the GPU waiting for a launch.",
    "append and ...: append and attention in every layer, nothing else. engine decode: the engine's program with the "
    "weights of the model's shape, all of it divided by its layers; attention as implementation=None picks it.",
)
