"""What a run looks like while it goes."""

import io
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console as Terminal

from cli.console import CURVE_HEIGHT, Console, _Drawn, span, training_line
from engine import progress

ROOTED = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
WHAT = ("training", "evaluating")
METRICS = {
    "step": 1200,
    "loss": 3.14159,
    "bits_per_byte": 1.2345,
    "tokens_per_second": 12345.6,
    "mfu": 0.456,
    "seconds_left": 187.0,
    "progress": 0.5,
    "skipped": 0,
}


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (42.4, "0:42"), (187, "3:07"), (18729, "5:12:09")])
def test_time_is_written_for_a_person(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_a_line_says_all_that_matters() -> None:
    line = training_line(METRICS)
    assert line == "step 1,200  loss 3.142  1.234 bits/byte  12,346 tokens/s  46% of peak  3:07 left"
    assert training_line({**METRICS, "skipped": 2}).endswith("2 skipped")


def test_slow_work_has_a_rate_too(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("cli.console.time", SimpleNamespace(perf_counter=lambda: now[0]))
    console, written = on_terminal(interactive=False)
    with console.task("drawing answers", 6, "answers") as tell:
        for now[0], done in ((10.0, 0), (20.0, 1), (100.0, 1500)):
            tell(done)
    lines = written.getvalue().splitlines()
    assert lines[:2] == [
        "drawing answers: 0 of 6 answers",
        "drawing answers: 1 of 6 answers  0.05 answers/s  1:40 left",
    ]
    assert "  15 answers/s" in lines[2]


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    for name in ("NO_COLOR", "FORCE_COLOR", "COLUMNS", "LINES"):
        monkeypatch.delenv(name, raising=False)


def on_terminal(width: int = 160, *, interactive: bool = True) -> tuple[Console, io.StringIO]:
    console, written = Console(), io.StringIO()
    console.terminal = Terminal(file=written, force_terminal=interactive, width=width, height=30, highlight=False)
    return console, written


def drawn(console: Console) -> list[str]:
    """The lines that stand on the terminal."""
    lines = console.terminal.render_lines(_Drawn(console), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


@pytest.mark.parametrize("interactive", [True, False])
def test_a_terminal_gets_a_bar_and_a_pipe_gets_plain_lines(interactive: bool) -> None:
    console, written = on_terminal(interactive=interactive)
    console.log(METRICS)
    assert (console.live is not None) == interactive
    console.log({"step": 3, "validation_loss": 1.5, "validation_bits_per_byte": 1.1, "validation_perplexity": 4.48})
    console.close()
    assert "loss 3.142" in written.getvalue() and "validation loss 1.5000" in written.getvalue()
    assert ("\x1b" in written.getvalue()) == interactive


@pytest.mark.parametrize("variable", [{"NO_COLOR": "1"}, {"TERM": "dumb"}, {"FORCE_COLOR": "1"}], ids=str)
def test_no_control_character_comes_where_none_is_wanted(
    variable: dict[str, str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, value in variable.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("cli.console.PLAIN_LINE_SECONDS", 0.0)
    console, written = on_terminal()
    if "FORCE_COLOR" in variable:
        console = Console()
    with console, progress.listener.get()("evaluating", 200, "tokens") as told:
        console.log(METRICS)
        told(50)
    said = written.getvalue() + capsys.readouterr().out
    assert "step 1,200  loss 3.142" in said and "evaluating: 50 of 200 tokens  " in said and "\x1b" not in said


def test_what_others_read_from_standard_output_is_free_of_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("cli.console.PLAIN_LINE_SECONDS", 0.0)
    with Console(stderr=True), progress.listener.get()("drawing answers", 8, "answers") as told:
        told(2)
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("drawing answers: 2 of 8 answers  ") and err.rstrip().endswith("left")
    with progress.listener.get()("drawing answers", 8, "answers") as told:
        told(4)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("width", [40, 90, 160])
def test_tasks_stand_below_each_other_under_the_curve_and_no_line_is_too_long(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cli.console.DRAW_SECONDS", 0.0)
    console, written = on_terminal(width)
    with console:
        for step in range(1, 50):
            console.log({**METRICS, "step": step, "loss": 3 + 9 / step})
        console.say("a line that a terminal of forty columns has to break somewhere, and leaves whole")
        with progress.listener.get()("evaluating", 200, "tokens") as told:
            told(50)
            lines = drawn(console)
            assert max(map(len, lines)) < width and any(0x2800 < ord(letter) < 0x2900 for letter in "".join(lines))
            (training, evaluating) = (next(n for n, line in enumerate(lines) if line.startswith(name)) for name in WHAT)
            assert CURVE_HEIGHT == training < evaluating and "50%" in lines[training] and "25%" in lines[evaluating]
            assert "50 of 200 tokens" in "\n".join(lines[evaluating:])
        assert not any(line.startswith("evaluating") for line in drawn(console))
        console.terminal.height = 10
        assert drawn(console)[0].startswith("training")
    assert not any(drawn(console))
    assert "a line that a terminal of forty columns has to break somewhere, and leaves" in written.getvalue()


def test_a_terminal_that_is_closed_takes_no_run_with_it() -> None:
    script = """
import time
from cli.console import Console
console = Console()
METRICS = METRICS_HERE
console.log(METRICS)
print("begun", flush=True)
while time.sleep(0.02) or os.isatty(1):
    console.say("more")
console.last_shown = 0.0
console.log(METRICS)
console.close()
os._exit(7) if os.isatty(2) else print("never seen")
"""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", f"import os{script.replace('METRICS_HERE', repr(METRICS))}"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ROOTED) as process:
        os.close(theirs)
        seen = b""
        while b"begun" not in seen:
            seen += os.read(ours, 10_000)
        os.close(ours)
        # Whatever ends a process, its terminal has a cursor.
        assert b"training" in seen and b"\x1b[?25l" not in seen
        assert process.wait(20) == 0


@pytest.mark.parametrize("width", [0, 1, 160])
def test_any_name_is_shown_on_any_terminal(width: int) -> None:
    console, written = on_terminal(width)
    with console, progress.listener.get()("writing [/x]", None, ""):
        # What can tell nothing before it is over is shown from its beginning.
        assert "writing [/x]" in written.getvalue() or width < 20
        console.log(METRICS)
        console.log({**METRICS, "step": 1300, "loss": float("nan")})
