"""How functions are compared: each is held to float64, timed beside its peers, printed, written down and plotted.

A comparison is a list of cases; bench/kernels.py has those of the kernels. Training, generation and the server, whose
results have forms of their own, use the same clocks, turns, tables and files.
"""

import datetime
import io
import json
import multiprocessing
import re
import signal
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from engine.disk import write_atomically
from engine.run import versions
from engine.runtime import Runtime, synchronize
from kernels.backend import backend

RESULTS = Path("bench") / "results"
# The relative error, |x - exact| / |exact|, above which a result is wrong, not rounded. tf32 is allowed for fp32.
TOLERANCE = {"fp32": 2e-3, "fp16": 5e-3, "bf16": 2e-2}
# Seconds between two turns: OpenMP's threads spin on after their work, and would take a core from whoever comes next.
REST = 0.02
DIRECTIONS = ("forward", "backward")
COLORS = {
    "ours": "#c2410c", "packed": "#eab308", "plain": "#6b7280", "flash": "#1d4ed8", "efficient": "#0891b2",
    "cudnn": "#166534", "flex": "#7e22ce", "torch": "#1d4ed8", "compiled": "#7e22ce", "transformers": "#1d4ed8",
    "llama.cpp": "#166534", "without graphs": "#0891b2",
}  # fmt: skip

Figures = dict[str, Any]
Function = Callable[..., Any]
# It makes a function that is compared, for as long as its context is open.
Provider = Callable[[], AbstractContextManager[Function]]
Tensors = Sequence[Tensor]


def as_it_is(function: Function) -> Provider:
    return lambda: nullcontext(function)


def prepare(function: Function, arguments: Tensors, gradients: Tensors, direction: str) -> Callable[[], Any]:
    """Return a function of no arguments: to the results, or to the gradients of a graph that it keeps.

    Forward runs without a gradient. Backward is timed by itself so, not as the difference of two times.
    """
    if direction != "backward":
        return lambda: function(*arguments)
    leaves = [each.detach().requires_grad_() for each in arguments]
    out = function(*leaves)
    return lambda: torch.autograd.grad(out, leaves, gradients, retain_graph=True)


