"""Progress of long steps: bars with remaining time on a terminal, plain lines elsewhere (a log file, CI)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)

Advance = Callable[..., None]
SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """Says what is going on. `console` None: says nothing (library use)."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console
        self._begin = time.perf_counter()

    def say(self, text: str) -> None:
        """One line, with the minutes and seconds since the start."""
        if self.console is not None:
            passed = int(time.perf_counter() - self._begin)
            self.console.print(f"[dim]{passed // 60:02d}:{passed % 60:02d}[/]  {text}", highlight=False)

    def show(self, renderable: Any) -> None:
        """A table or a line without a time."""
        if self.console is not None:
            self.console.print(renderable, highlight=False)

    @contextmanager
    def bar(self, what: str, total: int | None = None) -> Iterator[Advance]:
        """Yields advance(steps=1, note=""). total None: a spinner, for what cannot be counted."""
        if self.console is None or not self.console.is_terminal:
            yield self._lines(what, total) if self.console is not None else _nothing
            return
        columns = (
            SpinnerColumn(),
            TextColumn("       {task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        shown = columns if total is not None else (*columns[:2], TimeElapsedColumn())
        with Bars(*shown, console=self.console, transient=True) as bars:
            task = bars.add_task(what, total=total, note="")

            def advance(steps: int = 1, note: str = "") -> None:
                bars.update(task, advance=steps, note=note)

            yield advance

    def _lines(self, what: str, total: int | None) -> Advance:
        """advance() for a log: a line every SECONDS_BETWEEN_LINES at most, none for what is done sooner."""
        done, next_line = 0, time.perf_counter() + SECONDS_BETWEEN_LINES

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal done, next_line
            done += steps
            if time.perf_counter() >= next_line:
                next_line = time.perf_counter() + SECONDS_BETWEEN_LINES
                self.say(f"{what}: {done}{'' if total is None else f' of {total}'}{note and ', ' + note}")

        return advance

    def over(self, what: str, items: Iterable[Any], total: int) -> Iterator[Any]:
        """The items, with a bar."""
        with self.bar(what, total) as advance:
            for item in items:
                yield item
                advance()


def _nothing(steps: int = 1, note: str = "") -> None:
    """Nobody watches."""
