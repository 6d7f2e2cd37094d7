"""The console shows a run: with a live progress bar on a terminal, in plain lines elsewhere."""

import contextlib
import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from rich.console import Console as Terminal
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column, Table
from rich.text import Text

PLAIN_LINE_SECONDS = 10.0
# This is the style of a table without a frame, whose columns stand two spaces apart.
FRAMELESS: dict[str, Any] = {"box": None, "padding": (0, 2, 0, 0)}


def notice(message: str) -> None:
    """Say something beside what a command writes to standard output."""
    print(message, file=sys.stderr)


def print_table(
    heads: Iterable[str | Column], rows: Iterable[Iterable[str]], *, soft_wrap: bool = False, **style: Any
) -> None:
    """Print a table. `soft_wrap` leaves it to the terminal to break lines that are too long for it."""
    table = Table(*heads, **style)
    for row in rows:
        table.add_row(*map(Text, row))
    terminal = Terminal(highlight=False, soft_wrap=soft_wrap)
    # COLUMNS may say 0, and a table would be nothing. Where lines are not to be broken, none is too long.
    terminal.width = 10_000 if soft_wrap else max(terminal.width, 40)
    terminal.print(table)


def span(seconds: float) -> str:
    """Write seconds as a person writes them: 0:42, 3:07, 5:12:09."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def training_line(metrics: Mapping[str, Any]) -> str:
    parts = [
        f"step {metrics['step']:,}",
        f"loss {metrics['loss']:.3f}",
        *([f"{metrics['bits_per_byte']:.3f} bits/byte"] if "bits_per_byte" in metrics else []),
        f"{metrics['tokens_per_second']:,.0f} tokens/s",
        f"{100 * metrics['mfu']:.0f}% of peak",
        f"{span(metrics['seconds_left'])} left",
    ]
    return "  ".join(parts + ([f"{metrics['skipped']} skipped"] if metrics["skipped"] else []))


@contextlib.contextmanager
def may_be_closed() -> Iterator[None]:
    """Lose what is written to a terminal that was closed meanwhile: a run has yet to be saved."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)


class Console:
    """Shows a run (train.tracking.Tracker) and the preparation of its data."""

    def __init__(self) -> None:
        self.terminal = Terminal(highlight=False, soft_wrap=True)
        self.bar: Progress | None = None
        self.last_plain = 0.0

    def say(self, message: str) -> None:
        with may_be_closed():
            self.terminal.print(message, markup=False)

    def log(self, metrics: Mapping[str, Any]) -> None:
        # Imported here: it brings torch along, and commands that print only a table need none.
        from train.tracking import evaluation_parts, metric_parts

        if "validation_loss" in metrics:
            self.say(f"step {metrics['step']:,}  validation " + "  ".join(evaluation_parts(metrics, "validation_")))
        else:
            if "round" in metrics:
                self.say(f"round {metrics['round']:.0f}  " + "  ".join(metric_parts(metrics)))
            self.progress(training_line(metrics), metrics["progress"])

    def preparing(self, what: str) -> Callable[[int, int, int], None]:
        """Return a callback that shows documents, tokens and bytes read so far."""
        begin = time.perf_counter()

        def show(documents: int, tokens: int, text_bytes: int) -> None:
            speed = text_bytes / 1e6 / max(time.perf_counter() - begin, 1e-9)
            self.progress(f"preparing {what}: {documents:,} documents, {tokens:,} tokens, {speed:.1f} MB/s", None)

        return show

    def close(self) -> None:
        if self.bar is not None:
            with may_be_closed():
                self.bar.stop()
            self.bar = None

    def progress(self, line: str, share: float | None) -> None:
        """Show how far something has come, now and then where there is no live terminal."""
        if not self.terminal.is_terminal:
            if time.perf_counter() - self.last_plain >= PLAIN_LINE_SECONDS:
                self.last_plain = time.perf_counter()
                self.say(line)
            return
        if self.bar is None:
            self.bar = Progress(
                BarColumn(bar_width=24), TextColumn("{task.description}"), console=self.terminal, transient=True
            )
            self.bar.add_task("", total=1.0)
            with may_be_closed():
                self.bar.start()
        self.bar.update(self.bar.task_ids[0], description=line, completed=share, total=None if share is None else 1.0)