def clock(function: Function, arguments: Tensors, gradients: Tensors, direction: str, device: torch.device) -> Figures:
    return {"seconds": median_seconds(prepare(function, arguments, gradients, direction), device)}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of a comparison: functions with the same arguments."""

    place: Figures  # what the result says of the case
    providers: Mapping[str, Provider]
    exact: Function  # the same from arguments in float64
    draw: Callable[[], tuple[Tensors, Tensors]]  # the arguments, and the gradients of what comes out
    arrange: Callable[[str, Tensor], Tensor] = lambda name, tensor: tensor  # into a provider's layout, and back
    directions: tuple[str, ...] = DIRECTIONS
    prepare: Callable[..., Callable[[], Any]] = prepare
    clock: Callable[..., Figures] = clock
    rates: Callable[[str, float], Figures] = lambda direction, seconds: {}
    finish: Callable[[str], Figures] = lambda name: {}  # what else is measured, once, of a provider with figures
    small: "Callable[[], Case] | None" = None  # the case at which providers are compared with float64, if not this one
    checked: tuple[str, ...] = ()  # the parts of the place that an entry in the result's "checks" is for
    points: str = "points"  # the name of the result's list of cases


def compare(
    cases: Sequence[Case],
    names: Sequence[str],
    runtime: Runtime,
    about: Figures,
    *,
    last: Sequence[str] = (),
    rounds: int = 1,
) -> Iterator[Figures]:
    """Yield the result so far after every case: for each direction and provider figures, or the `reason` for none.

    What is not near float64 is wrong, and is not timed. Figures are medians of `rounds`, which providers take in turn;
    those of `last` begin when all others are through. `about` is what else the result says.
    """
    points: list[Figures] = []
    checks: Figures = {"checks": []} if cases[0].checked else {}
    head = {"precision": runtime.precision, "backend": backend(runtime.device)}
    result = head | about | checks | {cases[0].points: points}
    for group in filter(None, (names, last)):
        verdicts: dict[str, dict[str, dict[str, Figures]]] = {}
        for case in cases:
            small = case.small() if case.small else case
            if (key := str(small.place)) not in verdicts:
                verdicts[key] = {
                    direction: {name: outcome(check, small, name, direction, runtime) for name in group}
                    for direction in case.directions
                }
                if case.checked:
                    which = {field: case.place[field] for field in case.checked}
                    result["checks"].append(which | (verdicts[key].get("") or verdicts[key]))
            point = next((each for each in points if case.place.items() <= each.items()), None)
            if point is None:
                points.append(point := dict(case.place))
            for direction, known in verdicts[key].items():
                figures = measured(case, direction, known, runtime, rounds)
                (point.setdefault(direction, {}) if direction else point).update(figures)
            yield result


def measured(
    case: Case, direction: str, verdicts: dict[str, Figures], runtime: Runtime, rounds: int
) -> dict[str, Figures]:
    """Return the figures of the providers that are right, and of the others the reason."""
    right = [name for name, verdict in verdicts.items() if "reason" not in verdict]
    found = in_turn({name: partial(outcome, timed, case, name, direction, runtime) for name in right}, rounds)
    for name in right:
        if "reason" not in found[name]:
            # Without entries of "checks" the error is beside the times.
            found[name] = ({} if case.checked else verdicts[name]) | found[name] | case.finish(name)
    return verdicts | found


def check(case: Case, name: str, direction: str, runtime: Runtime) -> Figures:
    """Return the relative error, against float64. Raises ArithmeticError for one that rounding does not explain."""
    inputs = case.draw()
    arranged = [[case.arrange(name, each) for each in group] for group in inputs]
    with case.providers[name]() as function:
        found = case.prepare(function, *arranged, direction)()
    # A weight that is kept in fp32 is multiplied in the precision of the run: exact results begin with it rounded so.
    wide = [[each.to(runtime.dtype).double() if each.is_floating_point() else each for each in g] for g in inputs]
    exact = case.prepare(case.exact, *wide, direction)()
    pairs = [(found, exact)] if isinstance(exact, Tensor) else list(zip(found, exact, strict=True))
    error = max(((case.arrange(name, a).double() - b).norm() / b.norm()).item() for a, b in pairs)
    # Not `>`: NaN is wrong too.
    if not error <= TOLERANCE[runtime.precision]:
        which = f" of the {direction}" if direction in DIRECTIONS else ""
        raise ArithmeticError(f"wrong: the relative error{which} is {error:.2g}")
    return {"relative_error": error}


def timed(case: Case, name: str, direction: str, runtime: Runtime) -> Figures:
    """Return the seconds that one call takes, and what they say."""
    inputs = [[case.arrange(name, each) for each in group] for group in case.draw()]
    with case.providers[name]() as function:
        found = case.clock(function, *inputs, direction, runtime.device)
    return found | case.rates(direction, found["seconds"])


def outcome(measure: Callable[..., Figures], *arguments: Any) -> Figures:
    """Return what it measures, or the reason why it cannot."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            return measure(*arguments)
        except Exception as error:  # whatever a peer raises, the other figures are still wanted
            # PyTorch says in warnings why it refuses a backend, and in the error only that it does.
            parts = [f"{type(error).__name__}: {error}", *(str(each.message) for each in said)]
            return {"reason": "; ".join(dict.fromkeys(part.splitlines()[0][:200] for part in parts if part))[:600]}


def in_turn(clocks: Mapping[str, Callable[[], Figures]], rounds: int) -> dict[str, Figures]:
    """Return the medians of what each clock gives in `rounds` turns, or the reason that it gave in one."""
    taken: dict[str, list[Figures]] = {name: [] for name in clocks}
    for _ in range(rounds):
        for name, clock in clocks.items():
            if not any("reason" in each for each in taken[name]):
                time.sleep(REST)
                taken[name].append(clock())

    def median(found: list[Figures]) -> Figures:
        return found[-1] if "reason" in found[-1] else {k: statistics.median(f[k] for f in found) for k in found[0]}

    return {name: median(found) for name, found in taken.items()}


