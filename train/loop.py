"""The one training loop: what every stage of training runs, whatever its data and its loss."""

import contextlib
import copy
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.config import Recipe
from engine.run import Run
from engine.runtime import Runtime, random_state, set_random_state, synchronize
from train.averages import Measures
from train.data.loader import IGNORE_INDEX, Batch
from train.evaluate import spelled_bytes
from train.optimizer import Optimizer
from train.parallel import (
    Helm,
    Layout,
    Objective,
    blocks,
    distribute,
    share_like,
    shares_on_host,
    synchronised,
    whole,
    whole_on_host,
)
from train.schedule import Budget, rate_factor
from train.tracking import Tracker

# So many steps in a row without a finite gradient, and the run is lost.
NONFINITE_LIMIT = 5
# Evaluations over a run where their number is not set, and the share of its time that they may take.
EVALUATIONS = 10
EVALUATION_SHARE = 0.05
LONG_RUN_SECONDS = 3600


class TrainingError(Exception):
    """The run cannot go on. The message says why, and which checkpoint is good."""


class Batches(Protocol):
    """An endless stream of micro-batches, of this process's part of each, and a cursor: what has been handed out."""

    @property
    def epoch(self) -> float: ...

    @property
    def tokens(self) -> int:
        """Inputs of all processes in what has been handed out, padding left out."""
        ...

    def __next__(self) -> Batch: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Task:
    """What a stage brings to the loop."""

    # Sum of the loss over a batch's targets, in nats.
    loss: Callable[[Any, Batch], Tensor]
    batches: Batches
    # Measures the model: {"loss": ...} and more. `final` asks for the thorough version.
    evaluate: Callable[[Any, bool], dict[str, float]]
    # Writes down what the model says at this step.
    sample: Callable[[Any, int], None]
    # UTF-8 bytes that each piece spells, int64 [vocab]: for bits per byte, where the loss is one of text.
    byte_lengths: Tensor | None = None
    # What the loss and the batches measured since the last call, for the log.
    measures: Measures = field(default_factory=Measures)
    # A second model that the loss trains: PPO's critic. Saved beside the first.
    critic: nn.Module | None = None


@dataclass(frozen=True)
class Outcome:
    step: int
    # The signal that stopped the run before its end, if one did.
    stopped_by: signal.Signals | None
    evaluation: dict[str, float]
    checkpoint: checkpoint.Checkpoint


