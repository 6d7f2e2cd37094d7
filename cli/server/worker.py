"""One thread owns the model; the event loop hands it requests and gets tokens back, a whole step at a time.

Neither waits for the other. What a request may produce is bounded, so what waits for a slow reader is bounded too.
"""

import asyncio
import functools
import threading
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from queue import Empty, SimpleQueue

from prometheus_client import CollectorRegistry, Metric
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

from cli.server.guard import log_failure
from engine.batcher import Batcher, QueueFullError, Request, Step, read_prompt

# What arrives for a text is a step, its prompt's tokens, or None where time is up or no tokens were asked for.
Arrival = Step | list[Step] | None
# The bounds of what takes a request long, and of the time between two tokens.
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
TOKEN_SECONDS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)


class ModelError(Exception):
    """The model has failed, on one request or for good, as the message says: nothing more will come."""


BROKEN = "The model has failed; the server must be started again."
FAILED = "The model has failed on this request."


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Times:
    """A histogram of seconds. prometheus_client's own takes 3 us for each that is added: too long for every token."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, seconds: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, seconds)] += times
        self.sum += seconds * times

    def family(self, name: str, about: str) -> Metric:
        buckets = zip([*map(str, self.bounds), "+Inf"], accumulate(self.counts), strict=True)
        return HistogramMetricFamily(name, about, list(buckets), self.sum)


class Job:
    """A job is what one HTTP request asks of the model, a text per Request. Only `numbers` is used in the thread."""

    def __init__(self, worker: "Worker", requests: Sequence[Request]) -> None:
        self.worker, self.size = worker, len(requests)
        self.running = set(range(self.size))
        self.numbers: dict[int, int] = {}  # the batcher's, by index; only the thread uses them
        self.arrived: list[tuple[int, Arrival] | Exception] = []
        self.news = asyncio.Event()
        self.begin, self.closed = time.perf_counter(), False
        self.latest: dict[int, float] = {}  # when the newest tokens came, by index
        self.timer = worker.loop.call_later(worker.seconds, self._expire)

    async def arrivals(self) -> list[tuple[int, Arrival]]:
        """Wait for what comes next, and return all that is there, by the index of its text.

        Raises ModelError, ClientGoneError.
        """
        await self.news.wait()
        self.news.clear()
        found, self.arrived = self.arrived, []
        for each in found:
            if isinstance(each, Exception):
                raise each
        return found  # type: ignore[return-value]

    def put(self, arrival: tuple[int, Arrival] | Exception) -> None:
        """Hand something over, on the event loop."""
        self.arrived.append(arrival)
        self.news.set()

    def finish(self, index: int) -> None:
        """Give up a text of which no more is wanted: the model's next step may use its slot."""
        if index in self.running:
            self.running.discard(index)
            self.worker.inbox.put(functools.partial(self.worker._cancel, self, index))

    def close(self) -> None:
        """End the job: the answer has gone out, or nobody waits for it."""
        if self.closed:
            return
        self.closed = True
        self.timer.cancel()
        for index in tuple(self.running):
            self.finish(index)
        self.worker.jobs.discard(self)
        self.put(ClientGoneError())

    def _expire(self) -> None:
        for index in self.running:
            self.put((index, None))


