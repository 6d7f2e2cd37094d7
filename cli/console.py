"""The console shows a run: with live progress bars on a terminal, in plain lines elsewhere."""

import contextlib
import errno
import locale
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

from rich.console import Console as Terminal
from rich.console import ConsoleOptions, RenderResult
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Column, Table
from rich.text import Text

from cli.curve import Curve
from engine import progress
from engine.progress import Told

PLAIN_LINE_SECONDS, DRAW_SECONDS = 10.0, 0.25
# In columns and lines of a terminal: what a bar takes with what is said of it, the curve, and the least for a curve.
ONE_LINE_WIDTH, CURVE_WIDTH, CURVE_HEIGHT, LEAST_HEIGHT = 120, 100, 8, 16
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


class _Terminal(Terminal):
    """A terminal that is left as it was found, even by a process that is killed: its cursor is never hidden."""

    def show_cursor(self, show: bool = True) -> bool:
        return False

    @property
    def encoding(self) -> str:
        # In Python's UTF-8 mode (cli/main.py) the stream's own says nothing of the terminal.
        return super().encoding if locale.getencoding().lower() in ("utf-8", "utf8") else "ascii"


@dataclass(eq=False)
class Bar:
    """How far a piece of work is, and what is said of it."""

    what: str
    total: float | None
    done: float = 0.0
    said: str = ""
    drawn: bool = False


class Console:
    """Shows a run (train.tracking.Tracker) and, within the block of a `with`, every task (engine/progress.py).

    On a terminal these are bars, one below the other, and over them the curve of the losses. They are drawn a few times
    a second at most, by who logs or tells: a thread would draw into what is being said. Elsewhere they are lines, now
    and then. `stderr` is for commands whose output other programs read.
    """

    def __init__(self, *, stderr: bool = False) -> None:
        # FORCE_COLOR would put control characters into a log.
        here = (sys.stderr if stderr else sys.stdout).isatty()
        self.terminal: Terminal = _Terminal(highlight=False, stderr=stderr, force_terminal=here)
        self.curve, self.bars = Curve(), list[Bar]()
        self.training: Bar | None = None
        self.live: Live | None = None
        self.last_shown = 0.0
        self.held = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self.held.enter_context(progress.shown(self.task))
        return self

    def __exit__(self, *_: object) -> None:
        self.held.close()
        self.close()

    @property
    def draws(self) -> bool:
        terminal = self.terminal
        return terminal.is_terminal and not terminal.is_dumb_terminal and not terminal.no_color

    def say(self, message: str) -> None:
        with may_be_closed():
            self.terminal.print(message, markup=False, soft_wrap=True)

    def log(self, metrics: Mapping[str, Any]) -> None:
        from train.tracking import evaluation_parts, metric_parts

        if self.draws:
            self.curve.add(metrics)
        if "validation_loss" in metrics:
            self.say(f"step {metrics['step']:,}  validation " + "  ".join(evaluation_parts(metrics, "validation_")))
            return
        if "round" in metrics:
            self.say(f"round {metrics['round']:.0f}  " + "  ".join(metric_parts(metrics)))
        if self.training is None:
            self.training = Bar("training", 1.0)
            self.bars.insert(0, self.training)
        self.training.done = metrics["progress"]
        self._show(self.training, training_line(metrics))

    @contextlib.contextmanager
    def task(self, what: str, total: float | None, unit: str) -> Iterator[Told]:
        """Show a piece of work while it goes on: this is a progress.Listener."""
        begin = shown = time.perf_counter()
        bar = Bar(what, total)
        self.bars.append(bar)
        if total is None:
            self._draw()  # it may tell nothing before it is over

        def tell(done: float) -> None:
            nonlocal shown
            now = time.perf_counter()
            if now - shown >= (DRAW_SECONDS if self.draws else PLAIN_LINE_SECONDS):
                shown, bar.done, speed = now, done, done / (now - begin)
                parts = [f"{done:,.0f}{'' if total is None else f' of {total:,.0f}'} {unit}"]
                parts += [f"{speed:{',.0f' if speed >= 10 else '.2g'}} {unit}/s"] if speed else []
                parts += [f"{span(max(total - done, 0) / speed)} left"] if total and speed else []
                self._show(bar, "  ".join(parts))

        try:
            yield tell
        finally:
            if bar in self.bars:
                self.bars.remove(bar)
                if bar.drawn:
                    self._draw()

    def close(self) -> None:
        self.bars.clear()
        if self.live is not None:
            with may_be_closed():
                self.live.stop()
            self.live = None

    def _show(self, bar: Bar, said: str) -> None:
        """Show how far something has come, unless the last time was just now."""
        bar.said = said
        if time.perf_counter() - self.last_shown < (DRAW_SECONDS if self.draws else PLAIN_LINE_SECONDS):
            return
        self.last_shown = time.perf_counter()
        if self.draws:
            self._draw()
        else:
            self.say(said if bar is self.training else f"{bar.what}: {said}")

    def _draw(self) -> None:
        if not self.draws:
            return
        with may_be_closed():
            if self.live is None:
                self.live = Live(
                    _Drawn(self),
                    console=self.terminal,
                    auto_refresh=False,
                    transient=True,
                    # What goes to a file must not come to the terminal instead.
                    redirect_stdout=sys.stdout.isatty(),
                    redirect_stderr=sys.stderr.isatty(),
                )
                self.live.start()
            self.live.refresh()


class _Drawn:
    """What is drawn of a console: the curve, where there is room for it, and the bars."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __rich_console__(self, terminal: Terminal, options: ConsoleOptions) -> RenderResult:
        # The options of a line that is being said would leave it to the terminal to break lines, and nobody would know
        # how many there are.
        width = max(terminal.width - 1, 20)
        options, bars = terminal.options.update(width=width), self.console.bars
        if self.console.training in bars and len(self.console.curve.trained) > 1 and terminal.height >= LEAST_HEIGHT:
            plain = options.ascii_only or os.environ.get("TERM") == "linux"  # its font has no braille
            curve = self.console.curve.draw(min(width, CURVE_WIDTH), CURVE_HEIGHT, ascii_only=plain)
            yield from terminal.render(curve, options)
        longest = max((len(bar.what) for bar in bars), default=0)
        for bar in bars:
            bar.drawn = True
            row = Table.grid(padding=(0, 1))
            share = "" if bar.total is None else f"{100 * min(bar.done / (bar.total or 1), 1):3.0f}%"
            drawn = ProgressBar(bar.total or 1, bar.done, width=min(24, width // 3), pulse=bar.total is None)
            # A name may hold what rich takes for a style.
            row.add_row(Text(f"{bar.what:{longest}}"), drawn, share, Text(bar.said) if width >= ONE_LINE_WIDTH else "")
            yield from terminal.render(row, options)
            if width < ONE_LINE_WIDTH and bar.said:
                yield from terminal.render(Text(bar.said), options)
