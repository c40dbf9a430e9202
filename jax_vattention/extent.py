"""The pages of one slot: which there are, in which sizes, and which to add or to give back. Arithmetic only."""

from __future__ import annotations

from collections.abc import Iterator

Ranges = list[tuple[int, int, int]]
"""Pages side by side, `(page, count, span)`, counted in smallest pages from the start of the slot."""


class Extent:
    """Pages side by side from `first` to `end`, counted in smallest pages of one plane from the start of a slot.

    Args:
      spans: sizes of pages, in smallest pages, ascending from 1.
      share: how far beyond what is needed a larger page may reach, as a share of what is needed.
    """

    __slots__ = ("_runs", "_share", "_spans", "end", "first")

    def __init__(self, spans: tuple[int, ...] = (1,), share: float = 0.0):
        self.first = 0
        self.end = 0
        self._runs: list[list[int]] = []  # [count, span], in order
        self._spans = spans
        self._share = share

    @property
    def pages(self) -> int:
        """Smallest pages."""
        return self.end - self.first

    @property
    def last_span(self) -> int:
        """Size of the last page; 0 if there is none."""
        return self._runs[-1][1] if self._runs else 0

    def ranges(self) -> Ranges:
        """All pages."""
        page, found = self.first, []
        for count, span in self._runs:
            found.append((page, count, span))
            page += count * span
        return found

    def plan(self, end: int, limit: int, *, smallest: bool = False) -> Ranges:
        """Pages to add so that they reach `end`; none beyond `limit`.

        The largest that fit are taken. One may reach beyond `end`, by up to `share` of it: what a request does not
        need stays under a smallest page and this share. With `smallest` only smallest pages are taken.
        """
        page = self.end
        reach = min(end + int(self._share * end), limit)
        found: Ranges = []
        for span in (1,) if smallest else reversed(self._spans):
            count = (end - page) // span
            # One more, if it ends within reach, instead of many smaller ones.
            if count * span < end - page and span > 1 and page + (count + 1) * span <= reach:
                count += 1
            if count > 0:
                found.append((page, count, span))
                page += count * span
        return found

    def add(self, ranges: Ranges) -> None:
        """Takes in what `plan` returned."""
        for _, count, span in ranges:
            if self._runs and self._runs[-1][1] == span:
                self._runs[-1][0] += count
            else:
                self._runs.append([count, span])
            self.end += count * span

    def spare(self, keep: int) -> int:
        """Smallest pages that `cut_tail(keep)` would give up."""
        keep, end, total = max(keep, self.first), self.end, 0
        for count, span in reversed(self._runs):
            taken = min(count, (end - keep) // span)
            if taken > 0:
                total += taken * span
            if taken < count:
                break
            end -= count * span
        return total

    def cut_tail(self, keep: int, most: int | None = None) -> Ranges:
        """Gives up whole pages from the end down to page `keep`; no more smallest pages than `most` and one page."""
        found: Ranges = []
        while self._runs and (most is None or most > 0):
            count, span = self._runs[-1]
            surplus = (self.end - max(keep, self.first)) // span
            taken = min(count, surplus if most is None else min(surplus, -(-most // span)))
            if taken <= 0:
                break
            self.end -= taken * span
            found.append((self.end, taken, span))
            most = None if most is None else most - taken * span
            self._runs[-1][0] -= taken
            if self._runs[-1][0]:
                break
            self._runs.pop()
        return found

    def cut_head(self, until: int) -> Ranges:
        """Gives up whole pages from the start that end at or before page `until`."""
        found: Ranges = []
        while self._runs:
            count, span = self._runs[0]
            taken = min(count, (until - self.first) // span)
            if taken <= 0:
                break
            found.append((self.first, taken, span))
            self.first += taken * span
            self._runs[0][0] -= taken
            if self._runs[0][0]:
                break
            self._runs.pop(0)
        return found

    def spans(self) -> Iterator[tuple[int, int]]:
        """`(span, count)` of all pages."""
        return ((span, count) for count, span in self._runs)
