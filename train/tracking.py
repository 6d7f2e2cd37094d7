"""The numbers of a run: their means over steps and processes, and the trackers that take them.

metrics.jsonl is always written, wandb when asked for; the console (cli/console.py) is a tracker too.
"""

import contextlib
import importlib.util
import json
import math
import os
import secrets
import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from engine import records
from engine.disk import append, write_atomically
from engine.errors import InputError
from engine.laws import Forecast
from engine.processes import ALONE, Processes

Metrics = Mapping[str, Any]

WANDB_MODES = ("online", "offline", "shared", "disabled", "dryrun", "run")
# The seconds that wandb may take until it has an answer of its server, and to send the rest at the end.
BEGIN_SECONDS, END_SECONDS = 15, 60
# The one metric that is a list of numbers.
PER_PROCESS = "process_tokens_per_second"
# A run is compared with its forecast after this share of it, by the mean of so many lines or by an evaluation.
BAND_FROM, BAND_LINES = 0.01, 50


@dataclass(frozen=True)
class Record:
    """What every line of metrics.jsonl holds, beside numbers by other names."""

    step: int


# What an evaluation of text or of rewards may hold beside the loss, and how it is written for a person.
METRICS = {
    ("bits_per_byte",): "{:.4f} bits/byte",
    ("perplexity",): "perplexity {:.2f}",
    ("accuracy",): "accuracy {:.3f}",
    ("gold_accuracy",): "gold order {:.3f}",
    ("calibration_error",): "calibration error {:.3f}",
    ("reward",): "reward {:.3f}",
    ("gold",): "gold {:.3f}",
    ("kl",): "KL {:.2f}",
    ("length",): "length {:.0f}",
    ("ended",): "ended {:.2f}",
    ("chosen_mean", "chosen_std"): "chosen {:.2f} ± {:.2f}",
    ("rejected_mean", "rejected_std"): "rejected {:.2f} ± {:.2f}",
}


def evaluation_parts(metrics: Metrics, prefix: str = "") -> list[str]:
    """Return the metrics of an evaluation in words, the loss first."""
    values = {name.removeprefix(prefix): value for name, value in metrics.items() if name.startswith(prefix)}
    # In JSON, null stands for what is not finite.
    values = {name: math.nan if value is None else value for name, value in values.items()}
    return [f"loss {values.get('loss', math.nan):.4f}", *metric_parts(values)]


def metric_parts(values: Metrics) -> list[str]:
    """Return the metrics beside the loss in words."""
    return [
        form.format(*(values[name] for name in names)) for names, form in METRICS.items() if values.keys() >= set(names)
    ]


class RunningMetrics:
    """The means of metrics since they were last taken.

    Sums and counts are kept, and divided last: so a mean depends neither on how many were added at a time nor on which
    process added them.
    """

    def __init__(self) -> None:
        self.held: dict[str, tuple[Any, int]] = {}

    def add(self, sums: Metrics, count: int = 1) -> None:
        """Add sums over `count` tokens, pairs, or whatever the mean is over: numbers, or tensors not yet waited for."""
        for name, value in sums.items():
            total, number = self.held.get(name, (0.0, 0))
            self.held[name] = (total + value, number + count)

    def take(self, processes: Processes = ALONE) -> dict[str, float]:
        """Return the means over all processes, which must call it at once."""
        held, self.held = {name: (float(total), count) for name, (total, count) in self.held.items()}, {}
        everyone = processes.collect(held)
        means = {}
        for name in {name: None for each in everyone for name in each}:
            sums, counts = zip(*(each[name] for each in everyone if name in each), strict=True)
            means[name] = sum(sums) / sum(counts)
        return means


class Tracker(Protocol):
    """A tracker takes the numbers of a run, among them "step"; loss is in nats per token, times are in seconds."""

    def log(self, metrics: Metrics) -> None: ...

    def close(self) -> None: ...


class Console(Tracker, Protocol):
    """A tracker that also tells a person things."""

    def say(self, message: str) -> None: ...


class MetricsFile:
    """Writes one JSON line per logged step, whole or not. Resuming at `step` drops those that the run will write again.

    `log` raises DiskError; `notice` is told of lines that are no records.
    """

    def __init__(self, path: Path, step: int, notice: Callable[[str], None] = lambda message: None) -> None:
        kept = [json.dumps(line) for line in read_metrics(path, notice) if line["step"] <= step] if step else []
        self.path = path
        write_atomically(path, "".join(f"{line}\n" for line in kept))

    def log(self, metrics: Metrics) -> None:
        # JSON knows no NaN and no infinity; null stands for them.
        lost = {name: None for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)}
        line = json.dumps({**metrics, **lost}) + "\n"
        with contextlib.suppress(OSError), open(self.path, "ab", buffering=0) as file:
            size = file.tell()
            if file.write(line.encode()) == len(line):  # JSON is ASCII
                return
            file.truncate(size)
        append(self.path, line)  # it hardly fits now, and this says why

    def close(self) -> None: ...


