"""Means of what a step measures, however its batch is cut."""

from collections.abc import Mapping
from typing import Any

from engine.processes import ALONE, Processes


class Measures:
    """Means of what was measured since they were last taken.

    Sums and counts are kept and divided last: a mean depends neither on how many were measured at a time nor on which
    process measured them.
    """

    def __init__(self) -> None:
        self.held: dict[str, tuple[Any, int]] = {}

    def add(self, sums: Mapping[str, Any], count: int = 1) -> None:
        """Sums over `count` tokens, pairs, or whatever the mean is over: numbers, or tensors that nobody waits for."""
        for name, value in sums.items():
            total, number = self.held.get(name, (0.0, 0))
            self.held[name] = (total + value, number + count)

    def take(self, processes: Processes = ALONE) -> dict[str, float]:
        """The means over what all processes measured. To be called by all of them at once."""
        held, self.held = {name: (float(total), count) for name, (total, count) in self.held.items()}, {}
        everyone = processes.collect(held)
        means = {}
        for name in {name: None for each in everyone for name in each}:
            sums, counts = zip(*(each[name] for each in everyone if name in each), strict=True)
            means[name] = sum(sums) / sum(counts)
        return means
