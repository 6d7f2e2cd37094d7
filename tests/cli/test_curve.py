"""The curve of the losses: what it shows, and that any run has one."""

import math

import pytest

from cli.curve import MOST_POINTS, Curve


def curve(steps: int, every: int = 0) -> Curve:
    made = Curve()
    for step in range(1, steps + 1):
        made.add({"step": step, "loss": 2 + 8 / step})
        if every and step % every == 0:
            made.add({"step": step, "validation_loss": 2.5})
    return made


def test_it_falls_from_the_highest_loss_to_the_lowest_and_marks_evaluations() -> None:
    *rows, steps = curve(200, every=50).draw(60, 8).plain.splitlines()
    assert [len(rows), steps.split()] == [7, ["step", "1", "200"]] and max(map(len, rows)) <= 60
    high, low = (float(row.split()[0]) for row in (rows[0], rows[-1]))
    assert 2.03 < low < 2.05 and 2.3 < high < 4
    # Where the curve stands at its beginning and at its end.
    assert rows[0][8] > "\u2800" and rows[-1][-1] > "\u2800"
    assert "".join(rows).count("●") == 4
    # Few steps make a line, too.
    *rows, steps = curve(5).draw(60, 8).plain.splitlines()
    assert all(any(row[at] > "\u2800" for row in rows) for at in range(8, 60))


def test_a_terminal_without_other_letters_gets_those_of_ascii() -> None:
    text = curve(200, every=50).draw(60, 8, ascii_only=True).plain
    assert text.isascii() and text.count("o") == 4 and text.count("*") > 50


@pytest.mark.parametrize("steps", [1, 2, 3, 599, 600, 601, 5000])
def test_any_run_has_a_curve_and_a_long_one_takes_no_more_memory(steps: int) -> None:
    made = curve(steps)
    assert len(made.trained) < MOST_POINTS and math.isclose(made.trained[-1][1], 2 + 8 / steps, rel_tol=0.01)
    for width, height, ascii_only in ((30, 2, False), (60, 8, False), (100, 8, True)):
        lines = made.draw(width, height, ascii_only=ascii_only).plain.splitlines()
        assert len(lines) == height and lines[-1].split()[:2] == ["step", "1"]


def test_what_a_resumed_run_does_again_is_taken_back_and_what_is_no_number_left_out() -> None:
    made = curve(10, every=5)
    for loss in (None, math.nan, math.inf, -1.0):
        made.add({"step": 6, "loss": loss})
    assert [step for step, _ in made.trained] == [1, 2, 3, 4, 5, 6] and made.trained[-1][1] == -1.0
    assert [step for step, _ in made.validated] == [5, 10]
    made.add({"step": 7, "validation_loss": 2.0})
    assert [step for step, _ in made.validated] == [5, 7]
    made.draw(40, 6)
