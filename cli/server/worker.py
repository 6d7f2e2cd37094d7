"""One thread owns the model; the event loop hands it requests and gets tokens back, a whole step at a time.

Neither waits for the other. What a request may produce is bounded, so what waits for a slow reader is bounded too.
"""

import asyncio
import functools
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from queue import Empty, SimpleQueue

from cli.server.guard import log_failure
from engine.batcher import Batcher, QueueFullError, Request, Step, read_prompt

# What arrives for a text is a step, its prompt's tokens, or None where time is up or no tokens were asked for.
Arrival = Step | list[Step] | None


class ModelError(Exception):
    """The model has failed, on one request or for good, as the message says: nothing more will come."""


BROKEN = "The model has failed; the server must be started again."
FAILED = "The model has failed on this request."


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class Job:
    """A job is what one HTTP request asks of the model, a text per Request. Only `numbers` is used in the thread."""

    def __init__(self, worker: "Worker", requests: Sequence[Request]) -> None:
        self.worker, self.size = worker, len(requests)
        self.running = set(range(self.size))
        self.numbers: dict[int, int] = {}  # the batcher's, by index; only the thread uses them
        self.arrived: list[tuple[int, Arrival] | Exception] = []
        self.news = asyncio.Event()
        self.begin, self.begun, self.closed = time.perf_counter(), False, False
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
        self.prompt_tokens = self.generated_tokens = self.first_tokens = 0
        self.first_token_seconds = 0.0
        self.jobs: set[Job] = set()
        self.failed = False
        self.inbox: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self.owners: dict[int, tuple[Job, int]] = {}  # by the batcher's number; only the thread uses them

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

    def metrics(self) -> str:
        """Return what has been counted, in Prometheus' text format."""
        requests = [f'{{path="{path}",status="{status}"}} {n}' for (path, status), n in sorted(self.requests.items())]
        lines = []
        for name, kind, samples in (
            ("gpt_requests_total", "counter", requests),
            ("gpt_prompt_tokens_total", "counter", [f" {self.prompt_tokens}"]),
            ("gpt_generated_tokens_total", "counter", [f" {self.generated_tokens}"]),
            ("gpt_texts_running", "gauge", [f" {len(self.batcher.running)}"]),
            ("gpt_texts_waiting", "gauge", [f" {len(self.batcher.waiting)}"]),
            ("gpt_first_token_seconds", "summary", [f"_sum {self.first_token_seconds}", f"_count {self.first_tokens}"]),
        ):
            lines += [f"# TYPE {name} {kind}", *(name + sample for sample in samples)]
        return "\n".join(lines) + "\n"

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

    def _deliver(self, found: Sequence[tuple[Job, int, Step]]) -> None:
        now = time.perf_counter()
        for job, index, step in found:
            if step.finish == "error":
                job.put(ModelError(FAILED))
                continue
            self.generated_tokens += 1
            job.put((index, step))
            if not job.begun:
                job.begun = True
                self.first_tokens += 1
                self.first_token_seconds += now - job.begin

    def _fail(self) -> None:
        self.failed = True
        for job in self.jobs:
            job.put(ModelError(BROKEN))

    # The methods below run in the thread.

    def _run(self) -> None:
        try:
            while (steps := self._advance()) is not None:
                found = [(*self.owners[step.request], step) for step in steps]
                for job, index, step in found:
                    if step.finish:
                        self._forget(job, index)
                if found:
                    self.loop.call_soon_threadsafe(self._deliver, found)
        except Exception as error:
            log_failure(error)
            self.loop.call_soon_threadsafe(self._fail)

    def _advance(self) -> list[Step] | None:
        """Do what the event loop asked for, and a step. Returns None at the end. Raises if the model is broken."""
        try:
            return self.batcher.step() if self._obey() else None
        except Exception as error:
            log_failure(error)
        # Not before here: the exception holds the memory of the step that failed.
        return self.batcher.recover()

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
                job.numbers[index], self.owners[number] = number, (job, index)
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
        return number
