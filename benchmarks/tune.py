"""Tile sizes of the kernels for Hopper GPUs: the time of each candidate, as a share of that of the kernel's defaults.

`--write` makes the fastest ones the rows of `jax_vattention/attention/tilings.json` for this kind of GPU, which the
kernels look up.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import functools
import itertools
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from benchmarks import _attention, _machine, decode, mixed, prefill
from benchmarks._attention import LAYOUTS, Outcome, Sizes, Work
from benchmarks._report import Column, Report, Table
from jax_vattention.attention import decode_shape, mosaic_decode, mosaic_mixed, mosaic_prefill, target, tilings
from jax_vattention.spec import Layout

FILE = Path(tilings.__file__).with_suffix(".json")
_KEY = "kernel", "head_dim", "kv_dtype", "gpu", "layout"
"""What a row is for; without one of the last two it is for all that have no row of their own."""
_LEAST_GAIN = 0.01
"""What a candidate has to be faster by than the defaults: less is noise."""


class Kernel(NamedTuple):
    """What is tuned: the values of each field of its `Tiling` that are tried, and on which shapes."""

    module: ModuleType
    default: Callable[[int, str], Any]
    """Its `Tiling` for a head dim and a dtype of K and V, where nothing was tuned."""
    fields: dict[str, tuple[Any, ...]]
    works: tuple[str, ...]
    head_dims: tuple[int, ...]
    kv_dtypes: tuple[str, ...]
    option: str = "tiling"
    """Of the module's `run`."""
    for_work: Callable[[Any, Work], Any] = lambda tiling, work: tiling
    """A `Tiling` with what depends on the shape, and is not tuned."""

    def candidates(self, default: Any) -> Iterator[dict[str, Any]]:
        """The fields of this default, then all others, those first that differ from it in few.

        One of several that are the same: `mark` and `after` say nothing without `behind`, nor `keys_as_rows` of heads
        that are read together.
        """
        own = {name: getattr(default, name) for name in self.fields}

        def differ(found: dict[str, Any]) -> int:
            return sum(found[name] != own[name] for name in found)

        others = (dict(zip(self.fields, values, strict=True)) for values in itertools.product(*self.fields.values()))
        yield own
        for found in sorted(others, key=differ):
            pace = [name for name in ("mark", "after") if name in found]
            no_marks = found.get("behind") == 0 and any(found[name] != own[name] for name in pace)
            no_columns = found.get("keys_as_rows") and found.get("together", 1) > 1
            if found != own and not (no_marks or no_columns):
                yield found


_MIXED = "2048 at 0, 64x4096", "2048 at 30720, 64x4096"
KERNELS = {
    "mosaic_decode": Kernel(
        mosaic_decode,
        decode_shape.default_tiling,
        {
            "block_k": (64, 128),
            "stages": (2, 3),
            "behind": (0, 1),
            "mark": (2, 4, 8),
            "streams": (1, 2),
            "keys_as_rows": (False, True),
            "together": (1, 8),
            "room": (0, 8),
        },
        ("8x16384", "256x1024", "128 of the trace"),
        (64, 96, 128, 192, 256),
        ("bfloat16", "float8_e4m3fn"),
    ),
    "mosaic_mixed": Kernel(
        mosaic_mixed,
        lambda head_dim, kv_dtype: mosaic_mixed.Tiling(),
        {"stages": (2, 3), "cluster": (1, 2), "keep_keys": (True, False)},
        _MIXED,
        (64, 128),
        ("bfloat16",),
    ),
    "mosaic_mixed_decode": Kernel(
        mosaic_mixed,
        mosaic_mixed.default_decode_tiling,
        {"stages": (2, 3), "behind": (0, 1), "mark": (4, 8), "after": (0.3, 0.9)},
        _MIXED,
        (64, 128),
        ("bfloat16",),
        option="decode_tiling",
    ),
    "mosaic_prefill": Kernel(
        mosaic_prefill,
        lambda head_dim, kv_dtype: mosaic_prefill.Tiling(),
        {
            "block_k": (64, 128),
            "stages": (2, 3),
            "own_out": (True, False),
            "overlap": (True, False),
            "l2_bytes": (2**24, None),
        },
        ("1x8192", "4x4096", "512 at 4096"),
        (64, 128),
        ("bfloat16",),
        for_work=lambda tiling, work: mosaic_prefill.in_clusters(tiling, work.num_queries, len(work.q_lens)),
    ),
}
_WORKS = {work.name: work for module in (decode, mixed, prefill) for work in module.works("llama-3-8b")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--seconds", type=float, default=0.4, metavar="N", help="for each time (default: %(default)s)")
    parser.add_argument("--kernels", nargs="+", choices=KERNELS, default=list(KERNELS), help="default: all")
    parser.add_argument("--head-dims", nargs="+", type=int, metavar="N", help="default: all that a kernel serves")
    parser.add_argument("--kv-dtypes", nargs="+", metavar="DTYPE", help="default: all that a kernel serves")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS), help="default: both")
    parser.add_argument("--write", action="store_true", help=f"replace the rows of what was measured in {FILE.name}")
    _attention.add_limit(parser)


