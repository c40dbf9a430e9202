"""Attention of a prefill chunk and of decodes on a GPU: all in one call, as a server with chunked prefill needs it,
beside a call for each.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from benchmarks import _attention, _machine
from benchmarks._attention import Outcome, Program, Reader, Work
from benchmarks._report import Column, Report, Table
from jax_vattention.attention import pallas_mosaic

_PARTS = {"mixed": slice(None), "chunk": slice(0, 1), "decodes": slice(1, None)}


def works(shapes: str) -> list[Work]:
    """What is measured: one chunk, and decodes beside it."""
    if shapes == "tiny":
        return [_mixed(16, 0, 3, 32), _mixed(16, 32, 3, 32)]
    return [_mixed(2048, 0, 64, 4096), _mixed(2048, 30_720, 64, 4096), _mixed(512, 4096, 64, 4096)]


def _mixed(chunk: int, offset: int, decodes: int, kv_len: int) -> Work:
    name = f"{chunk} at {offset}, {decodes}x{kv_len}"
    return Work(name, (chunk, *[1] * decodes), (offset + chunk, *[kv_len] * decodes))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    _attention.add_arguments(parser)


def _two_kernels(work: Work) -> Program:
    """The parts alone go through the kernels that are made for them anyway."""
    if min(work.q_lens) == 1 < max(work.q_lens):
        return functools.partial(_attention.attend_through, pallas_mosaic.HOPPER.run_both)
    return functools.partial(_attention.attend, implementation="mosaic")


_ALSO: dict[str, Reader] = {"mosaic in two kernels": _two_kernels}


def run(arguments: argparse.Namespace) -> Report:
    sizes, seconds, names = _attention.checked(arguments)
    others = _machine.OtherLoad()
    rows, limit = [], _attention.Limit(arguments.limit)
    for work in _attention.chosen(works(arguments.shapes), arguments.only):
        for layout in arguments.layouts:
            found = _attention.time_ours(
                work, _PARTS, sizes, layout, names, seconds, also=_ALSO if "mosaic" in names else None, limit=limit
            )
            rows += [_row(work, f"{name}, {layout}", outcomes) for name, outcomes in found.items()]
    table = Table("A prefill chunk and decodes, µs of one layer", _COLUMNS, tuple(rows))
    return _attention.report("mixed", arguments, (table,), _NOTES, others)


def _row(work: Work, implementation: str, outcomes: dict[str, Outcome]) -> dict[str, Any]:
    row: dict[str, Any] = {"shape": work.name, "implementation": implementation}
    row["note"] = "; ".join(dict.fromkeys(outcome.error for outcome in outcomes.values() if outcome.error))
    for part, outcome in outcomes.items():
        if outcome.timing is not None:
            row |= {f"{part}_{key}": value for key, value in _attention.times(outcome.timing).items()}
    if all(outcome.timing for outcome in outcomes.values()):
        row["larger_us"] = max(row["chunk_us"], row["decodes_us"])
        row["ratio"] = row["mixed_us"] / row["larger_us"]
        row["of_sum"] = row["mixed_us"] / (row["chunk_us"] + row["decodes_us"])
    return row


_COLUMNS = (
    Column("shape", "chunk, decodes"),
    Column("implementation", "implementation"),
    Column("mixed_us", "mixed", ".1f"),
    Column("mixed_p10_us", "p10", ".1f"),
    Column("mixed_p90_us", "p90", ".1f"),
    Column("chunk_us", "chunk alone", ".1f"),
    Column("decodes_us", "decodes alone", ".1f"),
    Column("larger_us", "larger of the two", ".1f"),
    Column("ratio", "mixed / larger", ".2f"),
    Column("of_sum", "mixed / sum", ".2f"),
    Column("note", "note"),
)
_NOTES = (
    "chunk: queries at an offset in their prompt. mixed: both in one call of attention(), with one max_q_len for all, "
    "that of the chunk.",
    "mosaic: one kernel, in which every block decodes and prefills at once. in two kernels: one after the other.",
    "mixed / larger: 1 if the shorter of the two is hidden behind the longer. mixed / sum: above 1 if two calls would "
    "be faster.",
)
