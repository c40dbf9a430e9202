"""A decode loop that grows over page boundaries, with memory mapped in three ways: beforehand, by the step that needs
it, and in the background.

Every step adds one token to every request, so that all of them reach the end of a page in the same step: the worst
case. Weights and K and V are random. A step is timed from before `KVCacheManager.step` until its tokens are on the
host. Runs of the three take turns.
"""

from __future__ import annotations

import argparse
import datetime
import functools
from time import perf_counter
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from benchmarks import _machine
from benchmarks._report import Column, Report, Table
from benchmarks._timing import Timing, interleave
from jax_vattention import KVCache, KVCacheManager, KVCacheSpec
from jax_vattention.engine.programs import Programs, Rows
from jax_vattention.models import Llama, LlamaConfig

_WARMUP_STEPS = 8
_FILL_TOKENS = 4096  # of one program that fills the cache
SHAPES = {
    "llama-3-8b": LlamaConfig(
        vocab_size=128_256,
        hidden_size=4096,
        intermediate_size=14_336,
        num_layers=32,
        num_heads=32,
        num_kv_heads=8,
        head_dim=128,
        max_position_embeddings=8192,
        rope_theta=500_000.0,
    ),
    "tiny": LlamaConfig(
        vocab_size=256,
        hidden_size=64,
        intermediate_size=128,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        max_position_embeddings=8192,
    ),
}
_MODES = {
    "beforehand": "all pages before the first step",
    "synchronous": "by the step that needs them",
    "background": "ahead of need, by the mapper",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--shape", choices=SHAPES, default="llama-3-8b", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=64, metavar="N", help="requests (default: %(default)s)")
    parser.add_argument("--context", type=int, default=1024, metavar="N", help="tokens before (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=512, metavar="N", help="of a run (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--page-kib", type=int, default=2048, metavar="N", help="default: %(default)s")


def run(arguments: argparse.Namespace) -> Report:
    device = jax.local_devices()[0]
    config = SHAPES[arguments.shape]
    spec = config.kv_cache_spec(
        num_slots=arguments.batch, max_seq_len=config.max_position_embeddings, page_bytes=arguments.page_kib * 1024
    )
    with jax.default_device(device):
        programs = Programs(random_model(config), eos_ids=frozenset(), decode_tokens=1, device=device)
        others = _machine.OtherLoad()
        actions = [functools.partial(_decode, programs, spec, mode, arguments) for mode in _MODES]
        results = interleave(actions, arguments.rounds)
    table_rows = [_row(mode, runs) for mode, runs in zip(_MODES, results, strict=True)]
    for row in table_rows:
        for name in ("p50_ms", "p99_ms"):
            row[f"{name}_ratio"] = row[name] / table_rows[0][name]
    return Report(
        name="decode_step",
        command="",
        date=datetime.date.today().isoformat(),
        hardware=_machine.hardware(),
        versions=_machine.versions(),
        settings={
            **{name: getattr(arguments, name) for name in ("shape", "batch", "context", "steps", "rounds", "page_kib")},
            "tokens_per_page": spec.tokens_per_page,
            "other_programs_cpu_share": round(others.share(), 3),
        },
        tables=(Table("Time of a decode step, by how its memory is mapped", _COLUMNS, tuple(table_rows)),),
        notes=(
            "against: the same figure divided by that of memory mapped beforehand.",
            "waited: time in which step() waited for the mapper, as a share of all steps.",
            "pages: mapped while steps ran; all requests reach the end of a page in the same step.",
            f"The first {_WARMUP_STEPS} steps of a run and the first run of each are not counted.",
        ),
    )


_COLUMNS = (
    Column("mode", "mapped"),
    Column("p50_ms", "p50, ms", ".3f"),
    Column("p50_ms_ratio", "against", ".4f"),
    Column("p99_ms", "p99, ms", ".3f"),
    Column("p99_ms_ratio", "against", ".4f"),
    Column("worst_ms", "worst, ms", ".3f"),
    Column("waited", "waited", ".3%"),
    Column("pages", "pages"),
    Column("steps", "steps"),
)


def _row(mode: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    timing = Timing.of(seconds for run in runs for seconds in run["seconds"])
    return {
        "mode": _MODES[mode],
        "p50_ms": timing.median * 1e3,
        "p99_ms": timing.quantile(0.99) * 1e3,
        "worst_ms": timing.worst * 1e3,
        "waited": sum(run["wait_seconds"] for run in runs) / sum(timing.seconds),
        "pages": sum(run["pages"] for run in runs),
        "steps": len(timing.seconds),
        "p99_ms_of_runs": [Timing.of(run["seconds"]).quantile(0.99) * 1e3 for run in runs],
        "p50_ms_of_runs": [Timing.of(run["seconds"]).median * 1e3 for run in runs],
    }


def _decode(programs: Programs, spec: KVCacheSpec, mode: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One run: seconds of each step, and what the manager did meanwhile."""
    batch, context = arguments.batch, arguments.context
    total = context + _WARMUP_STEPS + arguments.steps
    # Room for everything and a page a request ahead of it.
    pool_bytes = batch * (spec.pages_for(total) + 1) * spec.page_bytes
    with KVCacheManager(
        spec,
        pool_bytes=pool_bytes,
        background=mode != "synchronous",
        lookahead_steps=0 if mode == "beforehand" else 2,
        reclaim_below=0.0,
    ) as manager:
        slots = np.asarray([manager.allocate(total) for _ in range(batch)], np.int32)
        lengths = np.full(spec.num_slots, context, np.int32)
        fill(manager, slots, lengths, total if mode == "beforehand" else context)
        before = manager.stats()
        tokens = np.zeros(batch, np.int32)
        seconds = []
        for _ in range(_WARMUP_STEPS + arguments.steps):
            start = perf_counter()
            batch_rows = rows(slots, int(lengths[0]))
            lengths = lengths + 1
            cache = manager.step(lengths)
            produced, _, order = programs.decode(cache, batch_rows, tokens)
            del cache
            manager.finish(order)
            tokens = np.asarray(produced)[:, 0]
            seconds.append(perf_counter() - start)
        after = manager.stats()
        if after.pages_mapped != batch * spec.pages_for(total):
            raise RuntimeError(f"expected {batch * spec.pages_for(total)} pages behind the requests, got {after}")
    mapped = [stats.maps_needed + stats.maps_ahead for stats in (before, after)]
    return {
        "seconds": seconds[_WARMUP_STEPS:],
        "wait_seconds": after.wait_seconds - before.wait_seconds,
        "pages": mapped[1] - mapped[0],
    }


def rows(slots: np.ndarray, cached: int) -> Rows:
    """A batch of which every request has `cached` tokens."""
    size = slots.size
    return Rows(
        slots=slots,
        cached=np.full(size, cached, np.int32),
        active=np.ones(size, np.bool_),
        tokens_left=np.full(size, 2, np.int32),
        temperatures=np.zeros(size, np.float32),
        seeds=np.zeros(size, np.uint32),
    )


def fill(manager: KVCacheManager, slots: np.ndarray, lengths: np.ndarray, mapped: int) -> None:
    """Backs `mapped` tokens of every slot and writes random K and V to those in `lengths`."""
    cache = manager.step(np.full_like(lengths, mapped))
    context = int(lengths[0])
    where = np.repeat(slots, context), np.tile(np.arange(context, dtype=np.int32), slots.size)
    for first in range(0, where[0].size, _FILL_TOKENS):
        part = slice(first, first + _FILL_TOKENS)
        cache = manager.step({})
        manager.finish(_append(cache, jax.random.key(first), where[0][part], where[1][part]))
    del cache


@jax.jit
def _append(cache: KVCache, key: jax.Array, slots: jax.Array, positions: jax.Array) -> jax.Array:
    spec = cache.spec
    kv = jax.random.normal(key, (slots.size, 2, spec.num_kv_heads, spec.head_dim), spec.dtype)
    for layer in range(spec.num_layers):
        cache = cache.append(kv, layer=layer, slots=slots, positions=positions)
    return cache.order


def random_model(config: LlamaConfig) -> Llama:
    """A model with random bfloat16 weights, made on the device one array at a time."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: Llama(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
    leaves, treedef = jax.tree.flatten(state)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    weights = [_random_weight(key, leaf.shape, leaf.dtype) for key, leaf in zip(keys, leaves, strict=True)]
    return nnx.merge(graphdef, jax.tree.unflatten(treedef, weights))


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_weight(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if len(shape) == 1:
        return jnp.ones(shape, dtype)
    return (jax.random.normal(key, shape, jnp.float32) * shape[0] ** -0.5).astype(dtype)
