"""A whole model's step in one call: from token ids to the scores of the next token, with keys and values cached.

Rows are tokens: the newest of many sequences, or a part of a prompt, or both. A row has a slot of the cache and a
position in it, writes its key and value there, and attends to the positions up to its own: there is no mask and no
padding. All threads of a team run the same function, each over its strips of the products and its heads, and wait for
one another where one needs what another made.

x, and what is made of it, is float32 whatever the dtype of weights and cache. A row's result does not depend on the
rows beside it, nor on the number of threads.
"""

from typing import Any, NamedTuple, TypeAlias

import numba
import numpy as np
from numpy.typing import NDArray

from kernels.cpu.jit import add_atomically, exp, narrow, native, summing, wait_for, widen
from kernels.cpu.sampling import choose_next, number, top_of
from kernels.cpu.team import ABANDONED, ARRIVALS, REST, STARTS, STOPPED
from kernels.cpu.tile import STRIP, multiply

Floats: TypeAlias = NDArray[np.float32]
Longs: TypeAlias = NDArray[np.int64]
# The matrices of a block, and the last layer's. As Python's numbers, Numba would compile `product` for each of them.
QKV, OUTPUT, EXPAND, CONTRACT, HEAD = map(np.int64, range(5))
# Queries of a sequence that share the reading of its keys.
QUERIES = 24
# From so many rows on the threads share the norms. With fewer each makes them all: that takes less than to wait.
SHARED_ROWS = 8


class Shape(NamedTuple):
    blocks: int
    width: int
    heads: int
    head_dim: int
    rotary_dim: int
    parallel: bool  # a residual as in GPT-NeoX
    eps: float


class Weights(NamedTuple):
    """Every matrix as strips (see tile.py), one after the other in one array.

    The columns of a block's: query, key and value; output; expand; contract. The head is column 0 of a last row.
    """

    packed: NDArray[Any]  # float32, uint16 (bf16) or int8
    places: Longs  # [blocks + 1, 4]: where each begins, in elements
    strip_sizes: Longs  # [5]: elements of a strip of each of the four, and of the head
    strips: Longs  # [5]
    depths: Longs  # [5]
    norms: Floats  # [2 * blocks + 1, 2, width]: weight and bias, in the order in which they are used
    biases: Floats  # [blocks, 4, most columns], or [0, 0, 0]
    embedding: NDArray[Any]  # [V, width] float32 or uint16
    cos: Floats  # [positions, rotary_dim / 2]
    sin: Floats


class Cache(NamedTuple):
    """Keys as strips of STRIP tokens, [head_dim, STRIP]; values as rows of head_dim, rounded up to whole vectors."""

    keys: NDArray[Any]  # [blocks, slots, heads, capacity * head_dim]
    values: NDArray[Any]  # [blocks, slots, heads, capacity * values_dim]


class Scratch(NamedTuple):
    """Room for the rows of a pass. Rows lie `columns` elements apart, a whole number of strips; the rest stays 0."""

    x: Floats  # [rows, columns]
    normed: Floats  # [threads, rows, columns]
    qkv: Floats  # [rows, columns]
    attended: Floats  # [rows, columns]
    expanded: Floats  # [rows, columns]
    scores: Floats  # [threads, QUERIES, capacity]
    mixed: Floats  # [threads, QUERIES, values_dim]
    logits: Floats  # [rows wanted at most, columns]
    chances: Floats  # [threads, 4, V], for the choice


class Rows(NamedTuple):
    """The rows of a pass. Those of a slot lie together, in the order of their positions."""

    tokens: Longs
    slots: Longs
    positions: Longs
    groups: Longs  # where the rows of each slot begin, and where the last ones end


class Choice(NamedTuple):
    """Which rows get a next token, how, and where it is written."""

    vocab: int
    wanted: Longs  # their numbers
    rows: NDArray[np.void]  # sampling.ROW, by row
    seen: NDArray[np.uint8]  # [slots, V], by slot, as in engine/sampling.py's Past; [1, 0] where no row changes scores
    added: Floats  # the same
    stops: Longs  # [rows, n], by row; -1 is none
    tokens: Longs  # [turns, wanted]
    logprobs: Floats  # [turns, wanted]


@summing
def share(count, member, members):
    """Return the part [first, last) that a member of a team takes of so many."""
    return count * member // members, count * (member + 1) // members


@summing
def meet(sync, members, goal):
    """Wait until all members have arrived, which makes `goal` arrivals in all. Returns the next goal."""
    if members > 1:
        add_atomically(sync, ARRIVALS, 1)
        wait_for(sync, ARRIVALS, goal)
    return goal + members


@summing
def norm(x, weight, bias, eps, out):
    """Write LayerNorm of a row x [width] to out."""
    width = weight.shape[0]
    total = numba.float32(0)
    for i in range(width):
        total += x[i]
    mean = total / numba.float32(width)
    squares = numba.float32(0)
    for i in range(width):
        squares += (x[i] - mean) * (x[i] - mean)
    scale = numba.float32(1) / np.sqrt(squares / numba.float32(width) + eps)
    for i in range(width):
        out[i] = (x[i] - mean) * scale * weight[i] + bias[i]


