"""Progress bars, one for each stage of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cllava_fast import distributed
from cllava_fast.untrusted import printable


class Advance(Protocol):
    """Moves a bar on by ``steps``, with a word such as the loss beside it."""

    def __call__(self, note: str, steps: int = 1) -> None: ...


@contextmanager
def stage(title: str, total: int, show: bool = True, console: Console | None = None) -> Iterator[Advance]:
    """Shows one stage, on the main process; the yielded function moves it on.

    Without a terminal a stage prints a single line when it ends.
    """
    console = console or Console(stderr=True)
    if not (show and distributed.is_main()):
        yield lambda note, steps=1: None
        return
    last, title = "", printable(title)
    columns = (
        TextColumn("{task.description:<34}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}", markup=False),
    )
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=total, note="")

        def advance(note: str, steps: int = 1) -> None:
            nonlocal last
            last = note
            progress.update(task, advance=steps, note=note)

        yield advance
    console.print(f"{title:<34} {total:>5} steps  {last}", highlight=False, markup=False)
