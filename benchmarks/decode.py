"""Attention of decode steps on a GPU: one query a request over the whole cache, beside other libraries and a copy.

Such attention does little but read K and V once, so its speed is given in bytes of them per second.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import _alternatives, _attention, _ceilings, _machine
from benchmarks._attention import Alternative, Program, Reader, Work
from benchmarks._replay import Trace
from benchmarks._report import Column, Report, Table
from jax_vattention import KVCache, RaggedBatch
from jax_vattention.attention import mosaic_decode
from jax_vattention.attention.decode_split import GRAIN

_TRACE = Path(__file__).parent / "traces" / "azure_llm_2023_conv_sample.csv"
_SEED = 0
_ALTERNATIVES: dict[str, Alternative] = {
    "cudnn": _alternatives.cudnn,
    "torch": _alternatives.torch_sdpa,
    "flashinfer": _alternatives.flashinfer_decode,
}


def works(shapes: str) -> list[Work]:
    """What is measured: requests of one length, and of many."""
    if shapes == "tiny":
        return [_uniform(2, 96), _conversations(8, shrink=32), _one_long(3, 160, 32)]
    uniform = ((1, 131_072), (8, 16_384), (16, 16_384), (64, 4096), (256, 1024))
    return [*(_uniform(*each) for each in uniform), _conversations(128), _one_long(64, 131_072, 1024)]


def _uniform(requests: int, kv_len: int) -> Work:
    return Work.uniform(f"{requests}x{kv_len}", requests, 1, kv_len)


def _conversations(requests: int, shrink: int = 1) -> Work:
    """Requests of the trace, each somewhere in its answer; lengths divided by `shrink`."""
    trace, random = Trace.read(_TRACE), np.random.default_rng(_SEED)
    picked = trace.take(random.choice(len(trace), requests, replace=False))
    lengths = picked.prompt_tokens + random.integers(1, picked.generated_tokens, endpoint=True)
    return Work(f"{requests} of the trace", (1,) * requests, tuple((-(-lengths // shrink)).tolist()))


def _one_long(requests: int, long: int, short: int) -> Work:
    name = f"{long} beside {requests - 1}x{short}"
    return Work(name, (1,) * requests, (long, *[short] * (requests - 1)))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _attention.add_arguments(parser, tuple(_ALTERNATIVES))
    parser.add_argument(
        "--kv-dtypes", nargs="+", choices=("bfloat16", "float8_e4m3fn"), default=["bfloat16", "float8_e4m3fn"],
        help="of the cache that this package reads (default: both)",
    )  # fmt: skip
    parser.add_argument("--paged", action="store_true", help="the Hopper kernel through a block table too")


def attend_paged(
    queries: Sequence[jax.Array], cache: KVCache, batch: RaggedBatch, *, layers: Sequence[int], lengths: Sequence[int]
) -> tuple[list[jax.Array], jax.Array]:
    """As `_attention.attend`, with the Hopper kernel and a block table: the whole pages of each request in no order."""
    random = np.random.default_rng(0)
    table = np.tile(np.arange(-(-max(lengths) // GRAIN), dtype=np.int32), (len(lengths), 1))
    for row, length in zip(table, lengths, strict=True):
        random.shuffle(row[: length // GRAIN])
    kernel = functools.partial(mosaic_decode.run, page_table=jnp.asarray(table))
    return _attention.attend_through(kernel, queries, cache, batch, layers=layers)


def _paged(work: Work) -> Program:
    return functools.partial(attend_paged, lengths=work.kv_lens)


_ALSO: dict[str, Reader] = {f"mosaic through a block table of {GRAIN} tokens": _paged}


def run(arguments: argparse.Namespace) -> Report:
    sizes, seconds, _ = _attention.checked(arguments)
    others = _machine.OtherLoad()
    selected = _attention.chosen(works(arguments.shapes), arguments.only)
    ceilings = _ceilings.copy_rows(sizes, seconds)
    copy = _ceilings.best(ceilings, "gbps")

    def rate(work: Work, seconds: float) -> dict[str, float]:
        gbps = work.num_keys * sizes.token_bytes / seconds / 1e9
        return {"gbps": gbps, "of_copy": gbps / copy, "keys": work.num_keys, "longest": max(work.kv_lens)}

    rows = _attention.compare(
        selected, arguments, _ALTERNATIVES, rate, kv_dtypes=arguments.kv_dtypes, also=_ALSO if arguments.paged else None
    )
    tables = (_ceilings.table(ceilings), Table("Attention of a decode step", _COLUMNS, tuple(rows)))
    return _attention.report("decode", arguments, tables, _NOTES, others)


_COLUMNS = (
    Column("shape", "requests x keys"),
    Column("implementation", "implementation"),
    *_attention.TIME_COLUMNS,
    Column("gbps", "GB/s", ",.0f"),
    Column("of_copy", "of copy", ".3f"),
    Column("against_ours", "time, ours = 1", ".2f"),
    Column("note", "note"),
)
_NOTES = (
    "GB/s: K and V of every request's keys, read once. of copy: as a share of the fastest copy above, whose bytes are "
    "counted as they are read and as they are written.",
    "float8_e4m3fn: K and V in half the bytes, which GB/s counts. through a block table: the same kernel finds every "
    "16 tokens of a request where a table says, in no order within its slot, as a paged cache has them.",
    "ours: the first jax_vattention row of a shape that ran; attention() tries them in that order.",
    f"of the trace: prompt and part of the answer of requests of {_TRACE.name}, drawn with seed {_SEED}.",
    "cudnn: jax.nn.dot_product_attention with lengths as operands. torch: scaled_dot_product_attention with the "
    "backend that it picks, and a mask where lengths differ. Both read arrays padded to the longest request, of fewer "
    "layers where those are large. flashinfer: pages of 16 tokens in random order, on tensor cores; its plan is not "
    "timed.",
)
