"""What a benchmark found: printed, written as JSON, and read back as a markdown table."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

_FORMAT = 1  # of the JSON file


class BenchmarkError(Exception):
    """A benchmark cannot run here; the message says what it needs."""


@dataclasses.dataclass(frozen=True)
class Column:
    """One column of a table: the key of its values in a row, and how they are shown."""

    key: str
    title: str
    format: str = ""
    """Format specification as `format()` takes it, for example `.1f`."""

    def show(self, row: dict[str, Any]) -> str:
        """The value of this column in `row`; a dash where there is none."""
        value = row.get(self.key)
        return "-" if value is None else format(value, self.format)


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows of raw numbers (never rounded) and the columns that are shown of them. A row may hold more keys."""

    title: str
    columns: tuple[Column, ...]
    rows: tuple[dict[str, Any], ...]

    def markdown(self) -> str:
        """The table as markdown, its title above it; columns are padded so that it reads well in a terminal too."""
        cells = [[column.title for column in self.columns]]
        cells += [[column.show(row) for column in self.columns] for row in self.rows]
        widths = [max(3, *(len(line[i]) for line in cells)) for i in range(len(self.columns))]
        numeric = [all(_is_number(row.get(column.key)) for row in self.rows) for column in self.columns]
        rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, numeric, strict=True)]

        def line(values: Sequence[str]) -> str:
            padded = (v.rjust(w) if right else v.ljust(w) for v, w, right in zip(values, widths, numeric, strict=True))
            return "| " + " | ".join(padded) + " |"

        return "\n".join([f"**{self.title}**", "", line(cells[0]), line(rule), *map(line, cells[1:])])


@dataclasses.dataclass(frozen=True)
class Report:
    """One run of one benchmark."""

    name: str
    command: str
    """What repeats it, from the root of the repository."""
    date: str
    """Of the run, ISO 8601."""
    hardware: dict[str, str]
    versions: dict[str, str]
    settings: dict[str, Any]
    """Shapes and repetitions."""
    tables: tuple[Table, ...]
    notes: tuple[str, ...] = ()

    def markdown(self) -> str:
        """The tables with what they were measured on, as the README shows them."""
        parts = [table.markdown() for table in self.tables]
        parts += ["\n".join(f"- {note}" for note in self.notes)] if self.notes else []
        where = ", ".join(f"{key} {value}" for key, value in self.hardware.items())
        with_ = ", ".join(f"{package} {version}" for package, version in self.versions.items())
        parts.append(f"Measured {self.date} on {where}; {with_}. Repeat it with `{self.command}`.")
        return "\n\n".join(parts)

    def text(self) -> str:
        """All of it, for a terminal."""
        lines = [f"benchmark {self.name}, {self.date}", f"command   {self.command}"]
        for title, values in (("hardware", self.hardware), ("versions", self.versions), ("settings", self.settings)):
            lines.append(f"{title:9} " + ", ".join(f"{key}={value}" for key, value in values.items()))
        lines += ["", *(table.markdown() + "\n" for table in self.tables), *(f"- {note}" for note in self.notes)]
        return "\n".join(lines)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes the report as JSON."""
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({"format": _FORMAT, **dataclasses.asdict(self)}, indent=1) + "\n")

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> Report:
        """Reads what `write` wrote.

        Raises:
          ValueError: the file is not a report of this format.
        """
        values = json.loads(Path(path).read_text())
        found = values.pop("format", None) if isinstance(values, dict) else None
        if found != _FORMAT:
            raise ValueError(f"{path}: expected a benchmark report of format {_FORMAT}, got {found!r}; run it again")
        tables = tuple(
            Table(table["title"], tuple(Column(**column) for column in table["columns"]), tuple(table["rows"]))
            for table in values.pop("tables")
        )
        return cls(**values | {"tables": tables, "notes": tuple(values["notes"])})


def _is_number(value: Any) -> bool:
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool))
