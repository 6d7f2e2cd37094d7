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
    key_heads: int
    head_dim: int
    parallel: bool  # a residual as in GPT-NeoX
    rms: bool  # the norms subtract no mean
    gated: bool  # the MLP's strips are in turn of gate and up
    eps: float
    score_cap: float  # 0 is none


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
    head_norms: Floats  # [blocks, 2, 2, head_dim]: of queries and of keys, or [blocks, 2, 2, 0]
    biases: Floats  # [blocks, 4, most columns], or [0, 0, 0]
    windows: Longs  # [blocks]: how many keys a query sees, its own the last
    rotated: Longs  # [blocks]: how many pairs of a head's dimensions
    embedding: NDArray[Any]  # [V, width] float32 or uint16
    cos: Floats  # [positions, rotary_dim / 2]
    sin: Floats


class Cache(NamedTuple):
    """Keys as strips of STRIP tokens, [head_dim, STRIP]; values as rows of head_dim, rounded up to whole vectors."""

    keys: NDArray[Any]  # [blocks, slots, key_heads, capacity * head_dim]
    values: NDArray[Any]  # [blocks, slots, key_heads, capacity * values_dim]


class Scratch(NamedTuple):
    """Room for the rows of a pass. Rows lie `columns` elements apart, a whole number of strips; the rest stays 0."""

    x: Floats  # [rows, columns]
    normed: Floats  # [threads, rows, columns]
    qkv: Floats  # [rows, columns]
    attended: Floats  # [rows, columns]
    expanded: Floats  # [rows, columns]; of a gated MLP with a strip for each thread at the end
    queries: Floats  # [threads, QUERIES or more, head_dim]
    scores: Floats  # the same, [.., capacity]
    mixed: Floats  # the same, [.., values_dim]
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
def norm(x, weight, bias, eps, rms, out):
    """Write LayerNorm of a row x [width] to out, or RMSNorm, which takes the mean as 0."""
    width = weight.shape[0]
    mean = numba.float32(0)
    if not rms:
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
def gate_all(gate, up):
    """Multiply silu(gate) = gate / (1 + exp(-gate)) with up, in place of gate (Shazeer, arXiv:2002.05202)."""
    for i in range(len(gate)):
        x = gate[i]
        small = exp(-abs(x))
        gate[i] = (x if x >= 0 else x * small) / (numba.float32(1) + small) * up[i]


@native
def store(source, target, apart):
    # An assignment to a slice takes Numba two seconds more to compile.
    for i in range(len(source)):
        target[i * apart] = narrow(source[i], target)


@summing
def rotate(x, cos, sin, out):
    """Write x [rotary_dim or more], turned by a position's angles, to out. Halves are paired, as in GPT-NeoX."""
    half = cos.shape[0]
    for i in range(half):
        one, other = x[i], x[half + i]
        out[i] = one * cos[i] - other * sin[i]
        out[half + i] = other * cos[i] + one * sin[i]
    for i in range(2 * half, len(x)):
        out[i] = x[i]


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
def turned(x, weight, bias, eps, cos, sin, out):
    """Write a query or a key to out, normalised and rotated; without weights or angles it is not."""
    if weight.shape[0]:
        norm(x, weight, bias, eps, True, out)
        x = out
    rotate(x, cos, sin, out)


