"""Progress of long work: a bar on a terminal, plain lines elsewhere."""
from __future__ import annotations

import sys


class Progress:
    """A progress bar on a terminal, a plain line per step elsewhere; on stderr, so that stdout stays clean. quiet: nothing at all."""

    def __init__(self, total: int, quiet: bool = False):
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bar

        console, self.quiet, self.said = Console(file=sys.stderr), quiet, ""
        self.bar = Bar(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
                       console=console, disable=quiet or not console.is_terminal)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> Progress:
        self.bar.start()
        return self

    def __exit__(self, *_) -> None:
        self.bar.stop()

    def advance(self, steps: int = 1) -> None:
        self.bar.advance(self.task, steps)

    def to(self, done: int, *_) -> None:
        """So many steps are done."""
        self.bar.update(self.task, completed=done)

    def say(self, text: str) -> None:
        """What is being done now: the bar's description, or a line of its own."""
        if self.bar.disable and not self.quiet and text != self.said:
            print(text, file=sys.stderr, flush=True)
        self.said = text
        self.bar.update(self.task, description=text)
