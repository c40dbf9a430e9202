"""A picture of a cache at one moment: where each slot has pages, and where the pool's are. Needs the extra `draw`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from jax_vattention.snapshot import SlotSnapshot, Snapshot
from jax_vattention.stats import CacheStats

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
_WIDTH = 10.0  # inches, as all that follows
_AROUND = 2.7  # title, axes, pool and legend
_MOST_ROW, _LEAST_ROW = 0.24, 2 / _DPI
_SLOTS = 5.5  # height of all rows together, if that leaves each row its least
_NARROW = 0.05  # share of the pool below which a part is named in the legend only
_PAGE = 7 / _DPI  # pages that are drawn narrower than this get no line between them
_DENSE = 6 / _DPI  # rows lower than this have no gaps and no lines

_COLOURS = {
    "mapped": "#2563a8",
    "retained: spare, of live slots": "#8dbdea",
    "retained: of parked slots": "#e3a02e",
    "retired": "#b4483f",
    "free: made, idle": "#c4c4be",
    "free: not made": "#ececea",
}
_DARK = ("mapped", "retired")
_REST = {"live": "retained: spare, of live slots", "parked": "retained: of parked slots", "retired": "retired"}
"""For the state of a slot: what its pages are that were not granted."""

_Box = tuple[float, float, float, float]
"""Left, bottom, width, height."""


def load(path: str | os.PathLike[str]) -> Snapshot:
    """Reads a file with what `Snapshot.to_json` returned.

    Raises:
      FileNotFoundError: no such file.
      ValueError: it holds something else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file. Write one with manager.snapshot().to_json()")
    try:
        return Snapshot.from_json(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected a snapshot as manager.snapshot().to_json() writes it: {error}") from error


def save(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Draws a snapshot into a PNG file.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    draw(snapshot).savefig(path, format="png")


def draw(snapshot: Snapshot) -> Figure:
    """A row for each slot that has a request or pages, and a bar for the pool.

    A row is a slot's addresses from its start: its pages are where they are mapped, and larger pages are drawn taller.
    With several groups a row has a lane for each. The black mark is where the slot's tokens end. Retired pages that lie
    behind a window, or are being unmapped, are in the pool's bar only.

    Raises:
      ImportError: matplotlib is not installed.
    """
    rows = max(len(snapshot.slots), 1)
    pitch = max(min(_SLOTS / (rows * len(snapshot.groups)), _MOST_ROW), _LEAST_ROW) * len(snapshot.groups)
    height = max(rows * pitch, 0.6)
    figure = _figure(_WIDTH, height + _AROUND)
    slots, pool = figure.subplots(2, 1, height_ratios=(height, 0.5))
    figure.suptitle(_title(snapshot), fontsize=10, x=0.01, ha="left")
    _draw_slots(slots, snapshot, pitch)
    _draw_pool(pool, snapshot.stats)
    handles, labels = pool.get_legend_handles_labels()
    marks = slots.get_legend_handles_labels()
    figure.legend(handles + marks[0], labels + marks[1], loc="outside lower left", ncols=4, frameon=False, fontsize=8)
    return figure


def _figure(width: float, height: float) -> Figure:
    """Of its own, with the Agg backend: pyplot keeps global state, and may want a display."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] != "matplotlib":
            raise
        raise ImportError(
            "drawing needs the package 'matplotlib', which is not installed: pip install 'jax_vattention[draw]'",
            name=error.name,
        ) from error
    figure = Figure((width, height), dpi=_DPI, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _title(snapshot: Snapshot) -> str:
    stats = snapshot.stats
    idle = stats.slots_total - stats.slots_live - stats.slots_parked - stats.slots_retired
    sizes = ", ".join(_size(size) for size in sorted(stats.pages_by_size))
    taller = " (the larger, the taller)" if len(stats.pages_by_size) > 1 else ""
    lines = [
        f"{stats.slots_total:,} slots: {stats.slots_live:,} live with {stats.tokens_live:,} tokens, "
        f"{stats.slots_parked:,} parked, {stats.slots_retired:,} retired, {idle:,} idle",
        f"pages of {sizes}{taller}; waste {stats.waste:.1%}, fragmentation {stats.fragmentation:.1%}",
    ]
    if len(snapshot.groups) > 1:
        lanes = (
            f"{group.layers} layers" + (f", window {group.window:,}" if group.window else "")
            for group in snapshot.groups
        )
        lines.append("lanes of a slot, from above: " + "; ".join(lanes))
    return "\n".join(lines)


def _draw_slots(axes: Axes, snapshot: Snapshot, pitch: float) -> None:
    rows, lanes = len(snapshot.slots), len(snapshot.groups)
    most = max((_reach(snapshot, slot) for slot in snapshot.slots), default=0) or snapshot.stats.page_bytes
    unit, scale = _unit(most)
    axes.set_xlim(0, most / scale * 1.01)
    axes.set_ylim(max(rows, 1), 0)
    dense = pitch / lanes < _DENSE
    boxes: dict[str, list[_Box]] = {}
    borders: list[tuple[float, float, float]] = []
    for row, slot in enumerate(snapshot.slots):
        for lane in range(lanes):
            for first, count, page, bottom, height in _runs(snapshot, slot, row, lane, dense=dense):
                _split(boxes, snapshot, slot, lane, (first, bottom, count * page, height))
                if not dense and page > most / _WIDTH * _PAGE:
                    borders += [((first + i * page) / scale, bottom, bottom + height) for i in range(count)]
    for kind, found in boxes.items():
        _add_boxes(axes, found, scale, _COLOURS[kind], sharp=dense)
    if borders:
        places, tops, bottoms = zip(*borders, strict=True)
        axes.vlines(places, tops, bottoms, colors="white", linewidth=0.6)
    _mark_tokens(axes, snapshot, scale, 1.0 if dense else 2.0)
    every = -(-rows // max(1, int(rows * pitch / 0.15))) or 1
    numbers = [str(slot.slot) for slot in snapshot.slots[::every]]
    axes.set_yticks([row + 0.5 for row in range(0, rows, every)], numbers, fontsize=7)
    axes.set_ylabel("slot", fontsize=8)
    axes.set_xlabel(f"{unit} from the start of the slot, all planes together", fontsize=8)
    if not snapshot.slots:
        axes.text(0.5, 0.5, "no slot has a request or pages", transform=axes.transAxes, ha="center", va="center")
    _plain(axes)


def _runs(
    snapshot: Snapshot, slot: SlotSnapshot, row: int, lane: int, *, dense: bool
) -> Iterator[tuple[int, int, int, float, float]]:
    """Pages of one size side by side: where they begin, how many of how many bytes; bottom and height."""
    lanes, sizes = len(snapshot.groups), sorted(snapshot.stats.pages_by_size)
    unit = snapshot.stats.page_bytes * snapshot.groups[lane].planes
    for first, count, span in slot.groups[lane].ranges:
        larger = sum(size < span * snapshot.stats.page_bytes for size in sizes)
        height = (1 if dense else 0.45 + 0.45 * (larger + 1) / len(sizes)) / lanes
        middle = (lane + 0.5) / lanes
        if not dense:
            middle = 0.5 + (middle - 0.5) * 0.9  # lanes of one slot lie closer together than slots
            height *= 0.9
        yield first * unit, count, span * unit, row + middle - height / 2, height


def _split(boxes: dict[str, list[_Box]], snapshot: Snapshot, slot: SlotSnapshot, lane: int, box: _Box) -> None:
    """Adds a box to those of its kind; what is granted of it is of another kind than the rest."""
    left, bottom, width, height = box
    granted = slot.groups[lane].granted * snapshot.stats.page_bytes * snapshot.groups[lane].planes
    border = min(max(granted, left), left + width)
    if border > left:
        boxes.setdefault("mapped", []).append((left, bottom, border - left, height))
    if border < left + width:
        kind = _REST.get(slot.state, "retired")
        boxes.setdefault(kind, []).append((border, bottom, left + width - border, height))


def _add_boxes(axes: Axes, boxes: list[_Box], scale: float, colour: str, *, sharp: bool) -> None:
    from matplotlib.collections import PolyCollection

    corners = [
        [(x / scale, y), ((x + width) / scale, y), ((x + width) / scale, y + height), (x / scale, y + height)]
        for x, y, width, height in boxes
    ]
    axes.add_collection(PolyCollection(corners, facecolors=colour, linewidths=0, antialiaseds=not sharp))


def _mark_tokens(axes: Axes, snapshot: Snapshot, scale: float, width: float) -> None:
    lanes = len(snapshot.groups)
    marks = [
        (slot.tokens * group.token_bytes * group.planes / scale, row + lane / lanes)
        for row, slot in enumerate(snapshot.slots)
        for lane, group in enumerate(snapshot.groups)
        if slot.tokens
    ]
    if marks:
        ends, tops = zip(*marks, strict=True)
        axes.vlines(ends, tops, [top + 1 / lanes for top in tops], colors="black", linewidth=width, label="tokens end")


def _draw_pool(axes: Axes, stats: CacheStats) -> None:
    made = min(
        stats.pages_free, sum(size * idle for size, (_, idle) in stats.pages_by_size.items()) // stats.page_bytes
    )
    counts = (
        stats.pages_mapped,
        stats.pages_retained_live,
        stats.pages_retained - stats.pages_retained_live,
        stats.pages_retired,
        made,
        stats.pages_free - made,
    )
    unit, scale = _unit(stats.pages_total * stats.page_bytes)
    start = 0.0
    for (name, colour), pages in zip(_COLOURS.items(), counts, strict=True):
        text = _size(pages * stats.page_bytes)
        size = pages * stats.page_bytes / scale
        axes.barh([0], [size], 0.8, left=start, color=colour, label=f"{name} ({text})")
        if pages >= _NARROW * stats.pages_total:
            dark = "white" if name in _DARK else "black"
            axes.text(start + size / 2, 0, text, ha="center", va="center", color=dark, fontsize=8)
        start += size
    axes.set_xlim(0, start)
    axes.set_yticks([0], ["pool"], fontsize=8)
    axes.set_xlabel(unit, fontsize=8)
    _plain(axes)


def _reach(snapshot: Snapshot, slot: SlotSnapshot) -> int:
    """Where the pages or tokens of a slot end, in bytes."""
    ends = [0]
    for group, pages in zip(snapshot.groups, slot.groups, strict=True):
        ends.append(slot.tokens * group.token_bytes * group.planes)
        ends += ((page + count * span) * snapshot.stats.page_bytes * group.planes for page, count, span in pages.ranges)
    return max(ends)


def _unit(most: float) -> tuple[str, float]:
    """In what bytes up to this many are told."""
    for name, size in (("GiB", 2.0**30), ("MiB", 2.0**20)):
        if most >= size:
            return name, size
    return "KiB", 1024.0


def _size(count: int) -> str:
    unit, scale = _unit(count)
    number = count / scale
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"


def _plain(axes: Axes) -> None:
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
