"""Writing to people and to programs: plain text where it is piped, colour and tables on a terminal."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

from sekha.cli.values import plain

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

__all__ = ["columns", "complain", "console", "note", "printable", "say", "show_table", "waiting", "write_json"]

_above: ContextVar[Console | None] = ContextVar("above_the_spinner", default=None)
"""Set while a spinner is shown: only its own console can write to that terminal without tearing it."""
PIPED_WIDTH = 4096
"""Nothing wraps in a pipe: a line is a line to `grep` and `cut`."""


def write_json(value: Any) -> None:
    """Print one JSON document on stdout."""
    sys.stdout.write(json.dumps(plain(value), ensure_ascii=False, indent=2) + "\n")


def printable(text: str) -> str:
    """The text without control characters, which could rewrite the terminal that shows it."""
    return "".join(each for each in text if each in "\n\t" or each.isprintable())


def say(text: str = "", style: str = "", *, indent: int = 0) -> None:
    """Print a line on stdout. On a terminal, an indented one keeps its indent where it wraps."""
    if indent and sys.stdout.isatty():
        from rich.padding import Padding
        from rich.text import Text

        console(sys.stdout).print(Padding(Text(text, style=style), (0, 0, 0, indent)))
    else:
        _print(sys.stdout, " " * indent + text, style)


def note(text: str, style: str = "dim") -> None:
    """Print a line on stderr, beside the result: what was done, what it cost."""
    _print(sys.stderr, text, style)


def complain(message: str, next_move: str = "") -> None:
    """Print an error on stderr as one block."""
    from rich.text import Text

    text = Text("Error: ", style="bold red") + Text(printable(message), style="")
    console(sys.stderr).print(text, soft_wrap=True)
    if next_move:
        note(printable(next_move))


def console(file: TextIO) -> Console:
    """A console that prints what it is given: no markup, no emoji codes, no guesses at what to colour."""
    if (above := _above.get()) is not None and file.isatty():
        return above
    return _new_console(file)


def _new_console(file: TextIO) -> Console:
    from rich.console import Console

    colour = file.isatty() and not os.environ.get("NO_COLOR")
    return Console(
        file=file,
        width=None if file.isatty() else PIPED_WIDTH,
        color_system="auto" if colour else None,
        markup=False,
        emoji=False,
        highlight=False,
    )


def columns(*headings: str, right: Sequence[str] = (), wrap: Sequence[str] = ()) -> Table:
    """An empty table without lines; numbers stand right, and only what may be long wraps."""
    from rich.table import Table

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    for heading in headings:
        table.add_column(
            heading, justify="right" if heading in right else "left", overflow="fold", no_wrap=heading not in wrap
        )
    return table


def show_table(table: Table) -> None:
    from rich.text import Text

    # Rich pads every row to the table's width; blanks at a line's end help nobody who reads a pipe.
    drawn = _new_console(sys.stdout)
    with drawn.capture() as captured:
        drawn.print(table)
    out = console(sys.stdout)
    for line in captured.get().splitlines():
        out.print(Text.from_ansi(line.rstrip()), soft_wrap=True)


@contextmanager
def waiting(what: str, *, lines: bool = False) -> Iterator[Callable[[str], None]]:
    """Show on a terminal what is being waited for, and for how long; elsewhere, with `lines`, say it.

    Yields a function that is told when something else is waited for.
    """
    if not sys.stderr.isatty():
        tell = note if lines else _silent
        tell(what)
        yield tell
        return
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    shown = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", style="dim", markup=False),
        TimeElapsedColumn(),
        console=console(sys.stderr),
        transient=True,
    )
    with shown:
        task = shown.add_task(what, total=None)
        before = _above.set(shown.console)
        try:
            yield lambda now: shown.update(task, description=now)
        finally:
            _above.reset(before)


def _silent(_: str) -> None:
    pass


def _print(file: TextIO, text: str, style: str) -> None:
    if not file.isatty():
        # Rich would say the same, and takes longer to import than what there is to say.
        file.write(text + "\n")
        return
    from rich.text import Text

    console(file).print(Text(text, style=style), soft_wrap=True)
