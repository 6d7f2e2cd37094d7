"""Causal attention of many short sequences to themselves, and its gradients: the torch backend's, compiled by Numba.

PyTorch's products of so few rows take longer to begin than to compute, and one thread alone makes them. Here a unit of
work is a head of a sequence: the threads of a team take them in turn, the longest first. A unit's scores are made a
block of queries at a time, as far as the last of these sees, and made again for the gradients. All products are the
micro-kernel's (tile.py), in fp32 whatever the dtype. A unit's result depends on no other, nor on the threads.
"""

from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from kernels.cpu.jit import add_atomically, native, summing, wait_for
from kernels.cpu.step import meet, softmax, store
from kernels.cpu.team import ABANDONED, REST, STARTS, team
from kernels.cpu.tile import LANES, STRIP, multiply

BLOCK = 24  # queries of a block: four tiles of the micro-kernel, whose scores stay in the L1 cache up to some 256 keys
ROOMS = 12  # of a thread, each [reach, head_dim] or [BLOCK, reach]
LEAST_WORK = 10_000_000  # multiplications of a product, some 0.3 ms, below which it hardly pays to share them


@native
def product(x, x_at, x_stride, w, w_at, w_stride, depth, out, out_at, out_stride, rows, columns, add):
    # One place where the micro-kernel is compiled.
    multiply(x, x_at, x_stride, w, w_at, w_stride, depth, out, out_at, out_stride, rows, columns, add)


@native
def rows_of(x, at, apart, dim, length, scale, out):
    """Write scale * the rows of a head to out, [length, dim]. In x they begin at `at` and lie `apart`."""
    for row in range(length):
        begin = at + row * apart
        source, target = x[begin : begin + dim], out[row * dim : (row + 1) * dim]
        for i in range(dim):
            target[i] = source[i] * scale


@native
def columns_of(x, at, apart, dim, length, scale, width, out):
    """Write the same to out as columns, in strips so many columns wide: [dim, width], one after the other."""
    for strip in range(0, length, width):
        count = min(width, length - strip)
        for i in range(dim):
            begin, source = strip * dim + i * width, at + strip * apart + i
            target = out[begin : begin + count]
            for column in range(count):
                target[column] = x[source + column * apart] * scale


@native
def put(source, count, dim, out, at, apart):
    """Write rows [count, dim] to out, as `rows_of` reads them."""
    for row in range(count):
        store(source[row * dim : (row + 1) * dim], out[at + row * apart :], 1)


@native
def put_columns(source, width, count, dim, out, at, apart):
    """Write columns [dim, width] to out as rows."""
    for row in range(count):
        target = out[at + row * apart : at + row * apart + dim]
        for i in range(dim):
            target[i] = source[i * width + row]


