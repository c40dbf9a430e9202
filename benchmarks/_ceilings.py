"""What the machine can do at best, measured in the same run: copies of memory, and dense matrix products."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks._alternatives import torch_device
from benchmarks._attention import TIME_COLUMNS, Outcome, Sizes, attempt, random_arrays, say, times
from benchmarks._report import BenchmarkError, Column, Table
from benchmarks._timing import back_to_back

_TIMES = 8
"""Operations of one program."""


def copy_rows(sizes: Sizes, seconds: float) -> list[dict[str, Any]]:
    """Bytes read and written per second by copies of a large array, made in several ways."""
    candidates: dict[str, Callable[[Sizes, float], Outcome]] = {
        "elementwise operation of JAX": _jax_elementwise,
        "copy of JAX": _jax_copy,
        "copy_ of torch": _torch_copy,
    }
    rows = []
    for name, time in candidates.items():
        outcome = attempt(functools.partial(time, sizes, seconds))
        say("copy", name, outcome)
        row: dict[str, Any] = {"what": name, "note": outcome.error}
        if outcome.timing is not None:
            row |= times(outcome.timing) | {"gbps": 2 * sizes.copy_bytes / outcome.timing.median / 1e9}
        rows.append(row)
    return rows


def matmul_row(sizes: Sizes, seconds: float) -> dict[str, Any]:
    """Floating-point operations per second of a dense bfloat16 product of random square matrices."""
    size = sizes.matmul_size
    x, w = random_arrays(2, (size, size), seed=2)
    w = w * jnp.bfloat16(size**-0.5)  # so that products of products stay in range
    program = jax.jit(matmul_chain)
    timing = back_to_back(lambda: program(x, w), jax.block_until_ready, seconds=seconds).divided(_TIMES)
    say("matrix product", "JAX", Outcome(timing))
    tflops = 2 * size**3 / timing.median / 1e12
    return {"what": f"bfloat16 product, {size}^3", "tflops": tflops, "note": "", **times(timing)}


def best(rows: Sequence[dict[str, Any]], key: str) -> float:
    """The largest figure of rows some of which may have failed.

    Raises:
      BenchmarkError: all have.
    """
    found = [row[key] for row in rows if row.get(key) is not None]
    if not found:
        raise BenchmarkError(f"no ceiling could be measured: {'; '.join(str(row.get('note')) for row in rows)}")
    return max(found)


def table(rows: Sequence[dict[str, Any]]) -> Table:
    columns = [Column("what", "what"), *TIME_COLUMNS]
    columns += [
        column
        for column in (Column("gbps", "GB/s read and written", ",.0f"), Column("tflops", "TFLOP/s", ",.1f"))
        if any(column.key in row for row in rows)
    ]
    return Table("Ceilings of this machine", (*columns, Column("note", "note")), tuple(rows))


def elementwise_chain(x: jax.Array) -> jax.Array:
    """Passes over a whole array that the compiler cannot join into one."""
    for number in range(_TIMES):
        x = lax.optimization_barrier(x ^ np.uint32(number + 1))
    return x


def matmul_chain(x: jax.Array, w: jax.Array) -> jax.Array:
    for _ in range(_TIMES):
        x = x @ w
    return x


def _to_copy(sizes: Sizes) -> jax.Array:
    return jax.random.bits(jax.random.key(3), (sizes.copy_bytes // 4,), jnp.uint32)


def _jax_elementwise(sizes: Sizes, seconds: float) -> Outcome:
    x, program = _to_copy(sizes), jax.jit(elementwise_chain)
    return Outcome(back_to_back(lambda: program(x), jax.block_until_ready, seconds=seconds).divided(_TIMES))


def _jax_copy(sizes: Sizes, seconds: float) -> Outcome:
    x, program = _to_copy(sizes), jax.jit(jnp.copy)

    def launch() -> jax.Array:
        for _ in range(_TIMES):
            out = program(x)
        return out

    timing = back_to_back(launch, jax.block_until_ready, seconds=seconds, most_launches=2)
    return Outcome(timing.divided(_TIMES))


def _torch_copy(sizes: Sizes, seconds: float) -> Outcome:
    torch, device, wait = torch_device()
    source = torch.randint(0, 2**31 - 1, (sizes.copy_bytes // 4,), dtype=torch.int32, device=device)
    target = torch.empty_like(source)

    def launch() -> None:
        for _ in range(_TIMES):
            target.copy_(source)

    return Outcome(back_to_back(launch, wait, seconds=seconds).divided(_TIMES))
