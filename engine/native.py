"""A model's steps on a CPU by kernels/cpu: its weights packed, its own cache, and one call for all that run.

Row r of a step is what the r-th running sequence reads next. Nothing moves in the cache: a row says which slot it has.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from engine.config import MAPS
from engine.decoders import Reading
from engine.model import GPT, check_room, rotary_angles
from engine.sampling import begin_past
from kernels.cpu.pack import pack, strip_size, strips
from kernels.cpu.sampling import DRAWS, ROW
from kernels.cpu.step import QUERIES, Cache, Choice, Floats, Longs, Rows, Scratch, Shape, Weights, step
from kernels.cpu.team import team
from kernels.cpu.tile import LANES, STRIP

# Products of weights with rows, below which threads would wait for one another longer than they work.
LEAST_WORK = 300_000
WITHOUT_END = 2**62  # a window that sees everything
LINE = 128  # bytes of the cache that belong together: two lines, which many CPUs fetch at once


class NativeDecoder:
    """The model's weights, packed, and a cache of its own. It does not see later changes of the model."""

    def __init__(self, model: GPT, slots: int, most_read: int, most_turns: int = 1, capacity: int = 0) -> None:
        """Make room for so many sequences, and for steps that read at most `most_read` tokens of prompts besides.

        A sequence has at most `capacity` tokens; 0 is the context.
        """
        config, dtype = model.config, model.compute_dtype or model.embedding.weight.dtype
        self.kind = "int8" if model.decode_int8 else "bf16" if dtype == torch.bfloat16 else "fp32"
        self.members = torch.get_num_threads()
        self.shape = Shape(
            config.blocks, config.width, config.heads, config.kv_heads, config.head_dim, config.parallel_residual,
            config.norm == "rms", config.mlp == "gated", float(np.float32(config.norm_eps)), config.score_cap or 0.0,
        )  # fmt: skip
        self.work = config.matmul_parameters
        self.slots, rows, capacity = slots, slots + most_read, _whole(capacity or config.context)
        with torch.inference_mode():
            self.weights = _weights(model, self.kind, capacity)
        values_dim = -(-config.head_dim // LANES) * LANES
        # Beside weights in int8, bf16 takes nothing from keys and values that counts.
        shape = (config.blocks, slots, config.kv_heads)
        kept = np.dtype(np.float32 if self.kind == "fp32" else np.uint16)
        dims = config.head_dim + values_dim
        check_room(slots, config.blocks * config.kv_heads * capacity * dims * kept.itemsize)
        self.cache = Cache(*(_room(*shape, capacity * dim, dtype=kept) for dim in (config.head_dim, values_dim)))
        width, expanded = _whole(config.width), _whole(config.mlp_columns) + self.shape.gated * self.members * STRIP
        queries = max(QUERIES, config.heads // config.kv_heads)
        self.scratch = Scratch(
            _room(rows, width), _room(self.members, rows, width), _room(rows, _whole(config.qkv_rows)),
            _room(rows, _whole(config.attended)), _room(rows, expanded), _room(self.members, queries, config.head_dim),
            _room(self.members, queries, capacity), _room(self.members, queries, values_dim),
            _room(slots, _whole(config.outputs)), _room(self.members, 4, config.outputs),
        )  # fmt: skip
        self.numbers = np.arange(rows + 1)
        self.rows = Rows(*(np.zeros(rows + 1, np.int64) for _ in Rows._fields))
        self.choice = Choice(
            config.outputs, np.zeros(slots, np.int64), np.zeros(rows, ROW), np.zeros((1, 0), np.uint8), _room(1, 0),
            np.full((rows, 1), -1), np.zeros((most_turns, slots), np.int64), _room(most_turns, slots),
        )  # fmt: skip
        self._run(0, 0, 0, 1, members=1)  # compiles

    def step(self, producing: int, reading: Sequence[Reading] = (), turns: int = 1) -> tuple[Longs, Floats]:
        """Move the first rows on by a token each, and read parts of prompts, each of another slot.

        Returns the tokens chosen, [turns, wanted], and their log-probabilities where they are asked for: of the rows
        that produce, then of the prompts that end, which are the next rows from now on. `scores` has what they were
        chosen from. More turns are for steps that read nothing; they may end early (see kernels/cpu/step.py).
        """
        rows, wanted, count, groups = self.rows, self.choice.wanted, producing, producing
        rows.groups[: producing + 1] = self.numbers[: producing + 1]
        wanted[:producing] = self.numbers[:producing]
        asked = producing
        for part in reading:
            end = count + len(part.tokens)
            rows.tokens[count:end], rows.slots[count:end] = part.tokens, part.slot
            rows.positions[count:end] = self.numbers[: end - count] + part.position
            count, groups = end, groups + 1
            rows.groups[groups] = end
            if part.ending is not None:
                self._begin(end - 1, part)
                wanted[asked] = end - 1
                asked += 1
        done = self._run(count, groups, asked, turns, self.members if count * self.work > LEAST_WORK else 1)
        for row in range(producing, asked):
            for array in self._by_row():
                array[row] = array[wanted[row]]
        return self.choice.tokens[:done, :asked], self.choice.logprobs[:done, :asked]

    def _run(self, count: int, groups: int, wanted: int, turns: int, members: int) -> int:
        arguments = (self.shape, self.weights, self.cache, self.scratch, self.rows, count, groups, self.choice)
        return int(team(members).run(step, *arguments, wanted, turns))

    def _begin(self, row: int, part: Reading) -> None:
        """Set how tokens are chosen from now on."""
        assert part.ending is not None
        prompt, sampling, generator, stop_ids, logprob, generated = part.ending
        record, vocab = self.choice.rows[row], self.choice.vocab
        record["temperature"] = max(sampling.temperature, 1e-10) if sampling.temperature > 0 else 0
        record["top_k"] = min(sampling.top_k or vocab, vocab)
        record["top_p"], record["min_p"] = sampling.top_p, sampling.min_p
        record["penalty"], record["changes"] = sampling.repetition_penalty, sampling.changes_logits
        record["presence"], record["frequency"] = sampling.presence_penalty, sampling.frequency_penalty
        record["logprob"], record["drawn"] = logprob, 0
        if sampling.temperature > 0:
            record["draws"] = torch.rand(DRAWS, generator=generator).numpy()
        stops = self.choice.stops
        if (more := len(stop_ids) - stops.shape[1]) > 0:
            self.choice = self.choice._replace(stops=np.pad(stops, ((0, 0), (0, more)), constant_values=-1))
        self.choice.stops[row] = -1
        self.choice.stops[row, : len(stop_ids)] = list(stop_ids)
        if sampling.changes_logits:
            if not self.choice.seen.size:
                seen, added = np.zeros((self.slots, vocab), np.uint8), _room(self.slots, vocab)
                self.choice = self.choice._replace(seen=seen, added=added)
            past = begin_past(sampling, prompt, vocab, generated)
            self.choice.seen[part.slot], self.choice.added[part.slot] = past.seen.numpy(), past.added.numpy()

    def draw(self, generators: Sequence[torch.Generator], turns: int) -> None:
        """Give the first rows the random numbers that they need for so many turns, each from its own generator."""
        for row in np.flatnonzero(self.choice.rows["drawn"][: len(generators)] + turns > DRAWS).tolist():
            record = self.choice.rows[row]
            fresh, left = record["drawn"], DRAWS - record["drawn"]
            record["draws"][:left] = record["draws"][fresh:]
            record["draws"][left:] = torch.rand(int(fresh), generator=generators[row]).numpy()
            record["drawn"] = 0

    def swap(self, one: int, other: int) -> None:
        """Exchange two rows: each keeps its slot."""
        for array in self._by_row():
            array[[one, other]] = array[[other, one]]

    def _by_row(self) -> tuple[NDArray[Any], ...]:
        rows, choice = self.rows, self.choice
        return rows.tokens, rows.slots, rows.positions, choice.rows, choice.stops

    def scores(self, wanted: int) -> Tensor:
        """Return the scores of the last step's choices, fp32 [wanted, V], valid until the next step."""
        return torch.from_numpy(self.scratch.logits[:wanted, : self.choice.vocab])


def _whole(columns: int) -> int:
    return strips(columns) * STRIP


def _room(*shape: int, dtype: Any = np.float32) -> NDArray[Any]:
    """Return zeros that begin where a line of the cache does: vectors that lie in two lines cost twice, and what two
    threads write into the same line waits for the line to come over."""
    size = math.prod(shape) * np.dtype(dtype).itemsize
    memory = np.zeros(size + LINE, np.uint8)
    begin = -memory.ctypes.data % LINE
    found: NDArray[Any] = memory[begin : begin + size].view(dtype).reshape(shape)
    return found


def _joined(parts: Sequence[Tensor]) -> NDArray[Any]:
    """Return tensors end to end, in memory of NumPy's: it asks for large pages, which are read half as fast again."""
    found = _room(sum(len(each) for each in parts), dtype=parts[0].numpy().dtype)
    torch.cat(list(parts), out=torch.from_numpy(found))
    return found


def _in_turn(rows: Tensor) -> Tensor:
    """Return the rows of gate and up, [2 M, ...], as strips in turn: one of the gate, and the one that goes with it."""
    halves = rows.detach().float().view(2, len(rows) // 2, *rows.shape[1:])
    padding = [0, 0] * (rows.ndim - 1) + [0, -halves.shape[1] % STRIP]
    padded = F.pad(halves, padding)
    return padded.view(2, -1, STRIP, *rows.shape[1:]).transpose(0, 1).flatten(0, 2)


def _weights(model: GPT, kind: str, capacity: int) -> Weights:
    config = model.config
    matrices: list[list[Any]] = [[block.get_submodule(name) for name in MAPS] for block in model.blocks]

    def laid(which: int, rows: Tensor) -> Tensor:
        return _in_turn(rows) if config.mlp == "gated" and MAPS[which] == "mlp.expand" else rows.detach()

    packed = [[pack(laid(which, each.merged()), kind) for which, each in enumerate(block)] for block in matrices]
    sizes = torch.tensor([[each.numel() for each in block] for block in packed])
    ends = sizes.flatten().cumsum(0)
    places = np.zeros((config.blocks + 1, len(MAPS)), np.int64)
    places[:-1] = (ends.view(sizes.shape) - sizes).numpy()
    places[-1, 0] = ends[-1]
    outputs = [config.qkv_rows, config.width, config.mlp_columns, config.width, config.outputs]
    depths = [config.width, config.attended, config.width, config.mlp_columns, config.width]
    norms: list[Any] = [norm for block in model.blocks for norm in (block.attention_norm, block.mlp_norm)]
    biases, head_norms = torch.zeros(0, 0, 0), torch.zeros(config.blocks, 2, 2, 0)
    if any(each.bias is not None for each in matrices[0]):
        rows = [[laid(which, each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias).float()
                 for which, each in enumerate(block)] for block in matrices]  # fmt: skip
        most = max(map(_whole, map(len, rows[0])))
        biases = torch.stack([torch.stack([F.pad(row, (0, most - len(row))) for row in block]) for block in rows])
    if config.qk_norm:
        both = [block.get_submodule(f"attention.{one}_norm") for block in model.blocks for one in "qk"]
        head_norms = torch.stack([_norm(each) for each in both]).view(config.blocks, 2, 2, -1)
    embedding = model.embedding.weight.detach()
    cos, sin = rotary_angles(torch.arange(capacity), config)
    half = config.rotary_dim // 2
    return Weights(
        _joined([*(each for block in packed for each in block), pack(model.head_weight, kind)]),
        places,
        np.array([strip_size(depth, kind) for depth in depths]),
        np.array([strips(columns) for columns in outputs]),
        np.array(depths),
        torch.stack([_norm(norm) for norm in (*norms, model.final_norm)]).numpy(),
        head_norms.numpy(),
        biases.numpy(),
        np.array([config.window_of(layer) or WITHOUT_END for layer in range(config.blocks)]),
        np.array([half * (config.kind_of(layer) != "n") for layer in range(config.blocks)]),
        (embedding.bfloat16().view(torch.uint16) if kind == "bf16" else embedding.float()).numpy(),
        cos[:, 0, :half].contiguous().numpy(),
        sin[:, 0, half:].contiguous().numpy(),  # of which rotary_angles negates the first half
    )


def _norm(norm: Any) -> Tensor:
    weight = norm.weight.detach().float()
    return torch.stack((weight, torch.zeros_like(weight) if norm.bias is None else norm.bias.detach().float()))
