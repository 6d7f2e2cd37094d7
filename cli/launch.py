"""Many processes for one command, under torchrun's elastic agent: a worker that dies is replaced, and all go on.

What a restart cannot mend ends at once: an InputError, a full disk too, and an error that comes again at its step.
"""

import logging
import os
import re
import runpy
import signal
import sys
import time
from typing import Any

from engine.errors import GRACE, InputError

# Each restart begins at the newest checkpoint, and so costs no more than what was done since.
RESTARTS = 20
# This variable is set where many machines run the command: a run that is in the folder already is theirs.
GO_ON = "GPT_GO_ON"
# Workers come from a process that has imported all they need: a restart takes a second, not ten.
PRELOADED = ["cli.main", "train.pretrain", "torch.distributed.checkpoint"]


def launch(workers: int, nodes: str | None, rendezvous: str | None) -> int:
    """Run this process's own command in this many workers on this machine, and on others. Return the exit code."""
    import multiprocessing.forkserver

    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher import LaunchConfig, api, elastic_launch

    from engine.processes import heeded_signals

    least, most = parse_nodes(nodes)
    if most > 1 and rendezvous is None:
        raise InputError(
            "--nodes needs --rendezvous HOST:PORT, the same on every machine: one of them, and a free port"
        )
    if rendezvous is not None and (nodes is None or not re.fullmatch(r".+:[0-9]{1,5}", rendezvous)):
        raise InputError(f"--rendezvous {rendezvous}: it is HOST:PORT, where the machines of --nodes meet; give both")
    if nodes is not None:
        os.environ[GO_ON] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
    # Each time that workers meet, they need a new store: an old one holds the addresses of those that are gone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    multiprocessing.set_forkserver_preload(PRELOADED)
    # The library would print a traceback of its own for each worker that dies, and each that it ends.
    for name in ("torch.distributed.elastic.multiprocessing.api", "torch.multiprocessing.spawn"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # It takes no other agent as an argument.
    api.LocalElasticAgent = judging_agent()  # type: ignore[misc]
    config = LaunchConfig(
        least,
        most,
        workers,
        run_id="gpt",
        rdzv_backend="c10d",
        rdzv_endpoint=rendezvous or "localhost:0",
        # Once there are enough machines, more may join for this many seconds. If one joins later, all start again.
        rdzv_configs={"last_call_timeout": 5},
        local_addr=None if most > 1 else "localhost",
        max_restarts=RESTARTS,
        start_method="forkserver",
        signals_to_handle=",".join([*(each.name for each in heeded_signals()), "SIGQUIT"]),
    )
    try:
        codes = elastic_launch(config, work)(sys.argv[1:])
    except SignalException as stopped:
        # Workers that it has yet to start would find nothing of what they were promised, and say so at length.
        if server := multiprocessing.forkserver._forkserver._forkserver_pid:  # type: ignore[attr-defined]
            os.kill(server, signal.SIGKILL)
        return 128 + stopped.sigval
    except ChildFailedError as failure:
        rank, first = failure.get_first_failure()
        if first.exitcode == InputError.exit_code:  # the worker has said why
            return InputError.exit_code
        again = recorded(first)
        times = f"twice in the same way ({again})" if again else f"{RESTARTS + 1} times"
        print(f"error: failed {times}, the last time first in process {rank}", file=sys.stderr)
        return 1
    except RendezvousError:
        print("error: another machine has ended the run, and says why", file=sys.stderr)
        return 1
    return max(codes.values())


def rank_here() -> int | None:
    """Return the rank of this process among those that torchrun or `launch` started; None where nobody did.

    Raises InputError where the variables that say so are not whole: one of them alone is somebody else's.
    """
    numbers, place = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("MASTER_ADDR", "MASTER_PORT")
    if not any(name in os.environ for name in numbers):
        return None
    values = [os.environ.get(name, "") for name in numbers]
    rank, count, local, here = (int(each) if re.fullmatch(r"[0-9]{1,6}", each) else -1 for each in values)
    if 0 <= rank < count and 0 <= local < here <= count and (count == 1 or all(map(os.environ.get, place))):
        return rank
    found = ", ".join(f"{name} is {os.environ.get(name) or 'not set'}" for name in (*numbers, *place))
    raise InputError(
        f"the environment says that this is one of several processes, and not which of them: {found}; unset these "
        "variables, or start the processes with --gpus or torchrun, which set all of them"
    )


def recorded(failure: Any) -> str:
    """Return what a failed worker has written down of its exception; nothing where it was killed."""
    return str(failure.message["message"]) if isinstance(failure.message, dict) else ""


def judging_agent() -> type[Any]:
    """Return torchrun's agent, but one that starts no worker again where the same would come again."""
    from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent

    class Agent(LocalElasticAgent):
        before = ""

        def _monitor_workers(self, worker_group: Any) -> Any:
            result = super()._monitor_workers(worker_group)
            for rank, failure in result.failures.items():
                said = recorded(failure)
                if failure.exitcode == InputError.exit_code or (said and said == self.before):
                    self._remaining_restarts = 0
                elif self._remaining_restarts:
                    why = said or (failure.message if failure.exitcode < 0 else f"exit code {failure.exitcode}")
                    print(f"process {rank} failed: {why}; all start again", file=sys.stderr)
                self.before = said
            return result

    return Agent


def parse_nodes(nodes: str | None) -> tuple[int, int]:
    """Read MIN:MAX, or one number for both."""
    least, _, most = (nodes or "1").partition(":")
    # Python makes no number of thousands of digits.
    decimal = all(part.isdecimal() and len(part) < 10 for part in (least, most or least))
    if not (decimal and 1 <= int(least) <= int(most or least)):
        raise InputError(f"--nodes is {nodes!r}; it must be a number of machines, or MIN:MAX such as 1:4")
    return int(least), int(most or least)


def work(arguments: list[str]) -> int:
    """Run the command in one worker, as `python3 -m cli` does, and return its exit code.

    A worker that ends by an exception is started again by the agent.
    """
    # Ctrl-C reaches the agent alone, who passes it on: a second one would stop at once.
    os.setsid()
    sys.argv[1:] = arguments
    try:
        runpy.run_module("cli", run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code > 128 or code == InputError.exit_code:
            # It was told to stop by an agent that waits for its end and takes no answer. Or the others, who may wait
            # for this one in vain, are to be stopped by the agent, which asks for an exit code. First they may read
            # from the main process's store why it ends.
            sys.stdout.flush()
            time.sleep(0 if code > 128 else GRACE / 2)
            os._exit(code)
        return code
    return 0
