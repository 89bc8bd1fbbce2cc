"""What a command found, once: rendered as text for people and as JSON for programs."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

import numpy as np

PIPED_WIDTH = 120


@dataclass
class Table:
    """Rows under named columns; a cell is text, a number, a bool or None."""

    title: str
    columns: list[str]
    rows: list[list[Any]]


@dataclass
class Report:
    """A title, single facts, tables and closing notes for people; `data` is what programs read, of any depth."""

    title: str
    facts: dict[str, Any] = field(default_factory=dict)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    data: dict[str, Any] = field(default_factory=dict)

    def text(self, width: int | None = None) -> str:
        """The report as lines of at most `width` columns (default: the terminal's, 120 where there is none).

        Tables are Markdown. Notes are never broken, so that a command in one can be copied. Codes for bold and colour
        are there only when standard output is a terminal.
        """
        from rich.box import MARKDOWN
        from rich.console import Console
        from rich.table import Table as RichTable

        stream = io.StringIO()
        console = Console(
            file=stream,
            width=width or shutil.get_terminal_size((PIPED_WIDTH, 24)).columns,
            force_terminal=bool(sys.stdout and sys.stdout.isatty()),
            markup=False,  # "[export]" in a cell is text
            emoji=False,
            highlight=False,
        )
        console.print(self.title, style="bold", soft_wrap=True)
        if self.facts:
            grid = RichTable.grid(padding=(0, 2))
            grid.add_column(style="dim")
            grid.add_column(overflow="fold")
            for name, value in self.facts.items():
                grid.add_row(name, cell_text(value))
            console.print(grid)
        for table in self.tables:
            shown = RichTable(box=MARKDOWN)
            for index, column in enumerate(table.columns):
                numeric = all(_is_number(row[index]) for row in table.rows)
                shown.add_column(column, justify="right" if numeric else "left", overflow="fold")
            for row in table.rows:
                shown.add_row(*map(cell_text, row))
            console.print(f"\n{table.title}", style="bold", soft_wrap=True)
            console.print(shown)
        if self.notes:
            console.print()
        for note in self.notes:
            console.print(note, soft_wrap=True)
        lines = "\n".join(line.rstrip() for line in stream.getvalue().splitlines())
        return re.sub(r"\n{3,}", "\n\n", lines)

    def to_dict(self) -> dict[str, Any]:
        """What programs read: `data` at the top, with the title and the notes, in JSON's own types.

        Facts and tables say the same to people and are left out. Numbers that JSON has no word for become None.
        """
        return {name: _plain(value) for name, value in {"title": self.title, "notes": self.notes, **self.data}.items()}

    def json(self) -> str:
        """`to_dict()` as indented JSON, in ASCII: any output can show it, and file names that are not text survive."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def cell_text(value: object) -> str:
    """One value as people read it: yes/no, four significant digits, a dash for nothing."""
    if value is None:
        return "-"
    if isinstance(value, bool | np.bool_):
        return "yes" if value else "no"
    if isinstance(value, float | np.floating):
        return f"{value:.4g}"
    return str(value)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float | np.number) and not isinstance(value, bool)


def _plain(value: Any) -> Any:
    """`value` with NumPy scalars and arrays, tuples and paths turned into JSON's own types."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray | np.generic):
        return _plain(value.tolist())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, PurePath) else value
