"""The one training loop: what every stage of training runs, whatever its data and its loss.

It reads downward: `Loop.train` takes steps until the budget is spent, and `_train_step` is one of them.
"""

import contextlib
import copy
import math
import signal
import statistics
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from engine import checkpoint
from engine.errors import DiskError, InputError, UnfinishedError
from engine.model import GPT
from engine.processes import Coordinator, peak_memory
from engine.run import Run
from engine.runtime import Runtime, is_out_of_memory, random_state, set_random_state, synchronize
from train import parallel
from train.data.loader import IGNORE_INDEX, Batch
from train.optimizer import Optimizer, muon_dtype, rate_factor
from train.stage import Outcome, Stage, State, TrainingError
from train.tracking import PER_PROCESS, Metrics, Tracker

# A run fails after this many steps in a row without a finite gradient.
NONFINITE_LIMIT = 5
# The number of evaluations in a run unless the recipe sets another, and the largest fraction of its time for them.
EVALUATIONS = 10
EVALUATION_SHARE = 0.05
# The most tokens that an evaluation reads at a time.
EVALUATION_BATCH_TOKENS = 8192
LONG_RUN_SECONDS = 3600


def packed_loss(model: GPT, batch: Batch) -> Tensor:
    """Return the next-token loss of packed sequences, summed, in nats."""
    return model.loss(batch.tokens, batch.targets, cu_seqlens=batch.cu_seqlens, max_seqlen=batch.max_seqlen)


def spelled_bytes(targets: Tensor, byte_lengths: Tensor) -> int:
    """Return the number of UTF-8 bytes that these targets spell (IGNORE_INDEX spells none)."""
    return int((byte_lengths[targets.clamp(min=0)] * (targets != IGNORE_INDEX)).sum())


