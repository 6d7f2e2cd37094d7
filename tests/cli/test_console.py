"""What a run looks like while it goes."""

import io

import pytest
from rich.console import Console as Terminal

from cli.console import Console, span, training_line

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