class Loop:
    """Trains `model` on `task` until the budget is spent. Resumes to the bit from what it saved."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        recipe: Recipe,
        budget: Budget,
        run: Run,
        runtime: Runtime,
        tracker: Tracker,
        peak_flops: float,
        flops_per_token: int,
        layout: Layout | None = None,
    ) -> None:
        self.model, self.task, self.recipe, self.budget = model, task, recipe, budget
        self.run, self.runtime, self.tracker = run, runtime, tracker
        self.processes, self.layout = runtime.processes, layout or Layout()
        self.peak_flops, self.flops_per_token = peak_flops, flops_per_token
        # Nobody can evaluate a share of a model: the main process fills this one with the weights it has just saved.
        self.evaluated = copy.deepcopy(model) if self.layout.shard and self.processes.main else model
        self.trained = nn.ModuleDict({"policy": model, "critic": task.critic}) if task.critic else model
        loss = task.loss
        self.compiled_blocks: list[nn.Module] = []
        if should_compile(recipe, runtime):
            # Where compiling fails (no C compiler, say), run that part as it is.
            torch._dynamo.config.suppress_errors = True
            if self.processes.count == 1:
                loss = torch.compile(loss)
            else:
                # One by one, so that their gradients travel while those of the next are computed.
                self.compiled_blocks = blocks(self.trained)
        for block in self.compiled_blocks:
            block.compile()
        self.objective = distribute(Objective(self.trained, model, loss), runtime, self.layout)
        self.optimizer = Optimizer(self.trained, recipe.optimizer, matmul_dtype=muon_dtype(runtime))
        self.scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.byte_lengths = None if task.byte_lengths is None else task.byte_lengths.to(runtime.device)
        self.accumulation = recipe.loop.batch // (recipe.loop.micro_batch or recipe.loop.batch)
        self.parts = self.layout.parts  # into how many each micro-batch is cut, for want of memory
        self.step = 0
        self.under_way = 0  # the step that is done, or was done last
        self.busy_seconds = 0.0  # of that step, until gradients were exchanged
        self.earlier_seconds = 0.0
        self.began: float | None = None
        self.helm = Helm(self.processes)
        self.last_save = self.helm.now()
        self.step_seconds: deque[float] = deque(maxlen=50)
        self.skipped = 0
        self.skipped_in_a_row = 0
        self.announced = False
        self.unlogged: Callable[[], None] | None = None
        self.evaluation_seconds = 0.0
        self.saver = checkpoint.Saver(run.checkpoints, recipe.loop.keep, self.processes)

    def resume(self, found: checkpoint.Checkpoint) -> None:
        """Take everything from a checkpoint: the steps that follow are those of a run that never stopped."""
        for name, module in self._modules().items():
            room = module.state_dict()
            weights = found.tensors(name)
            module.load_state_dict({key: share_like(room.get(key, weight), weight) for key, weight in weights.items()})
        self.optimizer.load_state(found.tensors("optimizer"))
        set_random_state(found.tensors("random"), self.runtime.device)
        state = found.values("state")
        self.step, self.skipped, parts = (state[key] for key in ("step", "skipped", "parts"))
        self.parts = parts if self.processes.count == 1 else self.layout.parts
        self.earlier_seconds = state["seconds"]
        self.task.batches.load_state_dict(state["batches"])
        if self.processes.main:
            checkpoint.set_aside_newer(self.run.checkpoints, found.step)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        self.saver.saved = found

    def _modules(self) -> dict[str, nn.Module]:
        """All that is trained, by the names of its files."""
        return {"model": self.model, **({"critic": self.task.critic} if self.task.critic else {})}

    @property
    def seconds(self) -> float:
        """Of training so far: evaluations and checkpoints included, over all resumes."""
        return self.earlier_seconds + (0.0 if self.began is None else self.helm.now() - self.began)

    def train(self) -> Outcome:
        """Run to the end of the budget, or until Ctrl-C or SIGTERM.

        Raises TrainingError where the loss is lost, LostProcessError where another process is.
        """
        try:
            with contextlib.closing(self.saver), _stop_on_signal(self.helm):
                return self._train()
        except RuntimeError as error:
            if self.processes.count == 1 or _is_out_of_memory(error):
                raise
            raise self.processes.lost(error) from error

    def _train(self) -> Outcome:
        self.model.train()
        self._agree()
        self.began = self.last_save = self.helm.now()
        while (before := self._progress()) < 1 and self.helm.stop is None:
            self._train_step(before)
            after = self._progress()
            evaluate = after < 1 and self.helm.stop is None and self._evaluation_due(before, after)
            if evaluate or self._checkpoint_due():
                # Saved first: whatever goes wrong in an evaluation, the training is not lost.
                self._save()
            if evaluate:
                self._evaluate(final=False)
        # However the run ends, its last line is that of its last step.
        self._log_step()
        if self.helm.stop is not None:
            self.tracker.say(f"{self.helm.stop.name}: stopping after step {self.step:,}, saving")
        saved = self.saver.collect()
        if saved is None or saved.step != self.step:
            self._save()
        evaluation = self._evaluate(final=True) if self.helm.stop is None else {}
        return Outcome(self.step, self.helm.stop, evaluation, self._saved())

    def _agree(self) -> None:
        self.processes.at(f"step {self.under_way}, all-gather of clocks and signals")
        self.helm.agree()

    def _gather(self, what: str, *numbers: float) -> list[list[float]]:
        self.processes.at(f"step {self.under_way}, all-gather of {what}")
        return self.processes.gather(*numbers)

    def _progress(self) -> float:
        return self.budget.progress(self.step, self.seconds)

    def _evaluation_due(self, before: float, after: float) -> bool:
        """Every so many steps where that was asked for; else EVALUATIONS times over the run, if the time allows."""
        if self.recipe.loop.evaluate_every is not None:
            return self.step % self.recipe.loop.evaluate_every == 0
        due = math.floor(after * EVALUATIONS) > math.floor(before * EVALUATIONS)
        return due and self.evaluation_seconds <= EVALUATION_SHARE * self.seconds

    def _checkpoint_due(self) -> bool:
        if self.recipe.loop.save_every is not None:
            return self.step % self.recipe.loop.save_every == 0
        return self.helm.now() - self.last_save > 60 * self.recipe.loop.save_minutes

    def _train_step(self, progress: float) -> None:
        begin = time.perf_counter()
        self.under_way = self.step + 1
        before = self.task.batches.tokens
        batches = [next(self.task.batches) for _ in range(self.accumulation)]
        tokens = self.task.batches.tokens - before
        # Counted before they travel: on a GPU it would make the CPU wait.
        mine = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in batches)
        self.busy_seconds = time.perf_counter() - begin
        learnt = int(sum(count for (count,) in self._gather("counts of targets", mine)))
        batches = [batch.to(self.runtime.device) for batch in batches]
        loss, norm = self._gradients(batches, learnt)
        self.optimizer.set_rate(rate_factor(self.recipe.schedule, progress))
        self._apply(loss, norm)
        self.step += 1
        self.step_seconds.append(time.perf_counter() - begin)
        rate = rate_factor(self.recipe.schedule, progress)
        self.unlogged = partial(self._log, batches, tokens, learnt, loss, norm, rate)
        if self.step % self.recipe.loop.log_every == 0 or self.step == 1:
            self._log_step()
        if not self.announced and (self.step == 10 or self.seconds > 60):
            self._announce_long_run()

    def _log_step(self) -> None:
        """Log the step that was done last, once."""
        if self.unlogged:
            self.unlogged()
        self.unlogged = None

    def _log(self, batches: list[Batch], tokens: int, learnt: int, loss: float, norm: float, rate: float) -> None:
        spelled = 0
        if self.byte_lengths is not None:
            spelled = spelled_bytes(torch.cat([batch.targets for batch in batches]), self.byte_lengths)
        mine = sum(len(batch.tokens) for batch in batches)
        everyone = self._gather("measures", mine, spelled, self.busy_seconds)
        spelled = int(sum(theirs for _, theirs, _ in everyone))
        of_text = {} if self.byte_lengths is None else {"bits_per_byte": loss * learnt / math.log(2) / max(spelled, 1)}
        typical = statistics.median(self.step_seconds)
        of_processes = {}
        if self.processes.count > 1:
            busy = [seconds for _, _, seconds in everyone]
            of_processes = {
                "process_tokens_per_second": [share / seconds for share, _, seconds in everyone],
                # 1 where all are as fast as the typical one, which waits for what is above.
                "straggling": max(busy) / statistics.median(busy),
            }
        self.tracker.log(
            {
                "step": self.step,
                "loss": loss,
                **of_text,
                **self.task.measures.take(self.processes),
                "gradient_norm": norm,
                "rate": rate,
                "epoch": self.task.batches.epoch,
                "tokens": self.task.batches.tokens,
                "tokens_per_second": tokens / typical,
                "mfu": tokens / typical * self.flops_per_token / self.peak_flops,
                "seconds": self.seconds,
                "seconds_left": self.budget.seconds_left(self.step, self.seconds, typical),
                "progress": self._progress(),
                "skipped": self.skipped,
                **of_processes,
            }
        )

    def _announce_long_run(self) -> None:
        self.announced = True
        left = self.budget.seconds_left(self.step, self.seconds, statistics.median(self.step_seconds))
        if self.budget.steps is not None and left > LONG_RUN_SECONDS:
            self.tracker.say(
                f"the whole recipe takes about {left / 3600:,.1f} hours on this machine; "
                "Ctrl-C stops and saves it, and --minutes N trains for N minutes with the schedule fitted to them"
            )

    def _gradients(self, batches: list[Batch], learnt: float) -> tuple[float, float]:
        """Leaves the gradient of the mean loss in the parameters. Returns that loss and the gradient's norm."""
        # Of one process, on average: theirs are the gradients and the losses that are averaged.
        learnt /= self.processes.count
        total = self._passes(batches, learnt)
        while total is None:
            self._halve(batches)
            total = self._passes(batches, learnt)
        for optimizer in self.optimizer.optimizers:
            self.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.recipe.optimizer.clip)
        # Before anything waits for the GPU, which would wait without a word for a process that does not come.
        self._agree()
        return float(self.processes.sum(total)) / self.processes.count, float(whole(norm))

    def _passes(self, batches: list[Batch], learnt: float) -> Tensor | None:
        """Forward and backward of every part; None where memory ran out, with nothing of the failed pass kept alive."""
        begin, measured = time.perf_counter(), self.task.measures.held.copy()
        total = torch.zeros((), device=self.runtime.device)
        parts = [part for batch in batches for part in batch.split(self.parts)]
        weights = [1.0] * len(parts)
        if self.layout.shard and self.parts > 1:
            # Weights of a shared model travel for every part: all processes take as many, however theirs could be cut.
            idle = int(max(count for (count,) in self._gather("counts of parts", len(parts)))) - len(parts)
            parts, weights = [min(parts, key=lambda part: len(part.tokens))] * idle + parts, [0.0] * idle + weights
        try:
            for number, (part, weight) in enumerate(zip(parts, weights, strict=True), 1):
                last = number == len(parts)
                with synchronised(self.objective, last):
                    # Normalised by the count of the whole step, so that the cut into parts does not matter.
                    loss = weight * self.objective(part) / learnt
                    if last and self.processes.count > 1:
                        self.processes.at(f"step {self.under_way}, reduction of gradients")
                        # From here on each is as fast as the slowest.
                        synchronize(self.runtime.device)
                        self.busy_seconds += time.perf_counter() - begin
                    self.scaler.scale(loss).backward()
                    total += loss.detach()
        except RuntimeError as error:
            # Of many processes one cannot begin again alone: the others wait for its gradients.
            if not _is_out_of_memory(error) or self.processes.count > 1:
                raise
            # The step is repeated: what it has measured so far would count twice.
            self.task.measures.held = measured
            return None
        return total

    def _halve(self, batches: list[Batch]) -> None:
        self.optimizer.zero_grad()
        if self.runtime.device.type == "cuda":
            torch.cuda.empty_cache()

        def largest(parts: int) -> int:
            return max(len(part.tokens) for batch in batches for part in batch.split(parts))

        # From so many parts on, each holds one sequence.
        before, most = largest(self.parts), max(len(batch.tokens) for batch in batches)
        while self.parts < most and largest(self.parts) == before:
            self.parts *= 2
        tokens = largest(self.parts)
        if tokens == before:
            raise TrainingError(
                f"out of memory even with {tokens:,} tokens at a time, which cannot be cut further; use a smaller "
                "model (--set model.width=N) or a shorter context (--set model.context=N)"
            )
        self.tracker.say(
            f"out of memory: from now on up to {tokens:,} tokens at a time instead of {before:,}; "
            "the step is repeated and the batch stays the same"
        )

    def _apply(self, loss: float, norm: float) -> None:
        """Take the optimizer step, or skip it where loss or gradient is not finite."""
        if math.isfinite(loss) and math.isfinite(norm):
            self.skipped_in_a_row = 0
            for optimizer in self.optimizer.optimizers:
                self.scaler.step(optimizer)
        else:
            self.skipped += 1
            # With loss scaling an overflow is how the scale finds its level, not a failure of the run.
            self.skipped_in_a_row += 0 if self.scaler.is_enabled() and self.scaler.get_scale() > 1 else 1
            self.tracker.say(f"step {self.step + 1}: loss {loss}, gradient norm {norm}; the step is skipped")
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.skipped_in_a_row >= NONFINITE_LIMIT:
            saved = self.saver.collect()
            good = "none was saved yet" if saved is None else str(saved.path)
            raise TrainingError(
                f"{NONFINITE_LIMIT} steps in a row without a finite gradient; the last good checkpoint is kept "
                f"({good}). Lower the learning rates (--set optimizer.matrix_rate=..., optimizer.embedding_rate=...) "
                "or use --precision fp32"
            )

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "skipped": self.skipped,
            "parts": self.parts,
            "batches": self.task.batches.state_dict(),
            "scaler": self.scaler.state_dict(),
        }
        tensors = {name: whole_on_host(module, self.processes) for name, module in self._modules().items()}
        tensors["random"] = random_state(self.runtime.device)
        self.saver.start(self.step, tensors, {"state": state}, shares_on_host(self.optimizer.state()))
        self.last_save = self.helm.now()

    def _saved(self) -> checkpoint.Checkpoint:
        saved = self.saver.collect()
        assert saved is not None
        return saved

    def _evaluate(self, *, final: bool) -> dict[str, float]:
        """What the main process measures of the checkpoint that was saved last."""
        begin = self.helm.now()
        self.processes.at(f"step {self.under_way}, evaluation")
        evaluation = self.processes.from_main(lambda: self._measure(final))
        self._agree()
        self.evaluation_seconds += self.helm.now() - begin
        return evaluation

    def _measure(self, final: bool) -> dict[str, float]:
        model, evaluation = self.evaluated, {}
        try:
            if self.layout.shard:
                model.load_state_dict(self._saved().tensors("model"))
                model.to(self.runtime.device)
            # Compiled blocks know the shapes of training alone.
            with torch.compiler.set_stance("force_eager") if self.compiled_blocks else contextlib.nullcontext():
                evaluation = self.task.evaluate(model, final)
                self._saved().record_evaluation(evaluation)
                measured = {f"validation_{name}": value for name, value in evaluation.items()}
                self.tracker.log({"step": self.step, "tokens": self.task.batches.tokens, **measured})
                self.task.sample(model, self.step)
        except RuntimeError as error:
            if not _is_out_of_memory(error):
                raise
            evaluation = {}
            self.tracker.say("out of memory while evaluating: left out; the checkpoint is saved")
        if self.layout.shard:
            model.to("cpu")
        return evaluation


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def should_compile(recipe: Recipe, runtime: Runtime) -> bool:
    """torch.compile, where nothing else was asked for: on a GPU. On a CPU its start-up of a minute does not pay."""
    return runtime.device.type == "cuda" if recipe.loop.compile is None else recipe.loop.compile


def muon_dtype(runtime: Runtime) -> torch.dtype:
    """What the optimizer multiplies in: bf16 where it is native, as Muon is meant to; fp16 would overflow."""
    return torch.bfloat16 if runtime.precision == "bf16" else torch.float32


@contextlib.contextmanager
def _stop_on_signal(helm: Helm) -> Iterator[None]:
    """Ctrl-C or SIGTERM asks the loop to stop after its step; a second one stops at once.

    The handler only takes note: printing from it could break into a print that is under way.
    """
    watched = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.getsignal(number) for number in watched}

        def request(number: int, frame: object) -> None:
            helm.own_signal = signal.Signals(number)
            for each in watched:
                signal.signal(each, before[each])

        for number in watched:
            signal.signal(number, request)
    except ValueError:
        # Not the main thread: nobody can interrupt here, and Python would not let us listen.
        yield
        return
    try:
        yield
    finally:
        for number in watched:
            signal.signal(number, before[number])