def run(arguments: argparse.Namespace) -> Report:
    _attention.need_gpu()
    sizes = _attention.SIZES["llama-3-8b"]
    others = _machine.OtherLoad()
    limit = _attention.Limit(arguments.limit)
    rows = []
    for name, head_dim, kv_dtype, layout in chosen(arguments):
        # Fewer layers of large heads: the cache of all of them has to fit.
        layers = min(sizes.num_layers, sizes.num_layers * sizes.head_dim // head_dim)
        own_sizes = dataclasses.replace(sizes, head_dim=head_dim, num_layers=layers)
        found = _measured(KERNELS[name], own_sizes, kv_dtype, layout, arguments.seconds, limit)
        what = name, head_dim, kv_dtype, target.kind(), layout
        rows += [dict(zip(_KEY, what, strict=True)) | row for row in compared(found)]
    hardware, versions = _machine.hardware(), _machine.versions(_attention.PACKAGES)
    if arguments.write:
        measured = f"{datetime.date.today().isoformat()}, {hardware.get('gpu', '')}, jax {versions.get('jax', '')}"
        write(FILE, rows, measured)
    return Report(
        name="tune",
        command="",
        date=datetime.date.today().isoformat(),
        hardware=hardware,
        versions=versions,
        settings={"seconds": arguments.seconds, "other_programs_cpu_share": round(others.share(), 3)},
        tables=(Table("Tilings, fastest first", _COLUMNS, tuple(rows)),),
        notes=_NOTES,
    )


def chosen(arguments: argparse.Namespace) -> list[tuple[str, int, str, Layout]]:
    """Kernel, head dim and dtype of K and V, and layout of each row to be."""
    return [
        (name, head_dim, kv_dtype, layout)
        for name in arguments.kernels
        for head_dim in KERNELS[name].head_dims
        for kv_dtype in KERNELS[name].kv_dtypes
        for layout in arguments.layouts
        if head_dim in (arguments.head_dims or [head_dim]) and kv_dtype in (arguments.kv_dtypes or [kv_dtype])
    ]


def _measured(
    kernel: Kernel, sizes: Sizes, kv_dtype: str, layout: Layout, seconds: float, limit: _attention.Limit
) -> list[tuple[dict[str, Any], list[Outcome]]]:
    """Each candidate and its outcome on each shape."""
    default = kernel.default(sizes.head_dim, kv_dtype)
    readers = {
        json.dumps(fields): _reader(kernel, dataclasses.replace(default, **fields))
        for fields in kernel.candidates(default)
    }
    found: dict[str, list[Outcome]] = {name: [] for name in readers}
    for work in kernel.works:
        # What did not run on one shape is not tried on the next.
        running = {name: reader for name, reader in readers.items() if all(each.timing for each in found[name])}
        part = {"": slice(None)}
        outcomes = _attention.time_ours(
            _WORKS[work], part, sizes, layout, (), seconds, kv_dtype=kv_dtype, also=running, limit=limit
        )
        for name in readers:
            found[name].append(outcomes[name][""] if name in running else found[name][-1])
    return [(json.loads(name), outcomes) for name, outcomes in found.items()]


def _reader(kernel: Kernel, tiling: Any) -> _attention.Reader:
    def through(work: Work) -> _attention.Program:
        run = functools.partial(kernel.module.run, **{kernel.option: kernel.for_work(tiling, work)})
        return functools.partial(_attention.attend_through, run)

    return through


def compared(found: Sequence[tuple[dict[str, Any], Sequence[Outcome]]]) -> list[dict[str, Any]]:
    """Rows, the fastest first; those that were not timed on every shape last. The first of `found` are the defaults."""
    defaults = found[0][1]
    rows = []
    for fields, outcomes in found:
        row: dict[str, Any] = {"tiling": json.dumps(fields), "default": outcomes is defaults, "time": None}
        row["note"] = "; ".join(dict.fromkeys(outcome.error for outcome in outcomes if outcome.error))
        if all(each.timing and default.timing for each, default in zip(outcomes, defaults, strict=True)):
            ratios = [
                each.timing.median / default.timing.median for each, default in zip(outcomes, defaults, strict=True)
            ]
            row["time"], row["times"] = statistics.geometric_mean(ratios), ratios
            row["shown"] = " ".join(f"{ratio:.3f}" for ratio in ratios)
        rows.append(row)
    return sorted(rows, key=lambda row: (row["time"] is None, row["time"]))


def write(path: Path, rows: Sequence[dict[str, Any]], measured: str) -> None:
    """Puts the best of `rows` in the place of what `path` says of the same, by `_KEY`.

    What was not timed keeps its row.
    """
    known = json.loads(path.read_text())
    kept = {_key(row): row for row in known["rows"]}
    for key, group in itertools.groupby((row for row in rows if row["time"] is not None), _key):
        timed = list(group)
        best = timed[0] if timed[0]["time"] <= 1 - _LEAST_GAIN else next(row for row in timed if row["default"])
        tiling = {"tiling": json.loads(best["tiling"]), "time": round(best["time"], 3), "measured": measured}
        kept[key] = dict(zip(_KEY, key, strict=True)) | tiling
    lines = ",\n".join(f"  {json.dumps(kept[key])}" for key in sorted(kept))
    path.write_text(f'{{\n "comment": {json.dumps(known["comment"])},\n "rows": [\n{lines}\n ]\n}}\n')


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name, "") for name in _KEY)


_COLUMNS = (
    Column("kernel", "kernel"),
    Column("head_dim", "head dim"),
    Column("kv_dtype", "K and V"),
    Column("layout", "layout"),
    Column("tiling", "tiling"),
    Column("time", "time, defaults = 1", ".3f"),
    Column("shown", "on each shape"),
    Column("note", "note"),
)
_NOTES = (
    "time: geometric mean over the shapes of the kernel; "
    + "; ".join(f"{name}: {', '.join(kernel.works)}" for name, kernel in KERNELS.items())
    + ".",
)