@summing
def attend(shape, weights, cache, scratch, rows, layer, head, sharing, group, member):
    """Write the keys and values of a group of rows, and attend from them, in `sharing` heads that have the same.

    Who takes others of the heads that have the same writes the same.
    """
    dim, slot = shape.head_dim, rows.slots[rows.groups[group]]
    first, last = rows.groups[group], rows.groups[group + 1]
    key_head = head * shape.key_heads // shape.heads
    keys, values = cache.keys[layer, slot, key_head], cache.values[layer, slot, key_head]
    queries, scores, mixed = scratch.queries[member], scratch.scores[member], scratch.mixed[member]
    values_dim, window, rotated = mixed.shape[1], weights.windows[layer], weights.rotated[layer]
    q_norm, k_norm = weights.head_norms[layer, 0], weights.head_norms[layer, 1]
    k_at = (shape.heads + key_head) * dim
    v_at = k_at + shape.key_heads * dim
    for row in range(first, last):
        position = rows.positions[row]
        cos, sin = weights.cos[position, :rotated], weights.sin[position, :rotated]
        turned(scratch.qkv[row, k_at : k_at + dim], k_norm[0], k_norm[1], shape.eps, cos, sin, queries[0])
        store(queries[0], keys[position // STRIP * STRIP * dim + position % STRIP :], STRIP)
        store(scratch.qkv[row, v_at : v_at + dim], values[position * values_dim :], 1)
    scale = numba.float32(1.0 / np.sqrt(numba.float64(dim)))
    together = max(1, QUERIES // sharing)
    for begin in range(first, last, together):
        end = min(begin + together, last)
        count, reach = (end - begin) * sharing, rows.positions[end - 1] + 1
        # The strip where the first window begins.
        low = max(0, rows.positions[begin] + 1 - window) // STRIP * STRIP
        # The queries of a row lie together: one reading of a key serves them all.
        query = 0
        for row in range(begin, end):
            cos, sin = weights.cos[rows.positions[row], :rotated], weights.sin[rows.positions[row], :rotated]
            for one in range(head, head + sharing):
                at = one * dim
                q = scratch.qkv[row, at : at + dim]
                turned(q, q_norm[0], q_norm[1], shape.eps, cos, sin, queries[query])
                query += 1
        for key in range(low, reach, STRIP):
            multiply(queries, 0, dim, keys, key * dim, STRIP, dim,
                     scores, key - low, scores.shape[1], count, STRIP, 0)  # fmt: skip
        for row in range(begin, end):
            seen = rows.positions[row] + 1 - low
            start = max(0, seen - window)
            for query in range((row - begin) * sharing, (row - begin + 1) * sharing):
                own, factor = scores[query, start : reach - low], scale
                for i in range(start):
                    scores[query, i] = 0
                if shape.score_cap:
                    factor = numba.float32(1)
                    for i in range(own.shape[0]):
                        own[i] = shape.score_cap * np.tanh(own[i] * scale / shape.score_cap)
                total = softmax(own, seen - start, factor)
                # The sum is put into the probabilities: they are fewer than the products with the values.
                inverse, own = numba.float32(1) / total, own[: seen - start]
                for i in range(own.shape[0]):
                    own[i] *= inverse
        multiply(scores, 0, scores.shape[1], values, low * values_dim, values_dim, reach - low,
                 mixed, 0, values_dim, count, values_dim, 0)  # fmt: skip
        query = 0
        for row in range(begin, end):
            for one in range(head, head + sharing):
                at = one * dim
                store(mixed[query, :dim], scratch.attended[row, at : at + dim], 1)
                query += 1


@summing
def product(shape, weights, layer, which, x, rows, out, member, members):
    """Multiply rows by this member's strips of a matrix. What writes to the residual stream is added to it."""
    first, last = share(weights.strips[which], member, members)
    begin, size, depth = weights.places[layer, which % HEAD], weights.strip_sizes[which], weights.depths[which]
    add = numba.int64(which == OUTPUT) + numba.int64(which == CONTRACT)
    biased, gated = which < HEAD and weights.biases.shape[0] > 0, which == EXPAND and shape.gated
    if gated:
        first, last = 2 * first, 2 * last
    for strip in range(first, last):
        at = strip * STRIP
        if gated:  # what is in `up` is soon multiplied: it stays in the cache of a core
            at = out.shape[1] - (member + 1) * STRIP if strip % 2 else strip // 2 * STRIP
        if biased:
            bias = weights.biases[layer, which, strip * STRIP : (strip + 1) * STRIP]
            for row in range(rows):
                for i in range(STRIP):
                    out[row, at + i] = bias[i] + (out[row, at + i] if add else numba.float32(0))
        multiply(x, 0, x.shape[1], weights.packed, begin + strip * size, STRIP, depth,
                 out, at, out.shape[1], rows, STRIP, add + numba.int64(biased))  # fmt: skip
        if which == EXPAND:
            for row in range(rows):
                if not gated:
                    gelu_all(out[row, at : at + STRIP])
                elif strip % 2:
                    gate_all(out[row, strip // 2 * STRIP : (strip // 2 + 1) * STRIP], out[row, at : at + STRIP])


@summing
def normalise(shape, weights, which, scratch, count, member, members, sync, goal):
    """Make norms of the first rows of x. Returns where they are, and the next goal."""
    shared = count >= SHARED_ROWS and members > 1
    first, last = share(count, member, members) if shared else (0, count)
    normed = scratch.normed[0 if shared else member]
    for row in range(first, last):
        norm(scratch.x[row], weights.norms[which, 0], weights.norms[which, 1], shape.eps, shape.rms, normed[row])
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
    # Where there are more members than heads with keys, those that have the same are not all read together.
    units = shape.key_heads
    while groups * units < members and units < shape.heads:
        units += shape.key_heads
        while shape.heads % units:
            units += shape.key_heads
    sharing = shape.heads // units
    for turn in range(turns):
        first, last = share(count, member, members)
        for row in range(first, last):
            for i in range(shape.width):
                scratch.x[row, i] = widen(weights.embedding[rows.tokens[row], i])
        goal = meet(sync, members, goal)
        for layer in range(shape.blocks):
            normed, goal = normalise(shape, weights, 2 * layer, scratch, count, member, members, sync, goal)
            product(shape, weights, layer, QKV, normed, count, scratch.qkv, member, members)
            goal = meet(sync, members, goal)
            first, last = share(groups * units, member, members)
            group, unit = first // units, first % units
            for _ in range(first, last):
                attend(shape, weights, cache, scratch, rows, layer, unit * sharing, sharing, group, member)
                unit += 1
                if unit == units:
                    group, unit = group + 1, 0
            goal = meet(sync, members, goal)
            if not shape.parallel:
                product(shape, weights, layer, OUTPUT, scratch.attended, count, scratch.x, member, members)
                goal = meet(sync, members, goal)
            normed, goal = normalise(shape, weights, 2 * layer + 1, scratch, count, member, members, sync, goal)
            product(shape, weights, layer, EXPAND, normed, count, scratch.expanded, member, members)
            goal = meet(sync, members, goal)
            if shape.parallel:
                product(shape, weights, layer, OUTPUT, scratch.attended, count, scratch.x, member, members)
            product(shape, weights, layer, CONTRACT, scratch.expanded, count, scratch.x, member, members)
            goal = meet(sync, members, goal)
        normed = scratch.normed[member]
        for nth in range(wanted):
            x = scratch.x[choice.wanted[nth]]
            norm(x, weights.norms[at, 0], weights.norms[at, 1], shape.eps, shape.rms, normed[nth])
        product(shape, weights, shape.blocks, HEAD, normed, wanted, scratch.logits, member, members)
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
