"""Error of attention in bfloat16 against float64, beside that of cuDNN, on ordinary and on hostile inputs."""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _attention, _machine
from benchmarks._attention import Outcome, Sizes
from benchmarks._report import Column, Report, Table
from jax_vattention import KVCacheManager, KVCacheSpec, RaggedBatch
from jax_vattention.spec import Layout

GOAL = 1.5
"""Most of cuDNN's error that ours may be."""

_FLOOR = 1e-6  # errors below are taken for this: some are exactly 0
_LAYER = 1  # of two
_LARGE = 50.0  # standard deviation of large scores
_OFFSET = 100.0  # of values, which else have a standard deviation of 1


class Inputs(NamedTuple):
    """Of one call, bfloat16; K and V of one request after the other."""

    q: np.ndarray  # [sum(q_lens), num_q_heads, head_dim]
    k: np.ndarray  # [sum(kv_lens), num_kv_heads, head_dim]
    v: np.ndarray  # [sum(kv_lens), num_kv_heads, head_dim]


@dataclasses.dataclass(frozen=True)
class Case:
    """Lengths of the requests of one call, and what is done to random inputs."""

    name: str
    q_lens: tuple[int, ...]
    kv_lens: tuple[int, ...]
    change: Callable[[Inputs], Inputs] = lambda inputs: inputs

    @property
    def step(self) -> str:
        """What kind of call it is."""
        return "decode" if max(self.q_lens) == 1 else "prefill"

    def inputs(self, sizes: Sizes) -> Inputs:
        """The same every time."""
        random = np.random.default_rng(0)

        def normal(tokens: int, heads: int) -> np.ndarray:
            return random.standard_normal((tokens, heads, sizes.head_dim), np.float32)

        kv = (normal(sum(self.kv_lens), sizes.num_kv_heads) for _ in range(2))
        changed = self.change(Inputs(normal(sum(self.q_lens), sizes.num_q_heads), *kv))
        return Inputs(*(x.astype(jnp.bfloat16) for x in changed))

    def requests(self) -> list[tuple[slice, slice]]:
        """Of each request its queries and its keys."""
        queries, keys = ([0, *np.cumsum(lens).tolist()] for lens in (self.q_lens, self.kv_lens))
        slices = ([slice(a, b) for a, b in itertools.pairwise(ends)] for ends in (queries, keys))
        return list(zip(*slices, strict=True))


def _equal_keys(inputs: Inputs) -> Inputs:
    return inputs._replace(k=np.broadcast_to(inputs.k[:1], inputs.k.shape))


_CHANGES: dict[str, Callable[[Inputs], Inputs]] = {
    "normal": lambda inputs: inputs,
    "large scores": lambda inputs: inputs._replace(q=inputs.q * _LARGE),
    "equal keys": _equal_keys,
    "values with an offset": lambda inputs: inputs._replace(v=inputs.v + _OFFSET),
}


def cases(shapes: str) -> list[Case]:
    """What is measured, decode and then prefill."""
    lengths = (1, 33, 64, 65) if shapes == "tiny" else (1, 64, 129, 1000, 2049, 4096)
    prompts = (1, 33, 48) if shapes == "tiny" else (1, 64, 129, 600)
    found = []
    for q_lens, kv_lens in (((1,) * len(lengths), lengths), (prompts, prompts)):
        found += [Case(name, q_lens, kv_lens, change) for name, change in _CHANGES.items()]
        found.append(
            Case("one token", (1,) * 4, (1,) * 4) if q_lens[-1] == 1 else Case("one token", (1, 1, 2), (1, 1, 2))
        )
        # A row between others, and the last one.
        q_lens, kv_lens = ((lens[0], 0, *lens[1:], 0) for lens in (q_lens, kv_lens))
        found.append(Case("empty rows", q_lens, kv_lens))
    return found


