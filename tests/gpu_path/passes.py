"""Whole passes of the product: train's own step, the batcher, the server's thread, what RLHF computes.

As in options.py, a function returns how often it has to launch which kernel.
"""

import asyncio
import dataclasses
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cli.server.worker import Worker
from engine.batcher import Batcher, Request
from engine.config import AlignmentConfig, BudgetConfig, LoopConfig, ModelConfig, OptimizerConfig, preset
from engine.model import GPT
from engine.run import Run
from engine.runtime import choose
from engine.sampling import Sampling
from rlhf.methods import GRPO, PPO
from rlhf.prompts import Prompt
from rlhf.reward_model import RewardModel
from rlhf.rollout import pack_answers, roll_out, rollout_log_probs, sequence_log_probs
from rlhf.rollout_loader import RolloutBatch
from tests.gpu_path.driver import Machine
from tests.gpu_path.options import (
    ATTENTION_BACKWARD,
    ATTENTION_FORWARD,
    DECODE_KERNEL,
    NORM_BACKWARD,
    NORM_FORWARD,
    ROWS_KERNEL,
    SILU_MUL,
    Launches,
)
from train.data.loader import PackedLoader
from train.loop import Loop
from train.stage import Amounts, Stage

BLOCKS, CONTEXT, VOCAB = 2, 64, 300
CONFIG = ModelConfig(vocab_size=VOCAB, width=64, blocks=BLOCKS, heads=2, context=CONTEXT)
# What other families have, all at once.
KIN = dataclasses.replace(
    CONFIG, norm="rms", mlp="gated", mlp_width=96, key_heads=1, head_width=64, qk_norm=True, tied=True, window=20,
    pattern="wn",
)  # fmt: skip


def model(device: str = "cuda", precision: str = "bf16", config: ModelConfig = CONFIG) -> GPT:
    runtime = choose(device, precision)
    found = GPT(config).to(runtime.device)
    found.compute_dtype = runtime.dtype
    return found


def norms(config: ModelConfig) -> int:
    """Return how often a pass normalises."""
    return (4 if config.qk_norm else 2) * BLOCKS + 1


def passes(forward: int, backward: int, heads: int, config: ModelConfig = CONFIG) -> Launches:
    """Return the launches of a model's passes over whole sequences; the last layer and its loss have `heads`."""
    return {
        **dict.fromkeys(NORM_FORWARD, forward * norms(config)),
        **dict.fromkeys(NORM_BACKWARD, backward * norms(config)),
        **dict.fromkeys(ATTENTION_FORWARD, forward * BLOCKS),
        **dict.fromkeys(ATTENTION_BACKWARD, backward * BLOCKS),
        **({SILU_MUL: (forward + backward) * BLOCKS} if config.mlp == "gated" else {}),
        ROWS_KERNEL: heads,
    }


