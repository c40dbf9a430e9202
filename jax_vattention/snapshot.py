"""What each slot of a cache holds at one moment: for a picture, and to be kept as JSON."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from typing import Any

from jax_vattention.slots import SlotState, SlotTable
from jax_vattention.stats import CacheStats


@dataclasses.dataclass(frozen=True)
class GroupShape:
    """A group of layers."""

    layers: int
    """How many."""
    window: int | None
    planes: int
    token_bytes: int
    """Of one token in one plane."""


@dataclasses.dataclass(frozen=True)
class GroupPages:
    """Pages of a slot in one group, counted in smallest pages of one plane from the start of the slot."""

    ranges: tuple[tuple[int, int, int], ...]
    """Attached: `(page, count, span)`, where each of the `count` pages is as large as `span` smallest ones."""
    granted: int
    """One past the last page that programs may touch; 0 if there is none."""


@dataclasses.dataclass(frozen=True)
class SlotSnapshot:
    """One slot. Its pages are counted in smallest pages, in all planes of all groups."""

    slot: int
    state: str
    """idle, live, retired or parked."""
    tokens: int
    """That the last `step` asked for."""
    pages: int
    """Attached."""
    pages_granted: int
    groups: tuple[GroupPages, ...]


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The counts, and all slots that have a request or pages. `jax-vattention draw` makes a picture of it."""

    stats: CacheStats
    groups: tuple[GroupShape, ...]
    slots: tuple[SlotSnapshot, ...]

    def to_json(self) -> str:
        """As one JSON object; `from_json` reads it back."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Snapshot:
        """Reads what `to_json` wrote.

        Raises:
          ValueError: it is something else.
        """
        snapshot = _read(cls, json.loads(text), "snapshot")
        if snapshot.stats.page_bytes not in snapshot.stats.pages_by_size:
            raise ValueError(f"pages_by_size: expected {snapshot.stats.page_bytes} and larger sizes, got none such")
        for slot in snapshot.slots:
            if slot.state not in (state.name.lower() for state in SlotState):
                raise ValueError(f"slot {slot.slot}: expected a state of a slot, got {slot.state!r}")
            if len(slot.groups) != len(snapshot.groups):
                raise ValueError(f"slot {slot.slot}: expected {len(snapshot.groups)} groups, got {len(slot.groups)}")
        return snapshot


def take_snapshot(stats: CacheStats, table: SlotTable) -> Snapshot:
    """Of all slots that have a request or pages."""
    groups = tuple(
        GroupShape(len(group.layers), group.window, group.planes, group.token_bytes) for group in table.groups
    )
    taken = (slot for slot in range(table.spec.num_slots) if table.state[slot] != SlotState.IDLE or table.pages[slot])
    return Snapshot(stats, groups, tuple(_slot_snapshot(table, slot) for slot in taken))


def _slot_snapshot(table: SlotTable, slot: int) -> SlotSnapshot:
    pages = tuple(
        GroupPages(tuple(extent.ranges()), group.pages_for(int(mapped[1, slot])))
        for extent, group, mapped in zip(table.extents[slot], table.groups, table.mapped, strict=True)
    )
    return SlotSnapshot(
        slot,
        SlotState(int(table.state[slot])).name.lower(),
        int(table.lens[slot]),
        int(table.pages[slot]),
        int(table.pages_granted[slot]),
        pages,
    )


def _read(kind: Any, value: Any, name: str) -> Any:
    """A value of JSON as a value of a type of this file, with all that is in it."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if dataclasses.is_dataclass(kind):
        kinds = typing.get_type_hints(kind)
        values = _of(dict, value, name)
        fields = [field.name for field in dataclasses.fields(kind)]
        if values.keys() != set(fields):
            raise ValueError(f"{name}: expected the fields {', '.join(fields)}, got {', '.join(values) or 'none'}")
        return typing.cast(Any, kind)(**{field: _read(kinds[field], values[field], field) for field in fields})
    if origin is types.UnionType:
        return None if value is None else _read(inner[0], value, name)
    if origin is dict:
        values = _of(dict, value, name)
        return {_read(int, int(key), name): _read(inner[1], values[key], name) for key in values}
    if origin is tuple:
        values = _of(list, value, name)
        wanted = [inner[0]] * len(values) if inner[-1] is Ellipsis else inner
        if len(wanted) != len(values):
            raise ValueError(f"{name}: expected {len(wanted)} values, got {value!r}")
        return tuple(_read(each, of, name) for each, of in zip(wanted, values, strict=True))
    return _of(kind, value, name)


def _of(kind: type, value: Any, name: str) -> Any:
    if isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
        raise ValueError(f"{name}: expected {_JSON_NAMES[kind]}, got {str(value)[:60]!r}")
    return value


_JSON_NAMES = {dict: "an object", list: "an array", int: "an integer", float: "a number", str: "a string"}
