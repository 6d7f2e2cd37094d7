"""What a run looks like while it goes."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console as Terminal

from cli.console import Console, span, training_line

ROOTED = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
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


@pytest.mark.parametrize("interactive", [True, False])
def test_a_terminal_gets_a_bar_and_a_pipe_gets_plain_lines(interactive: bool) -> None:
    written = io.StringIO()
    console = Console()
    console.terminal = Terminal(file=written, force_terminal=interactive, width=160, highlight=False)
    console.log(METRICS)
    assert (console.bar is not None) == interactive
    console.log({"step": 3, "validation_loss": 1.5, "validation_bits_per_byte": 1.1, "validation_perplexity": 4.48})
    console.close()
    assert "loss 3.142" in written.getvalue() and "validation loss 1.5000" in written.getvalue()
    assert ("\x1b" in written.getvalue()) == interactive


def test_a_terminal_that_is_closed_takes_no_run_with_it() -> None:
    script = """
import time
from cli.console import Console
console = Console()
console.progress("step 1", 0.5)
print("begun", flush=True)
while time.sleep(0.02) or os.isatty(1):
    console.say("more")
console.progress("step 2", 0.6)
console.close()
os._exit(7) if os.isatty(2) else print("never seen")
"""
    ours, theirs = os.openpty()
    command = [sys.executable, "-c", f"import os{script}"]
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=ROOTED) as process:
        os.close(theirs)
        while b"begun" not in os.read(ours, 10_000):
            pass
        os.close(ours)
        assert process.wait(20) == 0
