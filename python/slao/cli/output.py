"""What a command prints: plain lines into a pipe, tables that fit into a terminal, or with --json one document."""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

Json = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON document on standard output, everything else on standard error."),
]


def aside(as_json: bool) -> contextlib.AbstractContextManager[Any]:
    """Within the block what is printed goes to standard error, where the document alone is to be on standard output."""
    return contextlib.redirect_stdout(sys.stderr) if as_json else contextlib.nullcontext()


def document(fields: Mapping[str, Any]) -> None:
    """Print the JSON document. A number that is not finite becomes null, which JSON has."""
    print(json.dumps(_plain(fields), indent=1, allow_nan=False))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def terminal() -> Console | None:
    """Standard output as a terminal, None where it is a pipe or a file, whatever FORCE_COLOR says."""
    if not sys.stdout.isatty():
        return None
    from rich.console import Console

    console = Console(markup=False, emoji=False, highlight=False)
    return console if console.is_terminal else None


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """As they are: a path that is longer than the terminal stays whole."""
    for line in lines:
        console.print(line, soft_wrap=True)


def print_table(console: Console, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """As many blocks of columns below each other as the width asks for, the first column in each."""
    from rich.cells import cell_len
    from rich.table import Table

    widths = [max(cell_len(row[column]) for row in [header, *rows]) for column in range(len(header))]
    first = min(widths[0], console.width // 2)
    left, begin = list(range(1, len(header))), True
    while left or begin:
        block: list[int] = []
        room = console.width - first
        while left and (not block or room >= widths[left[0]] + 2):
            block.append(left.pop(0))
            room -= widths[block[-1]] + 2
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column(header[0], overflow="fold", max_width=first)
        for column in block:
            table.add_column(header[column], justify="right", overflow="fold")
        for row in rows:
            table.add_row(row[0], *(row[column] for column in block))
        if not begin:
            console.print()
        console.print(table)
        begin = False