@native
def scores_of(rows, begin, count, strips, dim, out, reach):
    """Write the products of rows [begin, begin + count) with columns up to the last of them to out, [.., reach]."""
    end = begin + count
    for strip in range(0, end, STRIP):
        columns = min(STRIP, -(-(end - strip) // LANES) * LANES)
        product(rows, begin * dim, dim, strips, strip * dim, STRIP, dim, out, strip, reach, count, columns, 0)


@summing
def attend_unit(q, k, v, out, at, apart, dim, length, scale, reach, room):
    one = numba.float32(1)
    queries, keys, values, scores, mixed = room[0], room[1], room[2], room[3], room[4]
    rows_of(q, at, apart, dim, length, scale, queries)
    columns_of(k, at, apart, dim, length, one, STRIP, keys)
    rows_of(v, at, apart, dim, length, one, values)
    for begin in range(0, length, BLOCK):
        count = min(BLOCK, length - begin)
        end = begin + count
        scores_of(queries, begin, count, keys, dim, scores, reach)
        for row in range(count):
            own = scores[row * reach : row * reach + end]
            # The sum is put into the probabilities, as in decoding.
            inverse, seen = one / softmax(own, begin + row + 1, one), own[: begin + row + 1]
            for i in range(len(seen)):
                seen[i] *= inverse
        product(scores, 0, reach, values, 0, dim, end, mixed, 0, dim, count, dim, 0)
        put(mixed, count, dim, out, at + begin * apart, apart)


@summing
def score_gradients(chances, d_chances, seen):
    """Turn scores into probabilities of the first `seen` keys, and gradients by those into gradients by the scores."""
    inverse, mean = numba.float32(1) / softmax(chances, seen, numba.float32(1)), numba.float32(0)
    p, d = chances[:seen], d_chances[:seen]
    for i in range(len(p)):
        p[i] *= inverse
        mean += p[i] * d[i]
    for i in range(len(p)):
        d[i] = p[i] * (d[i] - mean)
    for i in range(seen, len(d_chances)):
        d_chances[i] = 0


@summing
def differentiate_unit(q, k, v, d_out, d_q, d_k, d_v, at, apart, dim, length, scale, reach, room):
    one = numba.float32(1)
    queries, query_columns, keys, key_strips, value_strips = room[0], room[1], room[2], room[3], room[4]
    given, given_columns, key_sums, value_sums = room[5], room[6], room[7], room[8]
    chances, d_scores, mixed = room[9], room[10], room[11]
    rows_of(q, at, apart, dim, length, scale, queries)
    columns_of(q, at, apart, dim, length, scale, reach, query_columns)
    rows_of(k, at, apart, dim, length, scale, keys)
    columns_of(k, at, apart, dim, length, one, STRIP, key_strips)
    columns_of(v, at, apart, dim, length, one, STRIP, value_strips)
    rows_of(d_out, at, apart, dim, length, one, given)
    columns_of(d_out, at, apart, dim, length, one, reach, given_columns)
    for i in range(reach * dim):
        key_sums[i] = value_sums[i] = 0
    for begin in range(0, length, BLOCK):
        count = min(BLOCK, length - begin)
        end = begin + count
        whole = -(-end // LANES) * LANES
        scores_of(queries, begin, count, key_strips, dim, chances, reach)
        scores_of(given, begin, count, value_strips, dim, d_scores, reach)
        for row in range(count):
            here = row * reach
            score_gradients(chances[here : here + whole], d_scores[here : here + whole], begin + row + 1)
        product(d_scores, 0, reach, keys, 0, dim, end, mixed, 0, dim, count, dim, 0)
        put(mixed, count, dim, d_q, at + begin * apart, apart)
        product(query_columns, begin, reach, d_scores, 0, reach, count, key_sums, 0, reach, dim, whole, 1)
        product(given_columns, begin, reach, chances, 0, reach, count, value_sums, 0, reach, dim, whole, 1)
    put_columns(key_sums, reach, length, dim, d_k, at, apart)
    put_columns(value_sums, reach, length, dim, d_v, at, apart)


@native
def begins(sync, start, member):
    """Return whether this member of a team has work, once the caller has begun."""
    if member == 0:
        add_atomically(sync, STARTS, 1)
        return True
    wait_for(sync, STARTS, start)
    return sync[ABANDONED] != start


@native
def attend_all(q, k, v, out, heads, dim, spans, scale, reach, rooms, taken, sync, start, member, members):
    """Every member of a team calls it, and returns when all units are done. The arrays are [tokens * heads * dim]."""
    if begins(sync, start, member):
        unit = add_atomically(taken, 0, 1)
        while unit < len(spans) * heads:
            at, length = (spans[unit // heads, 0] * heads + unit % heads) * dim, spans[unit // heads, 1]
            attend_unit(q, k, v, out, at, heads * dim, dim, length, scale, reach, rooms[member])
            unit = add_atomically(taken, 0, 1)
        meet(sync, members, sync[REST] + members)


@native
def differentiate_all(
    q, k, v, d_out, d_q, d_k, d_v, heads, dim, spans, scale, reach, rooms, taken, sync, start, member, members
):
    """The same, of the gradients."""
    if begins(sync, start, member):
        unit = add_atomically(taken, 0, 1)
        while unit < len(spans) * heads:
            at, length = (spans[unit // heads, 0] * heads + unit % heads) * dim, spans[unit // heads, 1]
            room = rooms[member]
            differentiate_unit(q, k, v, d_out, d_q, d_k, d_v, at, heads * dim, dim, length, scale, reach, room)
            unit = add_atomically(taken, 0, 1)
        meet(sync, members, sync[REST] + members)


def run(function: Any, tensors: Sequence[Tensor], lengths: Sequence[int], scale: float) -> None:
    """Call one of the two for contiguous tensors [tokens, heads, dim] in fp32."""
    arrays = [each.detach().view(-1).numpy() for each in tensors]
    spans = np.stack((np.cumsum(lengths, dtype=np.int64) - lengths, lengths), axis=1)
    spans = spans[np.argsort(-spans[:, 1], kind="stable")]
    longest, (_, heads, dim) = int(spans[0, 1]), tensors[0].shape
    reach = -(-longest // STRIP) * STRIP
    members = torch.get_num_threads() if int((spans[:, 1] ** 2).sum()) * heads * dim > LEAST_WORK else 1
    rooms = np.empty((members, ROOMS, reach * max(dim, BLOCK)), np.float32)
    arguments = (heads, dim, spans, np.float32(scale), reach, rooms, np.zeros(1, np.int64))
    team(members).run(function, *arrays, *arguments)


def plain(tensor: Tensor) -> Tensor:
    """Return the tensor as the kernels take it. Another dtype or layout would be compiled anew, for some seconds."""
    return tensor.float().contiguous()


class Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
        inputs = [plain(each) for each in (q, k, v)]
        ctx.save_for_backward(*inputs)
        ctx.lengths, ctx.scale = lengths, scale
        out = torch.empty_like(inputs[0])
        run(attend_all, (*inputs, out), lengths, scale)
        return out.to(q.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        gradients = [torch.empty_like(each) for each in inputs]
        run(differentiate_all, (*inputs, plain(d_out), *gradients), ctx.lengths, ctx.scale)
        return *(each.to(d_out.dtype) for each in gradients), None, None


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Return causal attention of sequences to themselves, like q: [tokens, H, D], D a multiple of 16, fp32 or bf16."""
    out: Tensor = Attention.apply(q, k, v, lengths, scale)  # type: ignore[no-untyped-call]
    return out