# erf(x) as x P(x^2) / Q(x^2) on [-3.92, 3.92], where it reaches 1 in float32: the minimax fit of Eigen and XLA.
ERF_MOST = 3.7439211627767994
ERF_P = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
ERF_Q = (
    -1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885, 0.014070470171167667,
    0.11098505178285362, 0.49746925110067538, 1.0,
)  # fmt: skip


@native
def gelu(x):
    """Return x * (1 + erf(x / sqrt(2))) / 2 (Hendrycks and Gimpel, arXiv:1606.08415)."""
    f32 = numba.float32
    y = min(max(x * f32(0.7071067811865476), f32(-ERF_MOST)), f32(ERF_MOST))
    z = y * y
    p = f32(ERF_P[0])
    p = p * z + f32(ERF_P[1])
    p = p * z + f32(ERF_P[2])
    p = p * z + f32(ERF_P[3])
    p = p * z + f32(ERF_P[4])
    q = f32(ERF_Q[0])
    q = q * z + f32(ERF_Q[1])
    q = q * z + f32(ERF_Q[2])
    q = q * z + f32(ERF_Q[3])
    q = q * z + f32(ERF_Q[4])
    q = q * z + f32(ERF_Q[5])
    q = q * z + f32(ERF_Q[6])
    return f32(0.5) * x * (f32(1) + y * p / q)


@native
def gelu_all(x):
    # Over a part of its own: of an index that might be negative, and so count from the end, LLVM makes no vectors.
    for i in range(len(x)):
        x[i] = gelu(x[i])


@native
def store(source, target, apart):
    # An assignment to a slice takes Numba two seconds more to compile.
    for i in range(len(source)):
        target[i * apart] = narrow(source[i], target)


@summing
def rotate(x, cos, sin):
    """Turn x [rotary_dim or more] in place by a position's angles. Halves are paired, as in GPT-NeoX."""
    half = cos.shape[0]
    for i in range(half):
        one, other = x[i], x[half + i]
        x[i] = one * cos[i] - other * sin[i]
        x[half + i] = other * cos[i] + one * sin[i]


@summing
def softmax(scores, length, scale):
    """Turn the first `length` scores into exp(scale * (score - the largest)), the others into 0. Return their sum."""
    most = number(top_of(scores[:length].view(np.int32)))
    total = numba.float32(0)
    for i in range(length):
        e = exp((scores[i] - most) * scale)
        scores[i] = e
        total += e
    for i in range(length, scores.shape[0]):
        scores[i] = 0
    return total