class Documents:
    """Documents of all lengths from 1 to 100, of a token each."""

    fingerprint = "none"
    lengths = np.arange(1, 101)

    def read(self, document: int, offset: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(length, np.int64), np.zeros(length, np.int64)


def training_step(
    device: str = "cuda",
    precision: str = "bf16",
    optimizer: Any = "muon",
    config: ModelConfig = CONFIG,
    **settings: Any,
) -> Launches:
    """Two steps of the training loop, packed, each in two micro-batches."""
    recipe = dataclasses.replace(
        preset("nano"), model=config, budget=BudgetConfig(steps=2), optimizer=OptimizerConfig(kind=optimizer),
        loop=LoopConfig(batch=8, micro_batch=4, compile=False, **settings),
    )  # fmt: skip
    runtime = dataclasses.replace(choose(device, precision), peak_flops=1.0)
    trained = model(device, precision, config)
    trained.checkpoint_activations = recipe.loop.checkpoint_activations
    batches = PackedLoader(Documents(), recipe.tokens_per_pass, CONTEXT, seed=0)
    stage = Stage(
        recipe, batches, evaluate=lambda *unused: {}, sample=lambda unused: [],
        amounts=Amounts("", lambda steps, epochs: ""),
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "tokenizer.model").touch()
        loop = Loop(trained, stage, Run(Path(folder)), runtime, [], print)
        for _ in range(2):
            loop._train_step(0.0)
        batches.close()
    again = 2 if trained.checkpoint_activations else 1
    expected = passes(4 * again, 4, 4, config)
    # The last norm is not computed twice.
    expected[NORM_FORWARD[0]] -= 4 * (again - 1)
    return expected


def dense_pass(device: str = "cuda", *, chosen: bool = True) -> Launches:
    """A pass over whole rows, on a device that was chosen or that the tensors alone name."""
    trained = model(device) if chosen else GPT(CONFIG).to(device)
    tokens = torch.zeros(3, 50, dtype=torch.int64, device=device)
    trained.loss(tokens, tokens).backward()
    return passes(1, 1, 1)


def requests() -> list[Request]:
    """Requests of all kinds, whose prompts are of one piece or of several."""
    samplings = (
        Sampling(temperature=0.0), Sampling(top_p=0.9, seed=1), Sampling(top_k=5, repetition_penalty=1.2), Sampling(),
        Sampling(temperature=0.0, frequency_penalty=0.5, logit_bias=((3, 2.0),)),
    )  # fmt: skip
    return [
        Request([1] * length, sampling, max_tokens=7, top_logprobs=[None, 3][number % 2])
        for number, (length, sampling) in enumerate(zip((1, 5, 40, 17, 56), samplings, strict=True))
    ]


def batcher(
    machine: Machine, *, graphs: bool, ahead: bool, device: str = "cuda", precision: str = "bf16",
    config: ModelConfig = CONFIG,
) -> Launches:  # fmt: skip
    """Five requests in three slots, until all are done."""
    running = Batcher(model(device, precision, config), slots=3, chunk=16, graphs=graphs, ahead=ahead)
    for request in requests():
        running.submit(request)
    replays, steps = machine.replays, []
    while not running.idle:
        steps += running.step()
    assert sum(step.finish == "length" for step in steps) == 5 and len(steps) == 5 * 7, steps
    assert (machine.replays > replays) == graphs
    return decode_launches(machine, config)


def decode_launches(machine: Machine, config: ModelConfig = CONFIG) -> Launches:
    """Return what a model with a cache launches, whatever the number of passes: of each pass the same."""
    passes = sum(launch.kernel.endswith("decode_kernel") for launch in machine.launches) // BLOCKS
    activations = {SILU_MUL: passes * BLOCKS} if config.mlp == "gated" else {}
    return {DECODE_KERNEL: passes * BLOCKS} | dict.fromkeys(NORM_FORWARD, passes * norms(config)) | activations


def server(machine: Machine, device: str = "cuda") -> Launches:
    """The server's own thread, which also reads a prompt's log-probabilities."""

    async def serve() -> int:
        worker = Worker(Batcher(model(device), slots=3), queue=4, seconds=60)
        worker.start()
        job, ended = worker.submit(requests()), 0
        while ended < 5:
            ended += sum(getattr(step, "finish", None) is not None for _, step in await job.arrivals())
        job.close()
        await worker.stop()
        return ended

    assert asyncio.run(serve()) == 5
    return decode_launches(machine)


def alignment(machine: Machine, method: str, device: str = "cuda") -> Launches:
    """Answers that the policy draws, their log-probabilities, and the loss of PPO, GRPO or DPO with its gradient."""
    policy = model(device)
    prompts = [Prompt(tuple(range(1, 2 + number))) for number in range(4)]
    rollout = roll_out(policy, prompts, frozenset(), max_tokens=6)
    drawn = decode_launches(machine)
    old, _ = rollout_log_probs(policy, rollout, 1.0, 10**6)
    batch = pack_answers([prompt.ids for prompt in prompts], rollout.answers, CONTEXT).to(device)
    if method == "dpo":
        sequence_log_probs(policy, batch).sum().backward()
        return add(drawn, passes(2, 1, 3))
    numbers: Any = dict.fromkeys(("old", "reference", "advantages", "values", "returns"), old.to(device))
    config, critic = AlignmentConfig(), RewardModel(dataclasses.replace(CONFIG, scalar_head=True)).to(device)
    critic.compute_dtype = policy.compute_dtype
    learner = PPO(config, critic, 100) if method == "ppo" else GRPO(AlignmentConfig(answers=4, group=4))
    learner.loss(policy, RolloutBatch(**vars(batch), **numbers)).backward()
    # The critic reads the answers too, and has no last layer of this kind.
    return add(drawn, passes(3, 2, 3) if method == "ppo" else passes(2, 1, 3))


def add(*parts: Launches) -> Launches:
    return dict(sum(map(Counter, parts), Counter()))


def calls(machine: Machine) -> Iterator[tuple[str, Callable[[], Launches]]]:
    """Yield all of them, by name."""
    for precision in ("bf16", "fp16", "fp32"):
        yield f"training step: {precision}", partial(training_step, precision=precision)
    yield "training step: checkpointed", partial(training_step, checkpoint_activations=True)
    yield "training step: adamw", partial(training_step, optimizer="adamw")
    yield "training step: of a Llama", partial(training_step, config=KIN, checkpoint_activations=True)
    yield "batcher: a Llama", partial(batcher, machine, graphs=True, ahead=True, config=KIN)
    yield "dense pass", dense_pass
    for graphs, ahead in product((True, False), repeat=2):
        for precision in ("bf16", "fp16"):
            name = f"batcher: {precision}, graphs={graphs}, ahead={ahead}"
            yield name, partial(batcher, machine, graphs=graphs, ahead=ahead, precision=precision)
    yield "server's thread", partial(server, machine)
    for method in ("ppo", "grpo", "dpo"):
        yield f"alignment: {method}", partial(alignment, machine, method)
    second = "cuda:1"
    yield "second device: training step", partial(training_step, second)
    yield "second device: dense pass", partial(dense_pass, second)
    yield "second device: dense pass, where another one is current", partial(dense_pass, second, chosen=False)
    yield "second device: batcher", partial(batcher, machine, graphs=False, ahead=True, device=second)
    yield "second device: batcher, graphs", partial(batcher, machine, graphs=True, ahead=True, device=second)
    yield "second device: server's thread", partial(server, machine, second)
    yield "second device: alignment", partial(alignment, machine, "ppo", second)
