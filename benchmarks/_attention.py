"""What the benchmarks of attention share: the work, the cache that it reads, and the rows of this package.

A program runs attention on several layers one after the other, so that no layer finds its K and V in the L2 cache.
Queries, K and V are random: zeros would make a GPU draw less power, and run faster.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import gc
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from time import perf_counter
from typing import Any, NamedTuple, Protocol, TypeVar, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks import _machine, _stop
from benchmarks._report import BenchmarkError, Column, Report, Table
from benchmarks._timing import Timing, back_to_back
from jax_vattention import GPU_COMPILER_OPTIONS, KVCache, KVCacheManager, KVCacheSpec, RaggedBatch, attention
from jax_vattention.attention import implementations
from jax_vattention.attention.features import Features
from jax_vattention.spec import Layout

_MIB = 2**20
_FILL_TOKENS = 16_384  # of one program that fills the cache
_ERROR_CHARACTERS = 160  # of what a row says about a failure

LAYOUTS: tuple[Layout, ...] = get_args(Layout)

PACKAGES = (
    "jax-cuda12-plugin",
    "jax-cuda13-plugin",
    "nvidia-cudnn-cu12",
    "nvidia-cudnn-cu13",
    "torch",
    "flashinfer-python",
)
"""Whose versions a report of attention names, where they are installed."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Dimensions of the model whose attention is measured, and of the arrays that show the machine's ceilings."""

    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    chained: int
    """Layers that one program reads, of `num_layers`."""
    copy_bytes: int
    matmul_size: int

    @property
    def token_bytes(self) -> int:
        """K and V of one token in one layer, bfloat16."""
        return 2 * self.num_kv_heads * self.head_dim * 2

    @property
    def layers(self) -> tuple[int, ...]:
        """Which layers a program reads, apart from each other."""
        return tuple(index * self.num_layers // self.chained for index in range(self.chained))


SIZES = {
    "llama-3-8b": Sizes(32, 32, 8, 128, chained=8, copy_bytes=2048 * _MIB, matmul_size=8192),
    "tiny": Sizes(4, 4, 2, 64, chained=2, copy_bytes=_MIB, matmul_size=64),
}


@dataclasses.dataclass(frozen=True)
class Work:
    """One call of attention, by request: its new queries, and its keys, theirs included."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]

    @classmethod
    def uniform(cls, name: str, requests: int, q_len: int, kv_len: int) -> Work:
        """The same for all requests."""
        return cls(name, (q_len,) * requests, (kv_len,) * requests)

    @property
    def num_queries(self) -> int:
        """Tokens of the query array."""
        return sum(self.q_lens)

    @property
    def num_keys(self) -> int:
        """Tokens whose K and V are read."""
        return sum(self.kv_lens)

    @property
    def num_pairs(self) -> int:
        """Pairs of a query and a key that it sees."""
        return sum(q * (kv - q) + q * (q + 1) // 2 for q, kv in zip(self.q_lens, self.kv_lens, strict=True))

    def part(self, requests: slice) -> Work:
        """The work of some of the requests."""
        return Work(self.name, self.q_lens[requests], self.kv_lens[requests])

    def batch(self, slots: Sequence[int]) -> RaggedBatch:
        """As `attention` takes it."""
        rows, kv_lens = jnp.asarray(slots, jnp.int32), jnp.asarray(self.kv_lens, jnp.int32)
        if max(self.q_lens) == 1:
            return RaggedBatch.decode(rows, kv_lens)
        starts = np.cumsum([0, *self.q_lens[:-1]])
        return RaggedBatch(
            slots=rows,
            q_starts=jnp.asarray(starts, jnp.int32),
            q_lens=jnp.asarray(self.q_lens, jnp.int32),
            kv_lens=kv_lens,
            max_q_len=max(self.q_lens),
        )


class Outcome(NamedTuple):
    """What came of one row: times of one layer, or why there are none."""

    timing: Timing | None
    layers: int = 0
    """How many the program read."""
    error: str = ""
    kv_bytes: float = 1.0
    """Of K and V, as a share of those of bfloat16."""


class _HasName(Protocol):
    @property
    def name(self) -> str: ...


_Named = TypeVar("_Named", bound=_HasName)

Program = Callable[..., tuple[Any, jax.Array]]
"""`attend(queries, cache, batch, layers=)`, which is to be jitted: results, and the order token."""

Reader = Callable[[Work], Program]
"""A way to read a cache: its program for some work."""

Alternative = Callable[[Work, Sizes, float], Outcome]
"""Times another library for so many seconds; free to raise."""


def attempt(action: Callable[[], Outcome]) -> Outcome:
    """What `action` returns; if it raises, what it raised. Gives back the memory of either."""
    try:
        return action()
    except Exception as error:
        # A row that says so: alternatives may be missing, or not made for a shape.
        first = next(iter(str(error).strip().splitlines()), "").replace("|", "/")
        return Outcome(None, error=f"{type(error).__name__}: {first}"[:_ERROR_CHARACTERS])
    finally:
        release()


def release() -> None:
    """Gives memory back that nothing uses: frames of an error may hold arrays, and torch keeps what it once had."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()


# Options and reports


def add_arguments(parser: argparse.ArgumentParser, alternatives: Sequence[str] = ()) -> None:
    parser.add_argument("--shapes", choices=SIZES, default="llama-3-8b", help="tiny also runs on a CPU, to see it run")
    parser.add_argument("--quick", action="store_true", help="a fifth of the measurements")
    parser.add_argument("--seconds", type=float, default=1.5, metavar="N", help="for each row (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="SHAPE", help="only these shapes, by their names in the table")
    add_choices(parser)
    add_limit(parser)
    if alternatives:
        parser.add_argument(
            "--against", nargs="*", choices=alternatives, default=list(alternatives), help="default: all"
        )


def add_limit(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--limit", type=float, metavar="N", help="begin no row after so many seconds, and say so (default: none)"
    )


class Limit:
    """When to stop, so that a run whose time is limited reports what it has."""

    def __init__(self, seconds: float | None):
        self._seconds, self._start = seconds, perf_counter()

    def attempt(self, action: Callable[[], Outcome]) -> Outcome:
        """As `attempt`; if the time is over, or this was told to stop, an outcome that says so."""
        if _stop.told():
            return Outcome(None, error="not run: told to stop")
        if self._seconds is not None and perf_counter() - self._start > self._seconds:
            return Outcome(None, error=f"not run: more than --limit {self._seconds:g} seconds had passed")
        return attempt(action)


def add_choices(parser: argparse.ArgumentParser) -> None:
    """Options that say which of this package's programs are measured."""
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=implementations(),
        default=None,
        help="of this package (default: all for GPUs; on a CPU the reference)",
    )


def checked(arguments: argparse.Namespace) -> tuple[Sizes, float, tuple[str, ...]]:
    """Sizes, seconds for each row, and the implementations of this package to measure.

    Raises:
      BenchmarkError: there is no GPU, and the shapes are not made to run without one.
    """
    sizes = checked_sizes(arguments.shapes)
    default = default_implementations()
    if len(default) > 1:
        default = tuple(name for name in default if name != "reference")
    seconds = arguments.seconds / (5 if arguments.quick else 1)
    return sizes, seconds, tuple(arguments.implementations or default)


def checked_sizes(shapes: str) -> Sizes:
    """Of `--shapes`.

    Raises:
      BenchmarkError: there is no GPU, and the shapes are not made to run without one.
    """
    if shapes != "tiny":
        need_gpu(" (--shapes tiny only shows that the benchmark runs)")
    return SIZES[shapes]


def need_gpu(hint: str = "") -> None:
    """Raises BenchmarkError if JAX has none, with a `hint` of what goes without."""
    if jax.default_backend() != "gpu":
        raise BenchmarkError(
            f"expected an NVIDIA GPU that JAX can use, got {jax.default_backend()}; install jax[cuda13] or jax[cuda12] "
            f"on a machine that has one{hint}"
        )


def chosen(works: Sequence[_Named], only: Sequence[str] | None) -> list[_Named]:
    """The works that `--only` names, or all.

    Raises:
      BenchmarkError: there is none of such a name.
    """
    names = list(dict.fromkeys(work.name for work in works))
    if unknown := sorted(set(only or ()) - set(names)):
        raise BenchmarkError(f"--only: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    return [work for work in works if only is None or work.name in only]


def default_implementations() -> tuple[str, ...]:
    """Those that are made for this machine."""
    if jax.default_backend() != "gpu":
        return ("reference",)
    blackwell = jax.devices()[0].compute_capability.startswith("10.")
    other = "mosaic" if blackwell else "mosaic_blackwell"
    return tuple(name for name in implementations() if name != other)


def report(
    name: str, arguments: argparse.Namespace, tables: Sequence[Table], notes: Sequence[str], others: _machine.OtherLoad
) -> Report:
    sizes, seconds, _ = checked(arguments)
    return Report(
        name=name,
        command="",
        date=datetime.date.today().isoformat(),
        hardware=_machine.hardware(),
        versions=_machine.versions(PACKAGES),
        settings={
            "shapes": arguments.shapes,
            **{field: getattr(sizes, field) for field in ("num_layers", "num_q_heads", "num_kv_heads", "head_dim")},
            "dtype": "bfloat16",
            "layers_of_a_program": sizes.chained,
            "seconds_per_row": seconds,
            "page_bytes": page_bytes(),
            "copy_bytes": sizes.copy_bytes,
            "other_programs_cpu_share": round(others.share(), 3),
        },
        tables=tuple(tables),
        notes=(*notes, *_NOTES),
    )


_NOTES = (
    "Times are of one layer: a program reads several layers, programs follow each other without a pause, and the host "
    "waits for the last one. p10, p90: of these measurements; a measurement is of several programs if one is short.",
    "jax_vattention reads a KVCacheManager's cache, whose pages are mapped one by one; its K and V were written by "
    "append. The others read arrays of their own, of the same lengths.",
)

TIME_COLUMNS = (
    Column("us", "µs", ".1f"),
    Column("p10_us", "p10", ".1f"),
    Column("p90_us", "p90", ".1f"),
)


def times(timing: Timing) -> dict[str, Any]:
    return {
        "us": timing.median * 1e6,
        "p10_us": timing.quantile(0.1) * 1e6,
        "p90_us": timing.quantile(0.9) * 1e6,
        "measurements": len(timing.seconds),
    }


def compare(
    works: Sequence[Work],
    arguments: argparse.Namespace,
    alternatives: Mapping[str, Alternative],
    rate: Callable[[Work, float], dict[str, float]],
    *,
    kv_dtypes: Sequence[str] = ("bfloat16",),
    also: Mapping[str, Reader] | None = None,
) -> list[dict[str, Any]]:
    """A row for each of `works` and each implementation: this package's in each layout, and those of others.

    Args:
      rate: figures of a work that took so many seconds.
      kv_dtypes: of the cache that this package reads.
      also: other ways to read the bfloat16 cache.
    """
    sizes, seconds, names = checked(arguments)
    limit = Limit(arguments.limit)
    rows = []
    for work in works:
        ours: dict[str, Outcome] = {}
        for kv_dtype, layout in itertools.product(kv_dtypes, arguments.layouts):
            plain = kv_dtype == "bfloat16"
            extra = also if plain else None
            found = time_ours(
                work, {"": slice(None)}, sizes, layout, names, seconds, kv_dtype=kv_dtype, also=extra, limit=limit
            )
            what = layout if plain else f"{layout}, {kv_dtype}"
            ours |= {f"jax_vattention {name}, {what}": outcomes[""] for name, outcomes in found.items()}
        others: dict[str, Outcome] = {}
        for name in arguments.against:
            others[name] = limit.attempt(functools.partial(alternatives[name], work, sizes, seconds))
            say(work.name, name, others[name])
        first = next((outcome.timing.median for outcome in ours.values() if outcome.timing), None)
        rows += [_row(work, name, outcome, first, rate) for name, outcome in (ours | others).items()]
    return rows


def _row(
    work: Work, name: str, outcome: Outcome, first: float | None, rate: Callable[[Work, float], dict[str, float]]
) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": work.name, "implementation": name, "layers": outcome.layers, "note": outcome.error}
    if outcome.timing is not None:
        # A rate counts bytes of bfloat16.
        row |= times(outcome.timing) | rate(work, outcome.timing.median / outcome.kv_bytes)
        row["against_ours"] = None if first is None else outcome.timing.median / first
    return row


def say(work: str, name: str, outcome: Outcome) -> None:
    """A line for whoever waits, and for a run that is stopped half-way."""
    found = f"{outcome.timing.median * 1e6:.1f} µs a layer" if outcome.timing else outcome.error
    print(f"{work}: {name}: {found}", file=sys.stderr, flush=True)


# This package


def time_ours(
    work: Work,
    parts: Mapping[str, slice],
    sizes: Sizes,
    layout: Layout,
    names: Sequence[str],
    seconds: float,
    *,
    kv_dtype: str = "bfloat16",
    also: Mapping[str, Reader] | None = None,
    limit: Limit | None = None,
) -> dict[str, dict[str, Outcome]]:
    """Fills a cache for `work` and times calls of attention over parts of its requests, for each implementation."""
    readers: dict[str, Reader] = {name: functools.partial(_reader, name) for name in names}
    readers |= also or {}
    limit = limit or Limit(None)
    found: dict[str, dict[str, Outcome]] = {name: {} for name in readers}

    def fill_and_time() -> Outcome:
        with manager_for(work, sizes, layout, kv_dtype) as manager, futures.ThreadPoolExecutor() as pool:
            works = {part: work.part(which) for part, which in parts.items()}
            arguments = _abstract(manager, works, sizes)
            # All at once, while the cache is filled: a machine with a GPU is there to measure, not to compile.
            programs = {
                (name, part): pool.submit(_compiled, reader(works[part]), sizes.layers, arguments[part])
                for name, reader in readers.items()
                for part in parts
            }
            slots = fill(manager, work.kv_lens, sizes.layers)
            futures.wait(programs.values())
            for (name, part), program in programs.items():
                action = functools.partial(_time, program, manager, works[part], slots[parts[part]], sizes, seconds)
                found[name][part] = limit.attempt(action)
                say(work.name, f"{name}, {layout} {part}".rstrip(), found[name][part])
        return Outcome(None)

    # Most likely too little memory, if anything: other rows need less.
    failure = limit.attempt(fill_and_time)
    if failure.error:
        say(work.name, layout, failure)
    return {name: {part: outcomes.get(part, failure) for part in parts} for name, outcomes in found.items()}


def page_bytes() -> tuple[int, ...]:
    """Of a cache that is measured, the smallest first. Large ones, for mapping them costs per page."""
    return (2 * _MIB, 8 * _MIB, 64 * _MIB) if jax.default_backend() == "gpu" else (2 * _MIB,)


def manager_for(work: Work, sizes: Sizes, layout: Layout, kv_dtype: str = "bfloat16") -> KVCacheManager:
    """Of a cache with room for `work`."""
    smallest, *large = page_bytes()
    spec = KVCacheSpec(
        num_layers=sizes.num_layers,
        num_kv_heads=sizes.num_kv_heads,
        head_dim=sizes.head_dim,
        num_slots=len(work.kv_lens),
        max_seq_len=max(work.kv_lens),
        page_bytes=smallest,
        large_page_bytes=tuple(large),
        layout=layout,
        dtype=kv_dtype,
    )
    needed = sum(spec.pages_for(length) for length in work.kv_lens) * smallest
    # A large page may reach a little beyond the need.
    return KVCacheManager(
        spec, pool_bytes=needed + needed // 32 + (large or [smallest])[-1], background=False, zero_pages=False
    )


def fill(manager: KVCacheManager, kv_lens: Sequence[int], layers: tuple[int, ...]) -> list[int]:
    """Takes a slot for each length and writes random K and V to it; returns the slots."""
    slots = [manager.allocate(length) for length in kv_lens]
    lengths = dict(zip(slots, kv_lens, strict=True))
    total = sum(kv_lens)
    size = min(total, _FILL_TOKENS)
    rows = np.repeat(np.asarray(slots, np.int32), kv_lens)
    positions = np.concatenate([np.arange(length, dtype=np.int32) for length in kv_lens])
    for first in range(0, total, size):
        # The last tokens once more, with others, if they are fewer than a program takes.
        part = slice(min(first, total - size), min(first, total - size) + size)
        cache = manager.step(lengths)
        kv = random_arrays(len(layers), (size, 2, *cache.views[0][0].shape[-2:]), seed=first)
        order = _append()(cache, kv, rows[part], positions[part], layers=layers)
        del cache
        manager.finish(order)
    return slots


@functools.cache
def _append() -> Callable[..., jax.Array]:
    return jax.jit(append_all, static_argnames=("layers",), compiler_options=compiler_options())


def append_all(
    cache: KVCache, kv: Sequence[jax.Array], slots: jax.Array, positions: jax.Array, *, layers: Sequence[int]
) -> jax.Array:
    """The program that fills: K and V `[tokens, 2, heads, dim]` of each of `layers`. Returns the order token."""
    for layer, each in zip(layers, kv, strict=True):
        cache = cache.append(each, layer=layer, slots=slots, positions=positions)
    return cache.order


def compiler_options() -> dict[str, Any] | None:
    """For `jax.jit` of a program that takes a cache."""
    return dict(GPU_COMPILER_OPTIONS) if jax.default_backend() == "gpu" else None


def _reader(name: str, work: Work) -> Program:
    del work  # any
    return functools.partial(attend, implementation=name)


def _abstract(manager: KVCacheManager, works: Mapping[str, Work], sizes: Sizes) -> dict[str, Any]:
    """What a program takes for each of `works`, without the arrays: an error that compiling raises keeps none alive."""
    cache = manager.step({})
    arguments = {}
    for name, work in works.items():
        queries = jax.ShapeDtypeStruct((work.num_queries, sizes.num_q_heads, sizes.head_dim), jnp.bfloat16)
        arguments[name] = (queries,) * sizes.chained, cache, work.batch(range(len(work.q_lens)))
    abstract = jax.tree.map(lambda each: jax.ShapeDtypeStruct(each.shape, each.dtype), arguments)
    manager.finish(cache)
    return abstract


def _compiled(program: Program, layers: Sequence[int], arguments: Any) -> jax.stages.Compiled:
    jitted = jax.jit(functools.partial(program, layers=layers), compiler_options=compiler_options())
    return jitted.lower(*arguments).compile()


def _time(
    compiled: futures.Future[jax.stages.Compiled],
    manager: KVCacheManager,
    work: Work,
    slots: Sequence[int],
    sizes: Sizes,
    seconds: float,
) -> Outcome:
    """Times a program over slots that have been filled; raises what compiling it raised."""
    program = compiled.result()
    batch = work.batch(slots)
    queries = random_arrays(sizes.chained, (work.num_queries, sizes.num_q_heads, sizes.head_dim), seed=1)
    cache = manager.step({})
    timing = back_to_back(lambda: program(queries, cache, batch), jax.block_until_ready, seconds=seconds)
    manager.finish(program(queries, cache, batch)[1])
    return Outcome(timing.divided(sizes.chained), sizes.chained, kv_bytes=cache.spec.dtype.itemsize / 2)


def attend(
    queries: Sequence[jax.Array], cache: KVCache, batch: RaggedBatch, *, layers: Sequence[int], implementation: str
) -> tuple[list[jax.Array], jax.Array]:
    """The program that is timed: one layer after the other, as the order token has it. Returns all results."""
    results: list[jax.Array] = []
    for layer, q in zip(layers, queries, strict=True):
        q = after(q, results)
        out, cache = attention(q, cache, layer=layer, batch=batch, implementation=implementation)
        results.append(out)
    return results, cache.order


def attend_through(
    kernel: Callable[..., tuple[jax.Array, jax.Array]],
    queries: Sequence[jax.Array],
    cache: KVCache,
    batch: RaggedBatch,
    *,
    layers: Sequence[int],
) -> tuple[list[jax.Array], jax.Array]:
    """As `attend`, through the `run` of one kernel, with options that `attention` does not have."""
    # Traced and lowered once, not for each layer.
    kernel = jax.jit(functools.partial(kernel, scale=queries[0].shape[-1] ** -0.5))
    results: list[jax.Array] = []
    order = cache.order
    for layer, q in zip(layers, queries, strict=True):
        out, order = kernel(after(q, results), cache.layer_view(layer), order, batch, Features())
        results.append(out)
    return results, order


def after(q: jax.Array, results: list[jax.Array]) -> jax.Array:
    """`q`, but only once the last of `results` is known, as in a model: layers do not run or finish together."""
    if results:
        q, results[-1] = lax.optimization_barrier((q, results[-1]))
    return q


@functools.partial(jax.jit, static_argnames=("shape",))
def _normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    return jax.random.normal(key, shape, jnp.bfloat16)


def random_arrays(count: int, shape: tuple[int, ...], *, seed: int) -> tuple[jax.Array, ...]:
    """Normally distributed bfloat16 arrays, made on the device one at a time."""
    return tuple(_normal(key, shape) for key in jax.random.split(jax.random.key(seed), count))
