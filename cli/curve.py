"""The loss of a run as a small curve for a terminal: of braille dots, or of letters where a terminal has no others."""

import math
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import groupby, pairwise
from typing import Any

from rich.text import Text

# So many points are put together by twos: a curve has a few hundred dots across.
MOST_POINTS = 600
# The highest losses that a curve leaves out at its top. The first steps fall so far that all others would look alike.
CUT_SHARE = 0.1
# The bits of a braille character, which has two columns of four dots, from the top down.
DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))
MARK = 0x100  # of an evaluation
TRAINED, VALIDATED, DIM = "cyan", "bold dark_orange", "dim"


@dataclass
class Curve:
    """The points of a run so far: (step, mean loss) in training, and at each evaluation."""

    trained: list[tuple[int, float]] = field(default_factory=list)
    validated: list[tuple[int, float]] = field(default_factory=list)

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Add what was logged of a step. Later steps, which a resumed run takes again, are taken back."""
        step = metrics["step"]
        for name, points in (("loss", self.trained), ("validation_loss", self.validated)):
            if (loss := metrics.get(name)) is not None and math.isfinite(loss):
                while points and points[-1][0] >= step:
                    points.pop()
                points.append((step, loss))
                if len(points) == MOST_POINTS:
                    pairs = zip(points[::2], points[1::2], strict=True)
                    points[:] = [(step, (one + other) / 2) for (step, one), (_, other) in pairs]

    def draw(self, width: int, height: int, *, ascii_only: bool = False) -> Text:
        """Return `height` lines of at most `width` columns: the losses, and under them their steps."""
        first, last = (fit(step for step, _ in self.trained + self.validated) for fit in (min, max))
        across, down = (1, 1) if ascii_only else (2, 4)
        margin, rows = 8, height - 1
        columns = max(width - margin, 8)

        def column(step: int) -> int:
            return round((step - first) / max(last - first, 1) * (columns * across - 1))

        # A column of dots shows the mean of its steps.
        grouped = groupby(self.trained, key=lambda point: column(point[0]))
        means = [(at, statistics.fmean(loss for _, loss in points)) for at, points in grouped]
        line = means[:1]
        for (left, one), (right, other) in pairwise(means):
            line += [(at, one + (other - one) * (at - left) / (right - left)) for at in range(left + 1, right + 1)]
        losses = sorted(loss for _, loss in means + self.validated)
        low, high = losses[0], losses[math.ceil((1 - CUT_SHARE) * (len(losses) - 1))]

        def row(loss: float) -> int:
            return round((high - min(loss, high)) / ((high - low) or 1.0) * (rows * down - 1))

        grid = [[0] * columns for _ in range(rows)]
        before = None
        for at, loss in line:
            now = row(loss)
            # The line goes on from the column before without a gap.
            for dot in (now,) if before is None else range(min(now, before), max(now, before) + 1):
                grid[dot // down][at // across] |= DOTS[dot % down][at % across]
            before = now
        for step, loss in self.validated:
            grid[row(loss) // down][column(step) // across] = MARK
        letters = {0: " ", MARK: "o" if ascii_only else "●"}
        text = Text(no_wrap=True)
        for number, masks in enumerate(grid):
            label = {0: f"{high:.3f}", rows - 1: f"{low:.3f}"}.get(number, "")
            text.append(f"{label:>{margin - 2}} {'|' if ascii_only else '┤' if label else '│'}", DIM)
            for marked, cells in groupby(masks, key=lambda mask: mask == MARK):
                drawn = (letters.get(mask, "*" if ascii_only else chr(0x2800 | mask)) for mask in cells)
                text.append("".join(drawn), VALIDATED if marked else TRAINED)
            text.append("\n")
        steps = f"step {first:,}"
        text.append(f"{'':{margin}}{steps}{f'{last:,}':>{columns - len(steps)}}", DIM)
        return text