def median_seconds(function: Callable[[], Any], device: torch.device, *, in_a_row: bool = False) -> float:
    """Return the median seconds of one call, warmed up and repeated for a tenth of a second, at least once.

    On a GPU: time on the device, with the L2 cache emptied before each call (triton.testing.do_bench); launches are in
    it only where the host is slower than the device. `in_a_row`: of one call among many, in a CUDA graph; emptying the
    cache between them would leave it full of lines that have yet to be written, at the cost of the call that follows.
    On a CPU: wall time with all of torch's threads.
    """
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        with torch.cuda.device(device):
            if in_a_row:
                return do_bench_cudagraph(function, rep=10, return_mode="median") / 1000
            return do_bench(function, warmup=25, rep=100, return_mode="median") / 1000
    from torch.utils.benchmark import Timer

    timer = Timer("function()", globals={"function": function}, num_threads=torch.get_num_threads())
    return timer.blocked_autorange(min_run_time=0.1).median


def graph_seconds(functions: Sequence[Callable[[], Any]], device: torch.device) -> float:
    """Return the median seconds on a GPU of one of the functions, called in turn, many times over, in a CUDA graph.

    Nothing of the host is in it. The functions must have been made on the current stream, since a backward pass runs on
    that of its forward pass; together they should read more than the L2 cache holds.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream(device)
    repeats = max(1, 20 // len(functions))
    for function in functions:
        function()
    stream.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for function in list(functions) * repeats:
            function()
    times = []
    for _ in range(20):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        stream.synchronize()
        times.append(begin.elapsed_time(end) / 1000 / (repeats * len(functions)))
    return statistics.median(times[5:])


def copy_seconds(numbers: int, device: torch.device, dtype: torch.dtype = torch.float32) -> float:
    source = torch.randn(numbers, device=device, dtype=dtype)
    target = torch.empty_like(source)
    return median_seconds(lambda: target.copy_(source), device)


def copy_bandwidth(device: torch.device) -> float:
    """Return the bytes per second, read plus written, of a copy much larger than any cache."""
    numbers = 2**28 if device.type == "cuda" else 2**26
    return 2 * 4 * numbers / copy_seconds(numbers, device)


def added_memory(
    ready: Callable[[], Callable[[], Any]], runtime: Runtime, *, fresh: bool = True, threads: int | None = None
) -> int:
    """Return the most bytes that a call of what `ready` returns holds beyond what was held when it was ready.

    `fresh`: in a process of its own, where nothing is left of what ran before; a CPU's peak cannot be reset.
    """
    threads = threads or torch.get_num_threads()
    if fresh:
        with ending_together(), multiprocessing.get_context("spawn").Pool(1) as pool:
            return pool.apply(added_memory, (ready, runtime), {"fresh": False, "threads": threads})
    torch.set_num_threads(threads)
    work = ready()
    synchronize(runtime.device)
    if runtime.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(runtime.device)
    before = runtime.peak_memory()
    work()
    synchronize(runtime.device)
    return runtime.peak_memory() - before


@contextmanager
def ending_together() -> Iterator[None]:
    """Within the block SIGTERM ends this process as an error does, and with it the processes that it has started."""

    def end(number: int, frame: object) -> None:
        for child in multiprocessing.active_children():
            child.kill()
        sys.exit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def show(
    results: Iterable[Figures], name: str, runtime: Runtime, folder: Path, line: Callable[[Figures], str] | None = None
) -> tuple[Figures, Path]:
    """Write each result down as it comes, say what has no figure and why, and give the newest point a line."""
    said: set[str] = set()
    for result in results:
        path, point = write_result(name, runtime, result, folder), result["points"][-1]
        for reason in missing(point):
            if reason not in said:
                print(reason, flush=True)
                said.add(reason)
        if line is not None:
            print(line(point), flush=True)
    return result, path


def missing(point: Figures) -> list[str]:
    """Return a line for each reason why a provider has no figure, in one direction or both."""
    reasons: dict[tuple[str, str], list[str]] = {}
    groups = {direction: point[direction] for direction in DIRECTIONS if direction in point} or {"": point}
    for direction, group in groups.items():
        for name, figures in group.items():
            if isinstance(figures, dict) and "reason" in figures:
                reasons.setdefault((name, figures["reason"]), []).append(direction)
    return [
        f"{name}: {reason}" if directions == [""] else f"{name}: no {' and '.join(directions)}: {reason}"
        for (name, reason), directions in reasons.items()
    ]


def cells(figures: Figures, names: Iterable[str], shown: Callable[[Figures], str]) -> list[str]:
    """Return what a table shows of each provider: "-" where it has no figures."""
    return ["-" if "reason" in figures[name] else shown(figures[name]) for name in names]


class Panel(NamedTuple):
    """A part of a picture: a line over x for each name."""

    title: str
    x: str
    lines: dict[str, list[tuple[float, float]]]


def lines_of(points: Iterable[Figures], x: str, y: str, scale: float = 1) -> dict[str, list[tuple[float, float]]]:
    """Return x and scaled y of the points in which a name has such a figure."""
    lines: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for name, figures in point.items():
            if isinstance(figures, dict) and y in figures:
                lines.setdefault(name, []).append((point[x], scale * figures[y]))
    return lines


def plot(
    points: Sequence[Figures], column: str, x: str, y: str, scale: float, title: str, y_label: str, path: Path
) -> None:
    """Draw scaled y over x: a row of panels for each direction, a column for each value of a field of the points."""
    values = sorted({point[column] for point in points})
    panels = []
    for direction, value in product(DIRECTIONS, values):
        mine = [{x: point[x], **point[direction]} for point in points if point[column] == value]
        about = f"{direction}, {column.replace('_', ' ')} {value}"
        panels.append(Panel(about, x, lines_of(mine, x, y, scale)))
    draw(panels, len(values), title, y_label, path)


def draw(panels: Sequence[Panel], columns: int, title: str, y_label: str, path: Path) -> None:
    """Draw panels row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (1.5 + 3.6 * columns, 6.5)
    rows = len(panels) // columns
    figure, grid = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharey="row")
    legend: Figures = {}
    for axes, panel in zip(grid.flat, panels, strict=True):
        for name, line in panel.lines.items():
            (legend[name],) = axes.plot(*zip(*line, strict=True), "o-", ms=4, color=COLORS[name])
        ticks = sorted({at for line in panel.lines.values() for at, _ in line})
        axes.set_xscale("log", base=2)
        axes.set_xticks(ticks, ticks)
        axes.minorticks_off()
        axes.grid(alpha=0.25)
        axes.set(title=panel.title, xlabel=panel.x, ylabel=y_label)
    for axes in grid.flat:
        # Once all are drawn: panels of a row share their limits, and to set one settles the others.
        axes.set_ylim(bottom=0)
    figure.suptitle(title)
    figure.legend(legend.values(), legend, loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(picture := io.BytesIO(), dpi=110)
    write_atomically(path, picture.getvalue())
    pyplot.close(figure)
    print(f"drawn in {path}")


def write_result(name: str, runtime: Runtime, content: Figures, folder: Path = RESULTS) -> Path:
    """Write NAME-DEVICE.json: what ran, on what, from which commit, and when."""
    device = device_name(runtime)
    path = folder / f"{name.replace('/', '-')}-{re.sub('[^a-z0-9]+', '-', device.lower()).strip('-')}.json"
    header = {"device": device, "date": datetime.date.today().isoformat(), "versions": versions()}
    write_atomically(path, json.dumps({**header, **content}, indent=2) + "\n")
    return path


def device_name(runtime: Runtime) -> str:
    if runtime.device.type == "cuda":
        return torch.cuda.get_device_name(runtime.device)
    about = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"^model name\s*:\s*(.*\S)", about, re.MULTILINE)
    return f"{model[1] if model else 'CPU'}, {torch.get_num_threads()} threads"