class Loop:
    """Trains `model` as its stage says until the budget is spent. Resumes to the bit from what it saved."""

    def __init__(
        self,
        model: GPT,
        stage: Stage,
        run: Run,
        runtime: Runtime,
        trackers: Sequence[Tracker],
        say: Callable[[str], None],
    ) -> None:
        recipe = stage.recipe
        self.model, self.stage, self.recipe, self.budget = model, stage, recipe, stage.budget
        self.run, self.runtime, self.processes = run, runtime, runtime.processes
        self.trackers, self.say = trackers, say
        self.layout = parallel.lay_out(recipe, runtime)
        # A shard of a model cannot be evaluated. So the main process keeps a whole copy, and before each evaluation
        # loads into it the weights that were just saved. Without sharding the model itself is evaluated.
        self.evaluated = copy.deepcopy(model) if self.layout.shard and self.processes.main else model
        # `modules` are saved, each in the file of its name. `trained` is all of them as one module: for the optimizer,
        # and for DDP or FSDP.
        self.modules: dict[str, nn.Module] = {"model": model} | ({"critic": stage.critic} if stage.critic else {})
        self.trained = nn.ModuleDict({"policy": model, "critic": stage.critic}) if stage.critic else model
        # The loss is compiled first, then made a module (`objective`) for DDP or FSDP to wrap.
        loss, self.compiled = stage.loss or packed_loss, parallel.should_compile(recipe, runtime)
        if self.compiled:
            loss = parallel.compile_loss(loss, self.trained, self.processes)
        objective = parallel.Objective(self.trained, model, loss)
        # The optimizer must be made after this line, because sharding replaces the parameters.
        self.objective = parallel.distribute(objective, runtime, self.layout)
        scaler = torch.amp.GradScaler(runtime.device.type, enabled=runtime.precision == "fp16")
        self.optimizer = Optimizer(self.trained, recipe.optimizer, matmul_dtype=muon_dtype(runtime), scaler=scaler)
        self.byte_lengths = None if stage.byte_lengths is None else stage.byte_lengths.to(runtime.device)
        self.flops_per_token = recipe.flops_per_token
        self.accumulation = recipe.loop.batch // (recipe.loop.micro_batch or recipe.loop.batch)
        self.parts = self.layout.parts  # each micro-batch is cut into this many, when memory is short
        self.step = self.skipped = self.skipped_in_a_row = 0
        self.coordinator = Coordinator(self.processes, stage.batches.give_up)
        # Seconds of training before the last resume; seconds spent in evaluations; and seconds that this process worked
        # in the current step before the gradients are reduced, where it waits for the others.
        self.earlier_seconds = self.evaluation_seconds = self.busy_seconds = 0.0
        self.began = self.last_save = self.coordinator.now()
        self.step_seconds: deque[float] = deque(maxlen=50)
        self.unlogged: Callable[[], None] | None = None
        self.announced = False
        identity = run.identity(recipe) if self.processes.main else {}
        self.saver = checkpoint.Saver(run.checkpoints, recipe.loop.keep, self.processes, identity)
        # What the disk has refused for good, and why: the run then stops, saved.
        self.unwritten: list[Callable[[], object]] = []
        self.refusal: DiskError | None = None

    def on_step(self, step: int) -> None:
        """Do nothing. It is called after each optimizer step, for a subclass that watches or stops the run."""

    def resume(self, found: checkpoint.Checkpoint) -> None:
        """Take everything from a checkpoint: the next steps are the same as in a run that never stopped."""
        for name, module in self.modules.items():
            own = module.state_dict()
            weights = found.tensors(name).items()
            module.load_state_dict({key: parallel.share_like(own.get(key, each), each) for key, each in weights})
        state = found.values("state", State)
        self.optimizer.load_state(found.tensors("optimizer"), state.scaler)
        set_random_state(found.tensors("random"), self.runtime.device)
        self.step, self.skipped, self.earlier_seconds = state.step, state.skipped, state.seconds
        self.parts = state.parts if self.processes.count == 1 else self.layout.parts
        self.stage.batches.load_state_dict(state.batches)
        if self.processes.main:
            checkpoint.set_aside_newer(self.run.checkpoints, found.step)
        self.saver.saved = found

    @property
    def seconds(self) -> float:
        """Return the seconds of training so far: evaluations and checkpoints included, over all resumes."""
        return self.earlier_seconds + (self.coordinator.now() - self.began)

    @property
    def progress(self) -> float:
        """Return the fraction of the budget that is spent."""
        return self.budget.progress(self.step, self.seconds)

    def train(self) -> Outcome:
        """Run to the end of the budget, or until a signal asks for a stop.

        Raises TrainingError when the loss stays not finite, LostProcessError when another process has died, DiskError
        when the disk refuses a checkpoint twice, or another file of the run: that one only after a checkpoint.
        """
        try:
            with contextlib.closing(self.saver), self.coordinator.listening():
                return self._train()
        except InputError as error:  # of damaged data, say
            self.processes.refuse(error)
            raise
        except RuntimeError as error:
            if self.processes.count == 1 or is_out_of_memory(error):
                raise
            raise self.processes.lost(error) from error

    def _train(self) -> Outcome:
        self.model.train()
        self.coordinator.agree()
        self.began = self.last_save = self.coordinator.now()
        while (before := self.progress) < 1 and self.coordinator.stop is None:
            if not self._train_step(before):
                break
            self.on_step(self.step)
            after = self.progress
            evaluate = after < 1 and self.coordinator.stop is None and self._evaluation_due(before, after)
            if evaluate or self._checkpoint_due():
                # It is saved before the evaluation, so that an error there does not cost any training.
                self._save()
            if evaluate:
                self._evaluate(final=False)
        # The last step is logged even if log_every did not ask for it.
        self._log_step()
        stop = self.coordinator.stop
        if stop is not None:
            self.say(f"{self.refusal or stop.name}: stopping after step {self.step:,}, saving")
        saved = self._saved()
        evaluation = self._evaluate(final=True) if stop is None else {}
        self.processes.from_main(self._write_rest)
        return Outcome(self.step, stop, evaluation, saved)

    def _evaluation_due(self, before: float, after: float) -> bool:
        """Return whether to evaluate: every evaluate_every steps, or else EVALUATIONS times, if the time allows."""
        if self.recipe.loop.evaluate_every is not None:
            return self.step % self.recipe.loop.evaluate_every == 0
        due = math.floor(after * EVALUATIONS) > math.floor(before * EVALUATIONS)
        return due and self.evaluation_seconds <= EVALUATION_SHARE * self.seconds

    def _checkpoint_due(self) -> bool:
        writing = self.saver.writing
        # One that the disk has refused is made up for at once. Several processes learn of it at the next one, together.
        if self.processes.count == 1 and writing is not None and writing.done() and writing.exception():
            return True
        if self.recipe.loop.save_every is not None:
            return self.step % self.recipe.loop.save_every == 0
        return self.coordinator.now() - self.last_save > 60 * self.recipe.loop.save_minutes

    def _train_step(self, progress: float) -> bool:
        """Train on the next batch. Return False, with nothing done, where the data is given up for a stop."""
        begin, batches = time.perf_counter(), self.stage.batches
        self.processes.step = self.step + 1
        before = batches.tokens
        place = batches.state_dict() if self.recipe.data.stream and self.processes.count == 1 else None
        try:
            taken = [next(batches) for _ in range(self.accumulation)]
        except UnfinishedError:
            if place is None or self.coordinator.stop is None:
                raise
            batches.load_state_dict(place)
            return False
        tokens = batches.tokens - before
        # The targets are counted before the batches travel to the GPU. There the count would be a result of the GPU,
        # and the CPU would have to wait for it before it could start the first kernel of the step.
        # `own` are the targets of this process, `learnt` those of all processes together.
        own = sum(int((batch.targets != IGNORE_INDEX).sum()) for batch in taken)
        self.busy_seconds = time.perf_counter() - begin
        learnt = int(sum(count for (count,) in self.processes.gather(own, of="counts of targets")))
        taken = [batch.to(self.runtime.device) for batch in taken]
        loss, norm = self._gradients(taken, learnt)
        rate = rate_factor(self.recipe.schedule, progress)
        self.optimizer.set_rate(rate)
        self._apply(loss, norm)
        self.step += 1
        self.step_seconds.append(time.perf_counter() - begin)
        self.unlogged = partial(self._log, taken, tokens, learnt, loss, norm, rate)
        if self.step % self.recipe.loop.log_every == 0 or self.step == 1:
            self._log_step()
        if not self.announced and (self.step == 10 or self.seconds > 60):
            self._announce_long_run()
        return True

    def _gradients(self, batches: list[Batch], learnt: float) -> tuple[float, float]:
        """Leave the gradient of the mean loss in the parameters. Return that loss and the gradient's norm."""
        # DDP and FSDP average the gradients of all processes, while the mean loss needs their sum. So each process
        # divides by the targets of an average process instead of by those of all: the two divisions cancel out.
        learnt /= self.processes.count
        while (total := self._passes(batches, learnt)) is None:
            self._halve(batches)
        norm = self.optimizer.clip(self.recipe.optimizer.clip)
        # This must come before anything waits for the GPU. If a process has died, this collective fails with an error,
        # while the GPU would wait for the gradients of that process in silence.
        self.coordinator.agree()
        return float(self.processes.sum(total)) / self.processes.count, float(parallel.whole(norm))

    def _passes(self, batches: list[Batch], learnt: float) -> Tensor | None:
        """Run forward and backward of every part and return the loss; None if memory ran out.

        It returns None instead of trying again itself: only after the return are the tensors of the failed pass freed.
        """
        begin, measured = time.perf_counter(), self.stage.metrics.held.copy()
        total = torch.zeros((), device=self.runtime.device)
        parts = [part for batch in batches for part in batch.split(self.parts)]
        idle = parallel.missing_parts(len(parts), self.processes) if self.layout.shard and self.parts > 1 else 0
        # With FSDP every process must run equally many passes. A process that has `idle` parts fewer than another first
        # repeats its smallest part that often with the weight 0, which changes neither the loss nor the gradient.
        weighted = [(min(parts, key=lambda part: len(part.tokens)), 0.0)] * idle + [(part, 1.0) for part in parts]
        try:
            for number, (part, weight) in enumerate(weighted, 1):
                last = number == len(weighted)
                with parallel.synchronised(self.objective, last):
                    # Divided by the targets of the whole step, so that the cut into parts does not matter.
                    loss = weight * self.objective(part) / learnt
                    if last and self.processes.count > 1:
                        self.processes.at("reduction of gradients")
                        # From here on each process waits for the slowest one, so its own time is taken now.
                        synchronize(self.runtime.device)
                        self.busy_seconds += time.perf_counter() - begin
                    self.optimizer.scaler.scale(loss).backward()
                    total += loss.detach()
        except RuntimeError as error:
            # One of several processes cannot repeat the step alone, because the others wait for its gradients.
            if not is_out_of_memory(error) or self.processes.count > 1:
                raise
            # The step is repeated, so what it has measured up to here would count twice.
            self.stage.metrics.held = measured
            return None
        return total

    def _halve(self, batches: list[Batch]) -> None:
        """Cut micro-batches into twice as many parts, or more, until the largest part has become smaller."""
        self.optimizer.zero_grad()
        torch.cuda.empty_cache()

        def largest(parts: int) -> int:
            return max(len(part.tokens) for batch in batches for part in batch.split(parts))

        # A part is at least one sequence, so twice as many parts need not be smaller; with as many parts as tokens each
        # part is one sequence. What is learnt stays the same: no sequence is cut, so every token sees what it saw
        # before, and the losses of the parts add up to that of the whole.
        before, most = largest(self.parts), max(len(batch.tokens) for batch in batches)
        while self.parts < most and largest(self.parts) == before:
            self.parts *= 2
        tokens = largest(self.parts)
        if tokens == before:
            raise TrainingError(
                f"out of memory even with {tokens:,} tokens at a time, which cannot be cut further; use a smaller "
                "model (--set model.width=N) or a shorter context (--set model.context=N)"
            )
        self.say(
            f"out of memory: from now on up to {tokens:,} tokens at a time instead of {before:,}; "
            "the step is repeated and the batch stays the same"
        )

    def _apply(self, loss: float, norm: float) -> None:
        """Take the optimizer step, or skip it if the loss or the gradient is not finite."""
        finite = math.isfinite(loss) and math.isfinite(norm)
        if finite:
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            # With fp16 the loss scale begins too high on purpose. At each overflow the scaler lowers it, and the step
            # is skipped. Such steps are normal, and count towards NONFINITE_LIMIT only if the scale cannot be lowered.
            self.skipped_in_a_row += 0 if self.optimizer.scaling else 1
            self.say(f"step {self.step + 1}: loss {loss}, gradient norm {norm}; the step is skipped")
        self.optimizer.step(skip=not finite)
        self.optimizer.zero_grad()
        if self.skipped_in_a_row >= NONFINITE_LIMIT:
            saved = self.saver.collect()
            good = "none was saved yet" if saved is None else str(saved.path)
            raise TrainingError(
                f"{NONFINITE_LIMIT} steps in a row without a finite gradient; the last good checkpoint is kept "
                f"({good}). Lower the learning rates (--set optimizer.matrix_rate=..., optimizer.embedding_rate=...) "
                "or use --precision fp32"
            )

    def _log_step(self) -> None:
        """Log the step that was done last, once."""
        if self.unlogged:
            self.unlogged()
        self.unlogged = None

    def _log(self, batches: list[Batch], tokens: int, learnt: int, loss: float, norm: float, rate: float) -> None:
        spelled = 0
        if self.byte_lengths is not None:
            spelled = spelled_bytes(torch.cat([batch.targets for batch in batches]), self.byte_lengths)
        # `own` are the tokens of this process, padding included; `tokens` those of all processes, without padding.
        own = sum(len(batch.tokens) for batch in batches)
        everyone = self.processes.gather(
            own, spelled, self.busy_seconds, peak_memory(self.runtime.device), of="metrics"
        )
        shares, spelled_by, busy, memory = zip(*everyone, strict=True)
        metrics: dict[str, Any] = {"step": self.step, "loss": loss}
        if self.byte_lengths is not None:
            metrics["bits_per_byte"] = loss * learnt / math.log(2) / max(int(sum(spelled_by)), 1)
        typical = statistics.median(self.step_seconds)
        metrics |= self.stage.metrics.take(self.processes) | {
            "gradient_norm": norm,
            "rate": rate,
            "epoch": self.stage.batches.epoch,
            "tokens": self.stage.batches.tokens,
            "tokens_per_second": tokens / typical,
            "mfu": tokens / typical * self.flops_per_token / self.runtime.peak_flops,
            "seconds": self.seconds,
            "seconds_left": self.budget.seconds_left(self.step, self.seconds, typical),
            "progress": self.progress,
            "skipped": self.skipped,
            # The most bytes that a process has held so far.
            "memory": max(memory),
        }
        if self.processes.count > 1:
            metrics[PER_PROCESS] = [n / seconds for n, seconds in zip(shares, busy, strict=True)]
            # 1 if no process is slower than the typical one; the others wait for the slowest.
            metrics["straggling"] = max(busy) / statistics.median(busy)
        self._track(metrics)

    def _track(self, metrics: Metrics) -> None:
        for tracker in self.trackers:
            self._write(partial(tracker.log, metrics))

    def _write(self, write: Callable[[], object]) -> None:
        """Write a small file of the run. Where the disk refuses, make room and try again; else stop, saved."""
        try:
            write()
        except DiskError as refusal:
            self.say(f"{refusal}. Older checkpoints that may go are removed")
            self.saver.make_room()
            try:
                write()
            except DiskError as refusal:
                self.refusal = refusal
                self.unwritten.append(write)
                self.coordinator.ask_to_stop(signal.SIGTERM)

    def _write_rest(self) -> None:
        """Write what was refused: the last checkpoint may have made room. Raises DiskError: it has stopped the run."""
        for write in self.unwritten:
            with contextlib.suppress(DiskError):
                write()
        if self.refusal is not None:
            raise DiskError(f"{self.refusal}; step {self.step:,} is saved")

    def _announce_long_run(self) -> None:
        self.announced = True
        left = self.budget.seconds_left(self.step, self.seconds, statistics.median(self.step_seconds))
        if self.budget.steps is not None and left > LONG_RUN_SECONDS:
            fewer = "--minutes N trains for N minutes with the schedule fitted to them"
            if self.recipe.alignment.method in ("ppo", "grpo"):
                fewer = "--rounds N takes fewer steps"
            self.say(
                f"the whole recipe takes about {left / 3600:,.1f} hours on this machine; "
                f"Ctrl-C stops and saves it, and {fewer}"
            )

    def _save(self) -> None:
        batches, scaler = self.stage.batches.state_dict(), self.optimizer.scaler.state_dict()
        state = State(self.step, self.seconds, self.skipped, self.parts, batches, scaler)
        self.saver.collect()
        if self.saver.refusal is not None:
            self.say(f"{self.saver.refusal}. What may go is removed, and step {self.step:,} is saved instead")
        tensors = {name: parallel.whole_on_host(each, self.processes) for name, each in self.modules.items()}
        tensors["random"] = random_state(self.runtime.device)
        self.saver.start(self.step, tensors, {"state": vars(state)}, parallel.shares_on_host(self.optimizer.state()))
        self.last_save = self.coordinator.now()

    def _saved(self) -> checkpoint.Checkpoint:
        """Return the checkpoint of this step, which is saved now where it is not yet."""
        while (saved := self.saver.collect()) is None or saved.step != self.step:
            self._save()
        return saved

    def _evaluate(self, *, final: bool) -> dict[str, float]:
        """Return the main process's evaluation of the checkpoint that was saved last."""
        begin = self.coordinator.now()
        self.processes.at("evaluation")
        saved = self._saved()
        evaluation = self.processes.from_main(lambda: self._measure(saved, final))
        self.coordinator.agree()
        self.evaluation_seconds += self.coordinator.now() - begin
        return evaluation

    def _measure(self, saved: checkpoint.Checkpoint, final: bool) -> dict[str, float]:
        model, evaluation = self.evaluated, {}
        tokens = self.recipe.data.final_evaluation_tokens if final else self.recipe.data.evaluation_tokens
        # An evaluation reads at most as many tokens at a time as a training pass. That pass needs far more memory for
        # its activations, so an evaluation of this size fits.
        at_a_time = min(self.recipe.tokens_per_pass, EVALUATION_BATCH_TOKENS)
        try:
            if self.layout.shard:
                model.load_state_dict(saved.tensors("model"))
                model.to(self.runtime.device)
            # Blocks are compiled for the shapes of training only.
            with torch.compiler.set_stance("force_eager") if self.compiled else contextlib.nullcontext():
                evaluation = self.stage.evaluate(model, tokens=tokens, tokens_per_batch=at_a_time)
                self._write(partial(saved.record_evaluation, evaluation))
                metrics = {f"validation_{name}": value for name, value in evaluation.items()}
                self._track({"step": self.step, "tokens": self.stage.batches.tokens, **metrics})
                if self.recipe.loop.samples:
                    self._write(partial(self.run.add_samples, self.step, self.stage.sample(model)))
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            evaluation = {}
            self.say("out of memory while evaluating: left out; the checkpoint is saved")
        if self.layout.shard:
            model.to("cpu")
        return evaluation
