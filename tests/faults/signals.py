"""Signals at a random moment: the run saves and says how to go on, or ends at once; never with a traceback."""

import signal
import socket
import time

from tests.faults import child, world
from tests.faults.board import Board
from tests.faults.clients import asking

NUMBERS = {
    "SIGHUP": [signal.SIGHUP],
    "SIGUSR1": [signal.SIGUSR1],
    "SIGTERM": [signal.SIGTERM],
    "SIGINT": [signal.SIGINT],
    "SIGINT twice": [signal.SIGINT, signal.SIGINT],
    "SIGTERM twice": [signal.SIGTERM, signal.SIGTERM],
    "SIGINT three times": [signal.SIGINT] * 3,
}
# A command, and what it says when its work has begun.
WORK = {
    f"train nano --data ready --out new --steps 100000 {world.SMALL}": "step 1 ",
    f"finetune base --data chats.jsonl --out new --steps 100000 {world.TUNE}": "step 1 ",
    "serve chat --port 0 --device cpu": "http://",
    "data prepare stories --out new --vocab-size 320 --workers 2 --documents 100000": "",
    "generate base hello --device cpu --count 64": "",
    "evaluate base --count 200 --device cpu --precision fp32": "",
}
ROUNDS = 3


def run(board: Board) -> None:
    plans = [(command, name) for command in WORK for name in NUMBERS] * ROUNDS
    for case in board.cases(len(plans)):
        command, name = plans[case.number]
        begun = case.random.random() < 0.7
        case.what = f"{name}{' when its work had begun' if begun else ''}: gpt {command}"
        with child.copied(board.world, case.folder / "w") as here:
            started = child.Child(child.gpt(*command.split()), here)
            if begun:
                started.until(WORK[command], 20)
            # A server has clients then, some of which never finish what they say.
            clients = half_way(started.read()) if begun and command.startswith("serve") else []
            time.sleep(case.random.random() * 0.4)
            for number in NUMBERS[name]:
                started.send(number)
                time.sleep(case.random.random() * 0.05)
            done = started.wait(25)
            for client in clients:
                client.close()
            # A signal that comes before the command has begun, or that nobody handles, ends it as it ends any other.
            if done.code < 0 and (not begun or not command.startswith(("train", "finetune"))) and not done.hung:
                board.note("ended by the signal itself")
                if child_traceback(done.said):
                    case.fail("traceback", done.said)
                continue
            case.judge(done)
            if done.stopped:
                case.fail("hang", f"still at work long after {name}: {done.said}")
            training = command.startswith(("train", "finetune"))
            if training and begun and len(NUMBERS[name]) == 1 and "http" not in command:
                if "--resume" not in done.said:
                    case.fail("lost", f"exit code {done.code}, nothing saved or no word of how to go on: {done.said}")
                    continue
                goal = "train nano" if command.startswith("train") else "finetune base"
                again = child.Child(child.gpt(*goal.split(), "--out", "new", "--resume"), here)
                again.until("\nstep ", 20)  # it has said after which step it resumes
                again.send(signal.SIGTERM)
                case.judge(again.wait(25))


def half_way(said: str) -> list[socket.socket]:
    """Clients of a server: one that reads a stream, and some in the middle of a header or a body."""
    port = int(said.rpartition("http://127.0.0.1:")[2].split()[0])
    sent = asking("/v1/completions", prompt="The fox", max_tokens=40, stream=True)
    found = []
    for content in (sent, b"", sent[:40], sent[:-20]):
        found.append(socket.create_connection(("127.0.0.1", port)))
        found[-1].sendall(content)
    return found


def child_traceback(said: str) -> bool:
    return "Traceback (most recent call last)" in said
