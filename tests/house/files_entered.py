"""How many files must a reader open to follow one training step, one GRPO round, or one chat request?

    python tests/house/files_entered.py

It runs them on the CPU, notes every file of the project that a Python function is entered in, and prints the files in
the order in which they are first entered, and how often a call goes from one file to another.
"""

import contextlib
import http.client
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kernels", "engine", "train", "rlhf", "bench", "cli")
SMALL = (
    "--precision fp32 --device cpu --set loop.batch=8 --set loop.evaluate_every=1000 --set loop.samples=0 "
    "--set data.documents=300 --set data.final_evaluation_tokens=2000"
)
TRAIN = f"train nano {SMALL} --steps 4 --set model.vocab_size=512 --set model.width=32 --out base"
FINETUNE = f"finetune base --data stories-instruct:brief {SMALL} --steps 2 --out chat"
GRPO = (
    "rlhf grpo chat --reward program --rounds 2 --batch 8 --precision fp32 --device cpu --set alignment.answers=8 "
    "--set alignment.passes=1 --set alignment.group=4 --set alignment.max_tokens=8 --set loop.samples=0 --out grpo"
)


class Trace:
    """While `recording`, the project's files in which functions are entered, and the crossings from file to file."""

    def __init__(self) -> None:
        self.recording = False
        self.files: dict[str, int] = {}
        self.crossings = 0
        self.names: dict[str, str] = {}

    def name(self, filename: str) -> str:
        """The path of a file of the project, from its root; "" for all others."""
        if filename not in self.names:
            path = Path(filename)
            inside = path.is_relative_to(ROOT) and path.relative_to(ROOT).parts[0] in FOLDERS
            self.names[filename] = str(path.relative_to(ROOT)) if inside else ""
        return self.names[filename]

    def __call__(self, frame: FrameType, event: str, argument: object) -> None:
        if not self.recording or event != "call":
            return
        entered = self.name(frame.f_code.co_filename)
        if entered:
            self.files[entered] = self.files.get(entered, 0) + 1
            caller = frame.f_back
            self.crossings += caller is not None and self.name(caller.f_code.co_filename) not in ("", entered)


@contextlib.contextmanager
def tracing() -> Iterator[Trace]:
    """A trace of this thread and of those that it starts."""
    trace = Trace()
    threading.setprofile(trace)
    sys.setprofile(trace)
    try:
        yield trace
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def gpt(command: str) -> None:
    from cli.main import app

    app(command.split(), standalone_mode=False)


def trace_steps(command: str, first: int, last: int) -> Trace:
    """What is entered after AdamW's step number `first` of a command until its step number `last` is done."""
    import torch
    from torch.optim.optimizer import register_optimizer_step_post_hook

    done = 0

    def after_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        nonlocal done
        if isinstance(optimizer, torch.optim.AdamW):
            done += 1
            trace.recording = first <= done < last

    with tracing() as trace:
        hook = register_optimizer_step_post_hook(after_step)
        try:
            gpt(command)
        finally:
            hook.remove()
    return trace


def trace_chat(run: str) -> Trace:
    """What is entered from the arrival of a chat request at `gpt serve` until its answer is complete."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    asked = {"model": "chat", "messages": [{"role": "user", "content": "Write a story."}], "max_tokens": 8, "seed": 1}
    body = json.dumps(asked)
    answers: list[dict[str, Any]] = []

    def ask() -> None:
        """The first answer warms up what later ones do not do again; the second one is traced."""
        try:
            wait_for(port)
            for trace.recording in (False, True):
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
                answers.append(json.loads(connection.getresponse().read()))
                connection.close()
        finally:
            trace.recording = False
            os.kill(os.getpid(), signal.SIGTERM)

    with tracing() as trace:
        client = threading.Thread(target=ask)
        client.start()
        gpt(f"serve {run} --port {port} --device cpu --precision fp32")
        client.join()
    assert all(answer["choices"] for answer in answers), answers
    return trace


def wait_for(port: int) -> None:
    for _ in range(600):
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
            return
        time.sleep(0.1)
    raise TimeoutError(f"nothing listens at port {port}")


def follow_all() -> dict[str, Trace]:
    """The traces of a training step, a GRPO round and a chat request, made in the working directory."""
    traces = {"one training step": trace_steps(TRAIN, 2, 3)}
    gpt(FINETUNE)
    traces["one GRPO round"] = trace_steps(GRPO, 1, 2)
    traces["one chat request"] = trace_chat("chat")
    return traces


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch, contextlib.chdir(scratch):
        traces = follow_all()
    for what, trace in traces.items():
        print(f"\n{what}: {len(trace.files)} files, {trace.crossings} calls from one to another")
        for name, calls in trace.files.items():
            print(f"  {name:44} {calls:6} calls")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