class Worker:
    """`queue` texts may wait beside those in the batcher's slots; `seconds` bounds each request, waiting included."""

    def __init__(self, batcher: Batcher, *, queue: int, seconds: float) -> None:
        self.batcher, self.seconds = batcher, seconds
        self.limit = batcher.slots + queue
        # The numbers of /metrics are counted on the event loop alone.
        self.requests: Counter[tuple[str, int]] = Counter()  # by route and status
        self.prompt_tokens = self.generated_tokens = 0
        self.queue_times, self.first_times, self.request_times = Times(SECONDS), Times(SECONDS), Times(SECONDS)
        self.token_times = Times(TOKEN_SECONDS)
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.jobs: set[Job] = set()
        self.failed = False
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        # By the batcher's number, and only the thread uses them: whose it is, and of those without a slot since when.
        self.owners: dict[int, tuple[Job, int]] = {}
        self.queued: dict[int, float] = {}

    def start(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.thread = threading.Thread(target=self._run, name="model", daemon=True)
        self.thread.start()

    async def stop(self) -> None:
        self.inbox.put(None)
        await asyncio.to_thread(self.thread.join)

    def expire(self) -> None:
        """End every job with what it has, as when its time is up."""
        for job in self.jobs:
            job._expire()

    def collect(self) -> Iterator[Metric]:
        """Yield what has been counted, for prometheus_client."""
        answers = CounterMetricFamily("gpt_requests", "Answers, by path and status", labels=("path", "status"))
        for (path, status), count in self.requests.items():
            answers.add_metric((path, str(status)), count)
        yield answers
        yield CounterMetricFamily("gpt_prompt_tokens", "Tokens of prompts", self.prompt_tokens)
        yield CounterMetricFamily("gpt_generated_tokens", "Tokens that the model wrote", self.generated_tokens)
        yield GaugeMetricFamily("gpt_texts_running", "Texts in slots", len(self.batcher.running))
        yield GaugeMetricFamily("gpt_texts_waiting", "Texts that wait for a slot", len(self.batcher.waiting))
        yield self.queue_times.family("gpt_queue_seconds", "From a request until a text of it has a slot")
        yield self.first_times.family("gpt_first_token_seconds", "From a request to its first token")
        yield self.token_times.family("gpt_token_seconds", "Between two tokens of a text: of a step of several, a part")
        yield self.request_times.family("gpt_request_seconds", "From a request for texts to the end of its answer")

    def submit(self, requests: Sequence[Request], *, read_prompts: bool = False) -> Job:
        """Begin to answer. Close the job in the end. `read_prompts`: first come the log-probabilities of the prompts.

        Raises QueueFullError, ModelError.
        """
        if self.failed:
            raise ModelError(BROKEN)
        taken = sum(job.size for job in self.jobs)
        if taken + len(requests) > self.limit:
            raise QueueFullError(f"{taken} of {self.limit} places are taken")
        job = Job(self, requests)
        self.jobs.add(job)
        self.prompt_tokens += sum(len(request.prompt) for request in requests)
        self.inbox.put(functools.partial(self._begin, job, requests, read_prompts))
        return job

    def _deliver(self, found: Sequence[tuple[Job, int, Step]], waits: Sequence[float], now: float) -> None:
        for wait in waits:
            self.queue_times.add(wait)
        tokens: Counter[tuple[Job, int]] = Counter()
        for job, index, step in found:
            if step.finish == "error":
                job.put(ModelError(FAILED))
                continue
            tokens[job, index] += 1
            job.put((index, step))
        self.generated_tokens += tokens.total()
        for (job, index), count in tokens.items():
            if not job.latest:
                self.first_times.add(now - job.begin)
            if index in job.latest:
                self.token_times.add((now - job.latest[index]) / count, count)
            job.latest[index] = now

    def _fail(self) -> None:
        self.failed = True
        for job in self.jobs:
            job.put(ModelError(BROKEN))

    # The methods below run in the thread.

    def _run(self) -> None:
        try:
            while (steps := self._advance()) is not None:
                now = time.perf_counter()  # a busy event loop may take two steps over at one moment
                waits = self._waits() if self.queued else []
                found = [(*self.owners[step.request], step) for step in steps]
                for job, index, step in found:
                    if step.finish:
                        self._forget(job, index)
                if found or waits:
                    self.loop.call_soon_threadsafe(self._deliver, found, waits, now)
        except Exception as error:
            log_failure(error)
            self.loop.call_soon_threadsafe(self._fail)

    def _advance(self) -> list[Step] | None:
        """Do what the event loop asked for, and a step. Returns None at the end. Raises if the model is broken."""
        try:
            if not self._obey():
                return None
            self.begun = time.perf_counter()
            return self.batcher.step()
        except Exception as error:
            log_failure(error)
        # Not before here: the exception holds the memory of the step that failed.
        self.begun = time.perf_counter()  # the first step may not have begun
        return self.batcher.recover()

    def _waits(self) -> list[float]:
        """Return how long those have waited that have got their slots, at the beginning of the step."""
        waiting = {each.number for each in self.batcher.waiting}
        return [self.begun - self.queued.pop(number) for number in tuple(self.queued) if number not in waiting]

    def _obey(self) -> bool:
        """Do what the event loop asked for, and wait for it where the model is idle. Returns False at the end."""
        while True:
            try:
                command = self.inbox.get(block=self.batcher.idle)
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _begin(self, job: Job, requests: Sequence[Request], read_prompts: bool) -> None:
        try:
            for index, request in enumerate(requests):
                if read_prompts:
                    read = read_prompt(self.batcher.model, request.prompt, request.top_logprobs or 0)
                    self.loop.call_soon_threadsafe(job.put, (index, read))
                if not request.max_tokens:
                    self.loop.call_soon_threadsafe(job.put, (index, None))
                    continue
                number = self.batcher.submit(request)
                job.numbers[index], self.owners[number], self.queued[number] = number, (job, index), job.begin
        except Exception as error:
            log_failure(error)
            self.loop.call_soon_threadsafe(job.put, ModelError(FAILED))
            self.batcher.probe()

    def _cancel(self, job: Job, index: int) -> None:
        if index in job.numbers:
            self.batcher.cancel(self._forget(job, index))

    def _forget(self, job: Job, index: int) -> int:
        number = job.numbers.pop(index)
        del self.owners[number]
        self.queued.pop(number, None)
        return number
