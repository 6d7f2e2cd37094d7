"""What many runs say together: the best rate of a valley, powers between quantities, and the law of the loss.

Plain NumPy. Losses are in any unit, bits per byte in what is published; logarithms make all of them relative.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from engine.laws import Law

# The powers of weights, of tokens, and of their sum lie in here: what a few runs say beyond is noise.
LEAST, MOST = np.array([0.1, 0.1, 0.1]), np.array([1.2, 1.2, 1.2])

Numbers = Sequence[float] | np.ndarray

# Two runs that differ in their seed alone differ by about so much of the loss, where no seeds were repeated.
NOISE = 0.003
# Residuals beyond this, as a share of the loss, count by their size and no more by its square (Huber).
DELTA = 0.005


@dataclass(frozen=True)
class Valley:
    """The lowest point of a valley of losses over rates, with the standard error of its rate as a factor.

    Where the lowest loss is at an end of what was tried it has no minimum inside, and no error: the best rate is there
    or beyond.
    """

    rate: float
    loss: float
    error: float | None = None

    @property
    def inside(self) -> bool:
        return self.error is not None


def valley(rates: Numbers, losses: Numbers, noise: float = NOISE) -> Valley:
    """Fit a parabola in log rate to the losses within a factor of two of the lowest, its neighbours at least.

    Farther out a valley is no parabola: it is steeper where rates are high. A rate may come more than once, with
    another seed. `noise` is the deviation of a loss as a share of it.
    """
    x, y = np.log2(rates), np.asarray(losses, float)
    places = np.unique(x)
    means = np.array([y[x == place].mean() for place in places])
    at = int(means.argmin())
    best, outside = places[at], Valley(float(2 ** places[at]), float(means[at]))
    if at in (0, len(places) - 1):
        return outside
    near = (x >= min(best - 1.01, places[at - 1])) & (x <= max(best + 1.01, places[at + 1]))
    x, y = x[near] - best, y[near]
    columns = np.stack([x**2, x, np.ones_like(x)], 1)
    (a, b, c), *_ = np.linalg.lstsq(columns, y)
    if a <= 0:
        return outside
    freedom = len(x) - 3
    scatter = np.sqrt(((columns @ (a, b, c) - y) ** 2).sum() / freedom) if freedom > 0 else 0.0
    covariance = max(scatter, noise * y.mean()) ** 2 * np.linalg.inv(columns.T @ columns)
    slope = np.array([b / (2 * a**2), -1 / (2 * a), 0.0])
    error = float(np.sqrt(slope @ covariance @ slope))
    return Valley(float(2 ** (best - b / (2 * a))), float(c - b**2 / (4 * a)), 2**error)


def powers(y: Numbers, *xs: Numbers, errors: Numbers | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Fit y = constant * x1^p1 * x2^p2 ... in logarithms. Return log constant and powers, and their standard errors.

    `errors` are factors by which each y may be wrong; without them all are as good.
    """
    columns = np.stack([np.ones(len(y)), *(np.log(x) for x in xs)], 1)
    weights = np.ones(len(y)) if errors is None else 1 / np.log(errors)
    found, residuals, *_ = np.linalg.lstsq(columns * weights[:, None], np.log(y) * weights)
    inverse = np.linalg.inv((columns * weights[:, None]).T @ (columns * weights[:, None]))
    freedom = len(y) - columns.shape[1]
    # Known errors may be too small for what the points show, and then those count.
    scale = residuals[0] / freedom if freedom > 0 and len(residuals) else np.nan
    scale = scale if errors is None else np.fmax(scale, 1.0)
    return found, np.sqrt(np.diag(inverse) * scale)


def along(law: Law, sizes: ArrayLike, tokens: ArrayLike) -> np.ndarray:
    """Return what a law says of sizes and tokens, as NumPy broadcasts them."""
    return np.vectorize(law, otypes=[float])(sizes, tokens)


def forecast(sizes: Numbers, tokens: Numbers, losses: Numbers, floor: float = 0.0) -> Law:
    """Fit the law with this floor to runs, by the Huber loss of relative residuals of what is above it.

    Short runs do not tell the floor. Only the powers are searched for, on a grid that closes in on the best: for given
    powers the rest is linear, and is solved (with weights that make squares Huber's loss). So there are no starts to
    choose, and no bad minimum.
    """
    logs, n, d = (np.log(np.asarray(each, float)) for each in (np.asarray(losses, float) - floor, sizes, tokens))
    middle, reach = (LEAST + MOST) / 2, (MOST - LEAST) / 2
    for _ in range(6):
        steps = np.linspace(-1, 1, 9)
        grid = np.clip(middle + reach * np.stack(np.meshgrid(steps, steps, steps), -1).reshape(-1, 3), LEAST, MOST)
        of_weights, of_tokens, power = np.split(grid, 3, 1)
        # [grid, runs, 2]: each column is divided by what it is to add up to, together with the other.
        columns = np.stack([-of_weights * (n - n.mean()), -of_tokens * (d - d.mean())], -1)
        found, cost = _solve(np.exp(columns - (logs / power)[..., None]), power)
        best = cost.argmin()
        middle, reach = grid[best], reach / 2.5
    size, data = found[best] * np.exp(middle[:2] * (n.mean(), d.mean()))
    return Law(floor, float(size), float(middle[0]), float(data), float(middle[1]), float(middle[2]))


def _solve(columns: np.ndarray, power: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the factors with which the columns [G, runs, 2] add up to 1, and the Huber loss of each sum's power."""
    weights = np.ones(columns.shape[:2])
    for _ in range(10):
        weighted = (columns * weights[..., None]).mT
        gram, right = weighted @ columns + 1e-12 * np.eye(2), weighted.sum(-1, keepdims=True)
        found = np.linalg.solve(gram, right)[..., 0]
        wrong = power * np.abs((columns @ found[..., None])[..., 0] - 1)
        weights = DELTA / np.maximum(wrong, DELTA)
    cost = np.where(wrong < DELTA, wrong**2 / 2, DELTA * (wrong - DELTA / 2)).sum(1)
    return found, np.where((found < 0).any(1), np.inf, cost)


def held_out(
    sizes: np.ndarray, tokens: np.ndarray, losses: np.ndarray, held: np.ndarray, floor: float = 0.0
) -> tuple[Law, float]:
    """Fit without the runs `held` (their numbers). Return that, and the mean of |foretold / measured - 1| over them."""
    law = forecast(np.delete(sizes, held), np.delete(tokens, held), np.delete(losses, held), floor)
    return law, float(np.abs(along(law, sizes[held], tokens[held]) / losses[held] - 1).mean())