@summing
def attend(shape, weights, cache, scratch, rows, layer, head, group, member):
    """Write the keys and values of a group of rows, and attend from them, in one head."""
    dim, slot = shape.head_dim, rows.slots[rows.groups[group]]
    first, last = rows.groups[group], rows.groups[group + 1]
    keys, values = cache.keys[layer, slot, head], cache.values[layer, slot, head]
    scores, mixed = scratch.scores[member], scratch.mixed[member]
    apart, values_dim, at = scratch.qkv.shape[1], mixed.shape[1], head * dim
    for row in range(first, last):
        position = rows.positions[row]
        q = scratch.qkv[row, at : at + dim]
        k = scratch.qkv[row, shape.width + at : shape.width + at + dim]
        v = scratch.qkv[row, 2 * shape.width + at : 2 * shape.width + at + dim]
        rotate(q, weights.cos[position], weights.sin[position])
        rotate(k, weights.cos[position], weights.sin[position])
        store(k, keys[position // STRIP * STRIP * dim + position % STRIP :], STRIP)
        store(v, values[position * values_dim :], 1)
    scale = numba.float32(1.0 / np.sqrt(numba.float64(dim)))
    for begin in range(first, last, QUERIES):
        end = min(begin + QUERIES, last)
        reach = rows.positions[end - 1] + 1
        for strip in range((reach + STRIP - 1) // STRIP):
            key = strip * STRIP
            multiply(scratch.qkv, begin * apart + at, apart, keys, key * dim, STRIP, dim,
                     scores, key, scores.shape[1], end - begin, STRIP, 0)  # fmt: skip
        for row in range(begin, end):
            total = softmax(scores[row - begin, :reach], rows.positions[row] + 1, scale)
            # The sum is put into the probabilities: they are fewer than the products with the values.
            inverse, own = numba.float32(1) / total, scores[row - begin, : rows.positions[row] + 1]
            for i in range(own.shape[0]):
                own[i] *= inverse
        multiply(scores, 0, scores.shape[1], values, 0, values_dim, reach,
                 mixed, 0, values_dim, end - begin, values_dim, 0)  # fmt: skip
        for row in range(begin, end):
            store(mixed[row - begin, :dim], scratch.attended[row, at : at + dim], 1)


@summing
def product(weights, layer, which, x, rows, out, member, members):
    """Multiply rows by this member's strips of a matrix. What writes to the residual stream is added to it."""
    first, last = share(weights.strips[which], member, members)
    begin, size, depth = weights.places[layer, which % HEAD], weights.strip_sizes[which], weights.depths[which]
    add = numba.int64(which == OUTPUT) + numba.int64(which == CONTRACT)
    if which < HEAD and weights.biases.shape[0]:
        bias = weights.biases[layer, which]
        for row in range(rows):
            for i in range(first * STRIP, last * STRIP):
                out[row, i] = bias[i] + (out[row, i] if add else numba.float32(0))
        add = numba.int64(1)
    for strip in range(first, last):
        multiply(x, 0, x.shape[1], weights.packed, begin + strip * size, STRIP, depth,
                 out, strip * STRIP, out.shape[1], rows, STRIP, add)  # fmt: skip
        if which == EXPAND:
            for row in range(rows):
                gelu_all(out[row, strip * STRIP : (strip + 1) * STRIP])


@summing
def normalise(shape, weights, which, scratch, count, member, members, sync, goal):
    """Make norms of the first rows of x. Returns where they are, and the next goal."""
    shared = count >= SHARED_ROWS and members > 1
    first, last = share(count, member, members) if shared else (0, count)
    normed = scratch.normed[0 if shared else member]
    for row in range(first, last):
        norm(scratch.x[row], weights.norms[which, 0], weights.norms[which, 1], shape.eps, normed[row])
    if shared:
        goal = meet(sync, members, goal)
    return normed, goal


@native
def step(shape, weights, cache, scratch, rows, count, groups, choice, wanted, turns, sync, start, member, members):
    """Take `count` rows, of so many groups, through the model, and choose a token for each that is wanted.

    Every member of a team calls it (see team.py). The scores of the wanted rows, [wanted, V], are in scratch.logits
    afterwards, and their rows hold what they read next. It may go on for more `turns`, where every row is wanted, until
    a row has chosen one of its stops. Returns the number of turns.
    """
    if member == 0:
        add_atomically(sync, STARTS, 1)
    else:
        wait_for(sync, STARTS, start)
        if sync[ABANDONED] == start:
            return 0
    goal, at = sync[REST] + members, shape.blocks * 2
    for turn in range(turns):
        first, last = share(count, member, members)
        for row in range(first, last):
            for i in range(shape.width):
                scratch.x[row, i] = widen(weights.embedding[rows.tokens[row], i])
        goal = meet(sync, members, goal)
        for layer in range(shape.blocks):
            normed, goal = normalise(shape, weights, 2 * layer, scratch, count, member, members, sync, goal)
            product(weights, layer, QKV, normed, count, scratch.qkv, member, members)
            goal = meet(sync, members, goal)
            first, last = share(groups * shape.heads, member, members)
            for unit in range(first, last):
                group, head = unit // shape.heads, unit % shape.heads
                attend(shape, weights, cache, scratch, rows, layer, head, group, member)
            goal = meet(sync, members, goal)
            if not shape.parallel:
                product(weights, layer, OUTPUT, scratch.attended, count, scratch.x, member, members)
                goal = meet(sync, members, goal)
            normed, goal = normalise(shape, weights, 2 * layer + 1, scratch, count, member, members, sync, goal)
            product(weights, layer, EXPAND, normed, count, scratch.expanded, member, members)
            goal = meet(sync, members, goal)
            if shape.parallel:
                product(weights, layer, OUTPUT, scratch.attended, count, scratch.x, member, members)
            product(weights, layer, CONTRACT, scratch.expanded, count, scratch.x, member, members)
            goal = meet(sync, members, goal)
        normed = scratch.normed[member]
        for nth in range(wanted):
            x = scratch.x[choice.wanted[nth]]
            norm(x, weights.norms[at, 0], weights.norms[at, 1], shape.eps, normed[nth])
        product(weights, shape.blocks, HEAD, normed, wanted, scratch.logits, member, members)
        goal = meet(sync, members, goal)
        first, last = share(wanted, member, members)
        for nth in range(first, last):
            row = choice.wanted[nth]
            slot = min(rows.slots[row], choice.seen.shape[0] - 1)
            seen, added, scores = choice.seen[slot], choice.added[slot], scratch.logits[nth, : choice.vocab]
            token, logprob = choose_next(choice.rows[row], scores, seen, added, scratch.chances[member])
            choice.tokens[turn, nth], choice.logprobs[turn, nth] = token, logprob
            rows.tokens[row] = token
            rows.positions[row] += 1
            for i in range(choice.stops.shape[1]):
                if token == choice.stops[row, i]:
                    sync[STOPPED] = start
        goal = meet(sync, members, goal)
        if sync[STOPPED] == start:
            return turn + 1
    return turns
