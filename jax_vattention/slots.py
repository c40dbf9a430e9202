"""The slots of a cache: what state each is in, and which pages lie behind it. Bookkeeping only."""

from __future__ import annotations

import enum
from collections.abc import Iterable

import numpy as np

from jax_vattention.extent import Extent, Ranges
from jax_vattention.spec import KVCacheSpec, KVGroup

Pieces = list[tuple[int, int, Ranges]]
"""Pages of slots: `(group, slot, ranges)`, the ranges as `Extent` has them."""


class SlotState(enum.IntEnum):
    """Life of a slot: idle, live, retired, parked, and live or idle again."""

    IDLE = 0
    """No request, no pages."""
    LIVE = 1
    """A request has it."""
    RETIRED = 2
    """Freed; a program that was handed out before may still use its pages."""
    PARKED = 3
    """No request, but pages, for the next one to take over."""


class SlotTable:
    """What is known of every slot. Arrays are `[num_slots]`.

    Pages of a slot are attached (mapped, or being mapped) and, from its start, granted (programs are told of them).
    What is attached and not granted is spare: no program touches it, so it can be taken away at any time.
    """

    def __init__(self, spec: KVCacheSpec, share: float):
        self.spec = spec
        self.groups = spec.kv_groups
        spans = (1, *(size // spec.page_bytes for size in spec.large_page_bytes))
        slots = spec.num_slots
        self.state = np.zeros(slots, np.int8)
        self.lens = np.zeros(slots, np.int32)
        """Tokens that `step` was asked for."""
        self.growth = np.zeros(slots, np.int32)
        """Tokens that the last step which added any added."""
        self.goal = np.zeros(slots, np.int32)
        """Tokens that are expected to be needed next."""
        self.expected = np.zeros(slots, np.int32)
        """Tokens that the request is expected to reach."""
        self.granted = np.zeros(slots, np.int32)
        """Tokens that programs may touch."""
        self.attached = np.zeros(slots, np.int32)
        """Tokens with pages behind them in all groups, granted or spare."""
        self.reach = np.zeros(slots, np.int32)
        """Tokens with pages behind them in any group."""
        self.sure = np.zeros(slots, np.int32)
        """Of `attached`, those whose pages are mapped already."""
        self.dirty = np.zeros(slots, np.int32)
        """Tokens that earlier requests may have written; zeroed before the next one sees them."""
        self.pages = np.zeros(slots, np.int64)
        """Attached smallest pages, in all planes of all groups."""
        self.pages_granted = np.zeros(slots, np.int64)
        self.leaving = np.zeros(slots, np.int64)
        """Pages that were given up for good and are not unmapped yet."""
        self.ticket = np.zeros(slots, np.int64)
        """The last work of the mapper on it."""
        self.zeroed = np.zeros(slots, np.int64)
        """The last zeroing of it: no page is granted before it is over."""
        self.epoch = np.zeros(slots, np.int64)
        """When it was retired: programs up to this one may use it."""
        self.parked_at = np.zeros(slots, np.int64)
        """Counts up: which was parked longest."""
        self.extents = [[Extent(spans, share) for _ in self.groups] for _ in range(slots)]
        self.mapped = [np.zeros((2, slots), np.int32) for _ in self.groups]
        """For each group: the first token that programs may touch, and one past the last."""
        self.changed = [True] * len(self.groups)
        """Which of `mapped` changed since `take_changes`."""

    def where(self, state: SlotState) -> np.ndarray:
        """Slots in a state, ascending."""
        return np.flatnonzero(self.state == state)

    def plan(self, slot: int, tokens: int, *, smallest: bool = False) -> Pieces:
        """Pages that a slot lacks for this many tokens."""
        pieces: Pieces = []
        for g, group in enumerate(self.groups):
            extent = self.extents[slot][g]
            ranges = extent.plan(group.pages_for(tokens), group.slot_pages, smallest=smallest)
            if ranges:
                pieces.append((g, slot, ranges))
        return pieces

    def attach(self, pieces: Pieces) -> None:
        """Takes pages in."""
        for g, slot, ranges in pieces:
            self.extents[slot][g].add(ranges)
        self._recount(slot for _, slot, _ in pieces)

    def detach(self, pieces: Pieces) -> None:
        """Undoes `attach`."""
        for g, slot, ranges in pieces:
            self.extents[slot][g].cut_tail(ranges[0][0])
        self._recount(slot for _, slot, _ in pieces)

    def spare(self, slot: int, keep_tokens: int) -> int:
        """Smallest pages that `cut_tail` could give up."""
        extents = zip(self.extents[slot], self.groups, strict=True)
        return sum(extent.spare(group.pages_for(keep_tokens)) * group.planes for extent, group in extents)

    def cut_tail(self, slot: int, keep_tokens: int, most: int | None = None) -> Pieces:
        """Gives up pages that lie wholly behind `keep_tokens` tokens: all, or about `most` of them."""
        pieces: Pieces = []
        for g, group in enumerate(self.groups):
            left = None if most is None else -(-max(0, most - self.count(pieces)) // group.planes)
            ranges = self.extents[slot][g].cut_tail(group.pages_for(keep_tokens), left)
            if ranges:
                pieces.append((g, slot, ranges))
        self._recount([slot])
        return pieces

    def put_back(self, pieces: Pieces) -> None:
        """Undoes `cut_tail`."""
        for g, slot, ranges in pieces:
            self.extents[slot][g].add(ranges[::-1])
        self._recount(slot for _, slot, _ in pieces)

    def cut_head(self, slot: int, g: int, token: int) -> Pieces:
        """Gives up the pages of a group that lie wholly before a token."""
        ranges = self.extents[slot][g].cut_head(self.groups[g].pages_before(token))
        self._recount([slot])
        self._show(slot)
        return [(g, slot, ranges)] if ranges else []

    def without_start(self, slot: int) -> Pieces:
        """Gives up groups whose first pages are gone: the next request could not use what is left."""
        pieces: Pieces = []
        for g, extent in enumerate(self.extents[slot]):
            if extent.first:
                ranges = extent.cut_tail(extent.first)
                pieces += [(g, slot, ranges)] if ranges else []
                extent.first = extent.end = 0
        self._recount([slot])
        return pieces

    def leave(self, pieces: Pieces) -> None:
        """Counts pages that were given up: their slots cannot be given out before they have left."""
        for piece in pieces:
            self.leaving[piece[1]] += self.count([piece])

    def left(self, pieces: Pieces, *, spare: bool) -> None:
        """Pages are unmapped."""
        for piece in pieces:
            slot = piece[1]
            if not spare:
                self.leaving[slot] -= self.count([piece])
            if not self.pages[slot]:
                self.dirty[slot] = 0  # and with them what was written

    def grant(self, slot: int, tokens: int) -> None:
        """Lets programs touch what the pages of this many tokens hold."""
        granted = self.spec.max_seq_len
        pages = 0
        for g, group in enumerate(self.groups):
            end = group.pages_for(tokens)
            reach = group.tokens_in(end)
            granted = min(granted, reach)
            pages += (end - min(end, self.extents[slot][g].first)) * group.planes
        self.granted[slot] = granted
        self.pages_granted[slot] = pages
        self._show(slot)

    def written(self, slot: int, tokens: int) -> Pieces:
        """Pages that hold any of the first `tokens` tokens of a slot."""
        pieces: Pieces = []
        for g, group in enumerate(self.groups):
            extent = self.extents[slot][g]
            end = min(group.pages_for(tokens), extent.end)
            if end > extent.first:
                pieces.append((g, slot, [(extent.first, end - extent.first, 1)]))
        return pieces

    def count(self, pieces: Pieces) -> int:
        """Smallest pages, in all planes."""
        return sum(count * span * self.groups[g].planes for g, _, ranges in pieces for _, count, span in ranges)

    def places(self, pieces: Pieces) -> list[tuple[int, Ranges]]:
        """Where pages lie in the buffer of their group: `(group, ranges)`, over all planes."""
        found: dict[int, Ranges] = {}
        for g, slot, ranges in pieces:
            group: KVGroup = self.groups[g]
            start = slot * group.slot_pages
            for plane in range(group.planes):
                base = start + plane * group.plane_pages
                found.setdefault(g, []).extend((base + page, count, span) for page, count, span in ranges)
        return list(found.items())

    def _recount(self, slots: Iterable[int]) -> None:
        for slot in set(slots):
            extents = self.extents[slot]
            self.pages[slot] = sum(
                extent.pages * group.planes for extent, group in zip(extents, self.groups, strict=True)
            )
            reaches = [group.tokens_in(extent.end) for extent, group in zip(extents, self.groups, strict=True)]
            self.attached[slot], self.reach[slot] = min(reaches), max(reaches)
            self.sure[slot] = min(self.sure[slot], self.attached[slot])

    def _show(self, slot: int) -> None:
        """Sets what programs are told of a slot."""
        tokens = int(self.granted[slot])
        for g, group in enumerate(self.groups):
            extent = self.extents[slot][g]
            first = group.first_token_in(extent.first) if tokens else 0
            # Of this group itself: it may hold more tokens than the group that holds fewest.
            last = group.tokens_in(group.pages_for(tokens)) if tokens else 0
            mapped = self.mapped[g]
            if mapped[0, slot] != first or mapped[1, slot] != last:
                mapped[:, slot] = first, last
                self.changed[g] = True