class Band:
    """Says once that a run has left what is `expected` of it after so many tokens, at a share of its peak rate."""

    def __init__(self, expected: Callable[[float, float], Forecast | None], say: Callable[[str], None]) -> None:
        self.expected, self.say = expected, say
        self.told, self.rate = False, 1.0
        self.recent: list[tuple[float, float]] = []  # tokens and bits per byte

    def log(self, metrics: Metrics) -> None:
        if "validation_bits_per_byte" in metrics:
            seen = [(metrics["tokens"], metrics["validation_bits_per_byte"])]
        elif "bits_per_byte" in metrics and metrics["progress"] >= BAND_FROM:
            self.rate = metrics["rate"]
            self.recent.append((metrics["tokens"], metrics["bits_per_byte"]))
            if len(self.recent) < BAND_LINES:
                return
            seen, self.recent = self.recent, []
        else:
            return
        tokens, value = (statistics.fmean(each) for each in zip(*seen, strict=True))
        band = self.expected(tokens, self.rate)
        if band is None or band.low <= value <= band.high or self.told:
            return
        self.told = True
        side = "above" if value > band.high else "below"
        self.say(
            f"step {metrics['step']:,}: {value:.3f} bits per byte are {side} the forecast of this step, {band}: "
            "look at rates, batch and data before you go on"
        )

    def close(self) -> None: ...


def read_metrics(path: Path, notice: Callable[[str], None] = lambda message: None) -> list[dict[str, Any]]:
    """Return the records of a metrics file. `notice` is told of damaged lines, but for a last one that a crash cut."""
    found, bad = [], []
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            record = records.parse(line.decode())
            numbers = {**record, PER_PROCESS: None} if isinstance(record, dict) else record
            records.conform(numbers, dict[str, float | None], ValueError)
            records.conform(record, Record, ValueError)
            found.append(record)
        except ValueError as error:
            if number < len(lines):
                bad.append((number, error))
    if bad:
        (first, why), *more = bad
        others = f", nor are {len(more):,} lines after it" if more else ""
        notice(f"{path}, line {first} is no record of a step ({why}){others}: left out")
    return found


def require_wandb() -> None:
    if importlib.util.find_spec("wandb") is None:
        raise InputError("--wandb needs the wandb package: pip install wandb")
    if (mode := os.environ.get("WANDB_MODE")) and mode not in WANDB_MODES:
        raise InputError(f"WANDB_MODE is {mode!r}; wandb knows {', '.join(WANDB_MODES)}")


class Wandb:
    """Weights & Biases. Without a login or an answer it is offline, in the run's folder; `wandb sync` sends it later.

    Whatever goes wrong with it is said, and training goes on.
    `earlier` is what the run has logged before this process. What a killed process has not sent of it is sent now.
    """

    lost = False

    def __init__(
        self, folder: Path, name: str, config: Metrics, say: Callable[[str], None], earlier: Sequence[Metrics] = ()
    ) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if mode is None and not (os.environ.get("WANDB_API_KEY") or _has_login()):
            mode = "offline"
            say("wandb: no login found, so it records offline; send it later with `wandb sync`")
        # A resumed run has the same id, so that it stays one curve.
        identity = folder / "wandb-id"
        if not identity.exists():
            write_atomically(identity, secrets.token_hex(4))
        about: dict[str, Any] = {"name": name, "dir": str(folder), "id": identity.read_text().strip()}
        wait: dict[str, Any] = {} if "WANDB_INIT_TIMEOUT" in os.environ else {"init_timeout": BEGIN_SECONDS}

        def begin(mode: Any) -> Any:
            settings = wandb.Settings(silent=True, console="off", **wait)
            return wandb.init(project="gpt", resume="allow", config=dict(config), settings=settings, mode=mode, **about)

        self.say = say
        try:
            self.run = begin(mode)
        except Exception as error:  # no network, no such key, no such setting, each with a class of its own
            reason = str(error).strip().partition("\n")[0]
            say(f"wandb: {reason}; so it records offline; send it later with `wandb sync`")
            # Else wandb would go on to hold that the run is in use.
            wandb.teardown()
            self.run = begin("offline")
        # wandb's own steps only grow, and it drops what is logged at an earlier one, as after a resume. So they count
        # lines here, and every metric is drawn over the step that its line holds.
        self.run.define_metric("*", step_metric="step")
        # Offline, nobody knows which lines have reached the disk. A line that comes twice is drawn once, at its step.
        sent = self.run.summary.get("step", 0)
        for metrics in earlier:
            if metrics["step"] > sent:
                self.log(metrics)

    def log(self, metrics: Metrics) -> None:
        self._try(lambda: self.run.log(dict(metrics)))

    def close(self) -> None:
        # It would wait for a server that is gone, for days.
        ending = threading.Thread(target=self._try, args=(self.run.finish,), daemon=True)
        ending.start()
        ending.join(END_SECONDS)
        if ending.is_alive():
            self.say(f"wandb: no answer; send the rest later: wandb sync {Path(self.run.dir).parent}")

    def _try(self, work: Callable[[], object]) -> None:
        """Do this as long as wandb lives."""
        if not self.lost:
            try:
                work()
            except Exception as error:  # its own process was killed, say
                self.lost = True
                self.say(f"wandb: {error!r}; training goes on without it")


def _has_login() -> bool:
    import netrc

    try:
        return any("wandb" in host for host in netrc.netrc().hosts)
    except (OSError, netrc.NetrcParseError):
        return False
