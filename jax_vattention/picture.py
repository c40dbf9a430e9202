"""A picture of a cache at one moment: what each slot holds, and where the pool's pages are. Needs the extra `draw`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_vattention.stats import SlotSnapshot, Snapshot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_DPI = 120
_MIB = 2**20
_FEWEST_BARS = 8  # room for so many: a single slot is not as wide as the picture
_MOST_LABELS = 40  # slot numbers below the bars
_NARROW = 0.04  # share of the pool below which a part is named in the legend only

_COLOURS = {
    "live, granted": "#2563a8",
    "live, spare": "#9cc3e8",
    "parked": "#e3a02e",
    "retired": "#b4483f",
    "free": "#e9e9e6",
}
_KINDS = {"int": int, "float": (int, float), "str": str}


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
        snapshot = Snapshot.from_json(path.read_text(encoding="utf-8"))
        records: list[Any] = [snapshot.stats, *snapshot.slots]
        for record in records:
            for field in dataclasses.fields(record):
                value = getattr(record, field.name)
                kind: Any = _KINDS.get(str(field.type), object)
                if not isinstance(value, kind):
                    raise ValueError(f"{field.name}: expected {field.type}, got {value!r}")
    except ValueError as error:
        raise ValueError(f"{path}: no snapshot as manager.snapshot().to_json() writes it: {error}") from error
    return snapshot


def save(snapshot: Snapshot, path: str | os.PathLike[str]) -> None:
    """Draws a snapshot into a PNG file.

    Raises:
      ImportError: matplotlib is not installed.
      OSError: the file cannot be written.
    """
    draw(snapshot).savefig(path, format="png")


def draw(snapshot: Snapshot) -> Figure:
    """A bar for each slot that has a request or pages, and one for the pool, in MiB.

    A slot's bar ends where its pages do; the black mark is where its tokens do. Tokens are turned into bytes with the
    mean of the live slots. That is exact but for caches with windows, whose slots have given pages back.

    Raises:
      ImportError: matplotlib is not installed.
    """
    figure = _figure(min(max(8.0, 0.11 * len(snapshot.slots)), 24.0), 6.0)
    slots, pool = figure.subplots(2, 1, height_ratios=(5, 1))
    _draw_slots(slots, snapshot)
    _draw_pool(pool, snapshot)
    handles, labels = pool.get_legend_handles_labels()
    marks = slots.get_legend_handles_labels()
    figure.legend(handles + marks[0], labels + marks[1], loc="outside lower center", ncols=6, frameon=False, fontsize=8)
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


def _draw_slots(axes: Axes, snapshot: Snapshot) -> None:
    stats, slots = snapshot.stats, snapshot.slots
    page = stats.page_bytes / _MIB
    places = range(len(slots))
    granted = [slot.pages_granted * page for slot in slots]
    others = [(slot.pages - slot.pages_granted) * page for slot in slots]
    axes.bar(places, granted, 0.8, color=_COLOURS["live, granted"])
    axes.bar(places, others, 0.8, bottom=granted, color=[_COLOURS[_colour(slot)] for slot in slots])
    if stats.tokens_live:
        token = stats.needed_bytes / stats.tokens_live / _MIB
        marked = [place for place in places if slots[place].tokens]
        ends = [slots[place].tokens * token for place in marked]
        starts, stops = [place - 0.4 for place in marked], [place + 0.4 for place in marked]
        axes.hlines(ends, starts, stops, colors="black", linewidth=1.5, label="tokens end here")
    every = -(-len(slots) // _MOST_LABELS) or 1
    axes.set_xticks([*places][::every], [str(slot.slot) for slot in slots[::every]], fontsize=8)
    axes.set_xlim(-0.6, max(len(slots), _FEWEST_BARS) - 0.4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("slot")
    axes.set_ylabel("MiB")
    axes.set_title(
        f"{stats.slots_live} live, {stats.slots_parked} parked, {stats.slots_retired} retired of {stats.slots_total} "
        f"slots; {stats.tokens_live:,} tokens; waste {stats.waste:.1%}; pages of {_sizes(stats.pages_by_size)}",
        fontsize=10,
        loc="left",
    )
    _plain(axes)


def _draw_pool(axes: Axes, snapshot: Snapshot) -> None:
    stats = snapshot.stats
    parts = {
        "live, granted": ("mapped (live)", stats.pages_mapped),
        "live, spare": ("retained (live, spare)", stats.pages_retained_live),
        "parked": ("retained (parked)", stats.pages_retained - stats.pages_retained_live),
        "retired": ("retired", stats.pages_retired),
        "free": ("free", stats.pages_free),
    }
    start = 0.0
    for kind, (name, pages) in parts.items():
        size = pages * stats.page_bytes / _MIB
        axes.barh([0], [size], 0.8, left=start, color=_COLOURS[kind], label=name)
        if pages >= _NARROW * stats.pages_total:
            colour = "white" if kind in ("live, granted", "retired") else "black"
            axes.text(start + size / 2, 0, f"{size:,.1f}", ha="center", va="center", color=colour, fontsize=8)
        start += size
    axes.set_xlim(0, max(start, stats.page_bytes / _MIB))
    axes.set_yticks([])
    axes.set_xlabel(f"pool of {stats.pages_total:,} smallest pages, MiB")
    _plain(axes)


def _colour(slot: SlotSnapshot) -> str:
    """Of the pages that it was not granted."""
    return {"live": "live, spare", "retired": "retired"}.get(slot.state, "parked")


def _sizes(pages_by_size: dict[int, tuple[int, int]]) -> str:
    sizes = [f"{size / _MIB:g} MiB" if size >= _MIB else f"{size / 1024:g} KiB" for size in sorted(pages_by_size)]
    return " and ".join(sizes)


def _plain(axes: Axes) -> None:
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