def exact(case: Case, inputs: Inputs) -> np.ndarray:
    """Attention by its definition, in float64; `[tokens, num_q_heads, head_dim]`."""
    out = np.zeros(inputs.q.shape)
    for queries, keys in case.requests():
        q, k, v = (x.astype(np.float64) for x in (inputs.q[queries], inputs.k[keys], inputs.v[keys]))
        group = q.shape[1] // k.shape[1]
        k, v = (np.repeat(x, group, axis=1) for x in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
        seen = np.arange(len(k)) <= np.arange(len(k) - len(q), len(k))[:, None]
        scores = np.where(seen, scores, -np.inf)
        if len(q):
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[queries] = np.einsum("hqk,khd->qhd", weights / weights.sum(-1, keepdims=True), v)
    return out


def relative_error(case: Case, found: np.ndarray, expected: np.ndarray) -> float:
    """Frobenius norm of the difference as a share of that of `expected`, of the request where it is largest.

    Of each request apart: results of few keys are larger than those of many.
    """
    queries = [queries for queries, _ in case.requests() if queries.stop > queries.start]
    norms = (np.linalg.norm(found[own].astype(np.float64) - expected[own]) for own in queries)
    shares = [norm / np.linalg.norm(expected[own]) for norm, own in zip(norms, queries, strict=True)]
    return float(np.max(shares))  # nan if one is


def ours(case: Case, inputs: Inputs, sizes: Sizes, layout: Layout, name: str) -> np.ndarray:
    """Through a manager's cache, with a row of padding behind the queries, which has to be 0."""
    page_bytes = _attention.page_bytes()[0]
    spec = KVCacheSpec(
        _LAYER + 1,
        sizes.num_kv_heads,
        sizes.head_dim,
        len(case.kv_lens),
        max(case.kv_lens),
        page_bytes=page_bytes,
        layout=layout,
    )
    pages = sum(spec.pages_for(length) for length in case.kv_lens)
    with KVCacheManager(spec, pool_bytes=(pages + 1) * page_bytes, background=False) as manager:
        slots = [manager.allocate() for _ in case.kv_lens]
        lengths = dict(zip(slots, case.kv_lens, strict=True))
        rows, positions = np.repeat(np.asarray(slots, np.int32), case.kv_lens), _positions(case.kv_lens)
        kv = jnp.asarray(np.stack([inputs.k, inputs.v], axis=1))
        cache = manager.step({slot: length for slot, length in lengths.items() if length})
        manager.finish(_append()(cache, (kv,), rows, positions, layers=(_LAYER,)))
        q = jnp.asarray(np.concatenate([inputs.q, inputs.q[:1]]))
        [out], order = _attend()((q,), manager.step({}), _batch(case, slots), layers=(_LAYER,), implementation=name)
        del cache
        manager.finish(order)
        out = np.asarray(out)
    if np.any(out[-1] != 0):
        raise ValueError("expected 0 in the row of a padding token")
    return out[:-1]


def _positions(lens: tuple[int, ...]) -> np.ndarray:
    return np.concatenate([np.arange(length, dtype=np.int32) for length in lens])


def _batch(case: Case, slots: list[int]) -> RaggedBatch:
    starts = [queries.start for queries, _ in case.requests()]
    arrays = (jnp.asarray(x, jnp.int32) for x in (slots, starts, case.q_lens, case.kv_lens))
    return RaggedBatch(*arrays, max_q_len=max(case.q_lens))


@functools.cache
def _append() -> Callable[..., Any]:
    options = _attention.compiler_options()
    return jax.jit(_attention.append_all, static_argnames=("layers",), compiler_options=options)


@functools.cache
def _attend() -> Callable[..., Any]:
    options = _attention.compiler_options()
    return jax.jit(_attention.attend, static_argnames=("layers", "implementation"), compiler_options=options)


def cudnn(case: Case, inputs: Inputs, *, implementation: Any = "cudnn") -> np.ndarray:
    """cuDNN through `jax.nn.dot_product_attention`, on arrays padded with zeros."""
    padded = [
        np.zeros((len(case.q_lens), max(lens), *x.shape[1:]), x.dtype)
        for x, lens in zip(inputs, (case.q_lens, case.kv_lens, case.kv_lens), strict=True)
    ]
    for row, (queries, keys) in enumerate(case.requests()):
        for array, values in zip(padded, (inputs.q[queries], inputs.k[keys], inputs.v[keys]), strict=True):
            array[row, : len(values)] = values
    q_lens, kv_lens = (jnp.asarray(lens, jnp.int32) for lens in (case.q_lens, case.kv_lens))
    # Its causal mask counts from the first key: right for whole prompts, and not needed for one query.
    attend = functools.partial(
        jax.nn.dot_product_attention, is_causal=case.step == "prefill", implementation=implementation
    )
    q, k, v = (jnp.asarray(x) for x in padded)
    out = np.asarray(jax.jit(attend)(q, k, v, query_seq_lengths=q_lens, key_value_seq_lengths=kv_lens))
    return np.concatenate([out[row, :q_len] for row, q_len in enumerate(case.q_lens)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--shapes", choices=_attention.SIZES, default="llama-3-8b", help="tiny also runs on a CPU, to see it run"
    )
    parser.add_argument("--only", nargs="+", metavar="INPUTS", help="only these inputs, by their names in the table")
    _attention.add_choices(parser)
    _attention.add_limit(parser)


def run(arguments: argparse.Namespace) -> Report:
    sizes = _attention.checked_sizes(arguments.shapes)
    chosen = _attention.chosen(cases(arguments.shapes), arguments.only)
    names = arguments.implementations or _attention.default_implementations()
    limit = _attention.Limit(arguments.limit)
    rows = [row for case in chosen for row in _rows(case, sizes, arguments.layouts, names, limit)]
    lengths = {case.step: [*zip(case.q_lens, case.kv_lens, strict=True)] for case in cases(arguments.shapes)}
    return Report(
        name="accuracy",
        command="",
        date=datetime.date.today().isoformat(),
        hardware=_machine.hardware(),
        versions=_machine.versions(_attention.PACKAGES),
        settings={
            "shapes": arguments.shapes,
            **{field: getattr(sizes, field) for field in ("num_q_heads", "num_kv_heads", "head_dim")},
            "dtype": "bfloat16",
            "queries_and_keys_with_empty_rows": lengths,
            "goal": GOAL,
        },
        tables=(Table("Error of attention against float64", _COLUMNS, tuple(rows)),),
        notes=_NOTES,
    )


def _rows(
    case: Case, sizes: Sizes, layouts: list[Layout], names: tuple[str, ...], limit: _attention.Limit
) -> list[dict[str, Any]]:
    inputs = case.inputs(sizes)
    expected = exact(case, inputs)

    def error(action: Callable[[], np.ndarray]) -> tuple[float | None, str]:
        found: list[float] = []

        def measure() -> Outcome:
            found.append(relative_error(case, action(), expected))
            return Outcome(None)

        failure = limit.attempt(measure).error
        return (found[0], "") if found else (None, failure)

    theirs, their_note = error(functools.partial(cudnn, case, inputs))
    rows = []
    for name in names:
        for layout in layouts:
            mine, note = error(functools.partial(ours, case, inputs, sizes, layout, name))
            row = {"inputs": case.name, "step": case.step, "implementation": f"{name}, {layout}"}
            row |= {"error": mine, "cudnn_error": theirs, "note": note or (their_note and f"cudnn: {their_note}")}
            if mine is not None and theirs is not None:
                row["ratio"] = max(mine, _FLOOR) / max(theirs, _FLOOR)
                row["within"] = "yes" if row["ratio"] <= GOAL else "no"
            rows.append(row)
    return rows


_COLUMNS = (
    Column("inputs", "inputs"),
    Column("step", "step"),
    Column("implementation", "implementation"),
    Column("error", "error", ".2e"),
    Column("cudnn_error", "of cudnn", ".2e"),
    Column("ratio", "ratio", ".2f"),
    Column("within", f"at most {GOAL}"),
    Column("note", "note"),
)
_NOTES = (
    "error: Frobenius norm of the difference to attention in float64 on the same bfloat16 inputs, as a share of the "
    "norm of that, of the request where it is largest. Rounding the result to bfloat16 alone gives about 1.7e-03. nan: "
    "some result was not a number.",
    f"ratio: error / that of cudnn, both at least {_FLOOR:.0e}. cudnn: jax.nn.dot_product_attention on arrays padded "
    "with zeros, with lengths as operands.",
    f"large scores: of a standard deviation of {_LARGE:.0f}. equal keys: all keys of all requests are the same. values "
    f"with an offset: of {_OFFSET:.0f}. one token: requests of 1 or 2. empty rows: some requests have no queries.",
)
