"""Attention on a CPU as batched products: probabilities of a block of queries at a time, small enough for the cache.

PyTorch's own fused attention on a CPU multiplies one head of one sequence at a time, which takes two to four times as
long where sequences are short or in bf16. Here all heads of many sequences are multiplied at once, the longest first: a
block of queries then belongs to the first so many sequences, and nothing is computed for those that have ended.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

# Queries of a block under a causal mask, at the usual head dims: half of the scores on the diagonal are for nothing,
# but smaller products are slow.
ROWS = 64
# The scores of a block, of all sequences and heads that are multiplied at once: two or three fit into a core's cache.
BLOCK_BYTES = 2**19
# Probabilities of sequences up to this length are kept for the backward pass; longer ones are computed again, since
# they would take more memory than all else that a layer keeps.
KEPT_LENGTH = 512


class Part(NamedTuple):
    """Some sequences, the longest first, and heads whose products are made at once, `rows` queries at a time."""

    spans: list[tuple[int, int]]  # where each begins and ends among all tokens
    heads: slice
    rows: int

    def blocks(self, causal: bool) -> list[tuple[slice, slice, slice]]:
        """Return which products, which of their queries, and which of their keys each block consists of."""
        lengths, heads = [end - start for start, end in self.spans], self.heads.stop - self.heads.start
        found = []
        for first in range(0, lengths[0], self.rows):
            last = min(first + self.rows, lengths[0])
            going = sum(length > first for length in lengths) * heads
            found.append((slice(going), slice(first, last), slice(last if causal else lengths[0])))
        return found

    def of_dense(self, tensor: Tensor) -> Tensor:
        """Return the view of this part of [B, T, H, D]: [sequences, heads, T, D]."""
        length = tensor.shape[1]
        return tensor[self.spans[0][0] // length : self.spans[-1][1] // length, :, self.heads].transpose(1, 2)

    def room(self, tensor: Tensor) -> Tensor:
        """Return where the products for this part of a tensor, [products, longest, D], can be written."""
        if tensor.ndim == 4:
            return self.of_dense(tensor).flatten(0, 1)
        longest, heads = self.spans[0][1] - self.spans[0][0], self.heads.stop - self.heads.start
        return tensor.new_empty(len(self.spans) * heads, longest, tensor.shape[-1])

    def take(self, tensor: Tensor) -> Tensor:
        """Return this part of a tensor, [products, longest, D], with zeros where a sequence has ended."""
        if tensor.ndim == 4:
            return self.of_dense(tensor).contiguous().flatten(0, 1)
        sequences = [tensor[start:end, self.heads] for start, end in self.spans]
        return pad_sequence(sequences, batch_first=True).transpose(1, 2).flatten(0, 1)

    def put(self, products: Tensor, tensor: Tensor) -> None:
        """Write to the tensor what was written to its `room`. Of a dense one, that is a view."""
        if tensor.ndim == 4:
            return
        sequences = products.view(len(self.spans), -1, *products.shape[1:])
        for row, (start, end) in zip(sequences, self.spans, strict=True):
            tensor[start:end, self.heads] = row[:, : end - start].transpose(0, 1)


def plan(lengths: Sequence[int], heads: int, head_dim: int, element_size: int, causal: bool) -> list[Part]:
    """Return all sequences and heads in parts, so that the scores of a block have at most BLOCK_BYTES."""
    spans, start = [], 0
    for length in lengths:
        if length:
            spans.append((start, start + length))
        start += length
    spans.sort(key=lambda span: span[0] - span[1])
    found = []
    while spans:
        longest = spans[0][1] - spans[0][0]
        # With more columns, to add up the shares of more blocks takes longer. Without a mask, blocks only save memory.
        most = ROWS * (1 if head_dim <= 64 else 2) if causal else max(128, BLOCK_BYTES // (longest * element_size))
        room = max(1, BLOCK_BYTES // (min(longest, most) * longest * element_size))
        for first in range(0, heads, room):
            found.append(Part(spans[: max(1, room // heads)], slice(first, min(first + room, heads)), most))
        spans = spans[max(1, room // heads) :]
    return found


def like(tensor: Tensor) -> Tensor:
    """Return room for a tensor of this shape; of a dense one, [B, T, H, D], with the rows of a head together."""
    shape = tensor.shape
    if tensor.ndim == 4:
        return tensor.new_empty(shape[0], shape[2], shape[1], shape[3]).transpose(1, 2)
    return tensor.new_empty(shape)


class BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float
    ) -> Tensor:
        parts = plan(lengths, q.shape[-2], q.shape[-1], q.element_size(), causal)
        keep = any(ctx.needs_input_grad) and max(lengths, default=0) <= KEPT_LENGTH
        out, kept = like(q), []
        for part in parts:
            queries, keys, values, result = part.take(q), part.take(k), part.take(v), part.room(out)
            for rows, own, seen in part.blocks(causal):
                probabilities = _probabilities(queries[rows, own], keys[rows, seen], causal, scale)
                torch.bmm(probabilities, values[rows, seen], out=result[rows, own])
                if keep:
                    kept.append(probabilities)
            part.put(result, out)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.parts, ctx.causal, ctx.scale = parts, causal, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *kept = ctx.saved_tensors
        given, causal, scale = iter(kept), ctx.causal, ctx.scale
        gradients = [like(each) for each in (q, k, v)]
        for part in ctx.parts:
            queries, keys, values, d_outs = (part.take(each) for each in (q, k, v, d_out))
            d_queries, d_keys, d_values = results = [part.room(each) for each in gradients]
            blocks = part.blocks(causal)
            if len(blocks) > 1:
                # Shares of several blocks are added up in fp32.
                d_keys, d_values = (torch.zeros(keys.shape, dtype=torch.float32) for _ in range(2))
            for rows, own, seen in blocks:
                probabilities = next(given, None)
                if probabilities is None:
                    probabilities = _probabilities(queries[rows, own], keys[rows, seen], causal, scale)
                d_scores = torch.bmm(d_outs[rows, own], values[rows, seen].mT)
                d_scores = torch._softmax_backward_data(d_scores, probabilities, -1, q.dtype)
                _multiply(d_scores, keys[rows, seen], scale, d_queries[rows, own])
                _add(d_keys[rows, seen], d_scores.mT, queries[rows, own], scale, len(blocks))
                _add(d_values[rows, seen], probabilities.mT, d_outs[rows, own], 1.0, len(blocks))
            if len(blocks) > 1:
                results[1].copy_(d_keys)
                results[2].copy_(d_values)
            for result, gradient in zip(results, gradients, strict=True):
                part.put(result, gradient)
        return *gradients, None, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float) -> Tensor:
    """Return attention of sequences to themselves: [B, T, H, D] or, packed, [tokens, H, D], in fp32 or bf16."""
    out: Tensor = BlockAttention.apply(q, k, v, lengths, causal, scale)  # type: ignore[no-untyped-call]
    return out


def _probabilities(queries: Tensor, keys: Tensor, causal: bool, scale: float) -> Tensor:
    """Return the softmax over keys, which end with the last query."""
    rows, columns = queries.shape[1], keys.shape[1]
    if causal:
        mask = queries.new_zeros(rows, columns)
        mask[:, columns - rows :] = queries.new_full((rows, rows), float("-inf")).triu_(1)
        scores = torch.baddbmm(mask, queries, keys.mT, alpha=scale)
    else:
        scores = _multiply(queries, keys.mT, scale, queries.new_empty(len(queries), rows, columns))
    return torch.softmax(scores, dim=-1)


def _multiply(left: Tensor, right: Tensor, factor: float, out: Tensor) -> Tensor:
    return torch.baddbmm(out, left, right, beta=0, alpha=factor, out=out)


def _add(total: Tensor, left: Tensor, right: Tensor, factor: float, shares: int) -> None:
    if shares == 1:
        _multiply(left, right, factor, total)
    elif left.dtype == total.dtype:
        total.baddbmm_(left, right, alpha=factor)
    else:
        total.add_(torch.bmm(left, right), alpha=factor)
