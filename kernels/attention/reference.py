"""Attention in plain PyTorch: the definition, and the torch backend, which runs where no Triton kernel can be launched.

attention_reference holds the whole [T, S] score matrix, works in any floating dtype including float64, and is
differentiable: every other implementation is compared with it.

The torch backend is PyTorch's SDPA, but on a CPU where it can batched products: SDPA multiplies one head of one
sequence at a time there, which takes two to four times as long where sequences are short or in bf16. BlockAttention
multiplies all heads of many sequences at once, the longest first, a block of queries at a time, whose probabilities
stay in cache: a block belongs to the first so many sequences, and nothing is computed for those that have ended. Where
Numba compiles, causal attention of short sequences is kernels/cpu/attention.py's, which uses all threads.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.utils.rnn import pad_sequence

from kernels import cpu
from kernels.backend import uncompiled

# Queries of a block under a causal mask, at the usual head dims: half of the scores on the diagonal are for nothing,
# but smaller products are slow.
ROWS = 64
# The scores of a block, of all sequences and heads that are multiplied at once: two or three fit into a core's cache.
BLOCK_BYTES = 2**19
# Probabilities of sequences up to this length are kept for the backward pass; longer ones are computed again, since
# they would take more memory than all else that a layer keeps.
KEPT_LENGTH = 512


class Call(NamedTuple):
    """The arguments of an attention besides q, k and v, in the order of the operators' arguments.

    It is packed where it has both cu_seqlens, else dense. longest_q and longest_k bound the lengths of the sequences.
    """

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    longest_q: int
    longest_k: int
    causal: bool
    scale: float
    window: int | None
    softcap: float | None

    def scales(self) -> tuple[float, float]:
        """Return the arguments `scale` and `softcap_log2` of the Triton kernels.

        exp(x) = exp2(x * log2(e)), and a GPU has an instruction for exp2 alone: scores are computed in units of log2,
        with log2(e) multiplied into the scale beforehand. With a cap c, c * tanh(s / c) needs the scores divided by c
        first, and log2(e) goes into the cap.
        """
        log2_e = 1.4426950408889634
        if self.softcap is None:
            return self.scale * log2_e, 0.0
        return self.scale / self.softcap, self.softcap * log2_e

    def sequences(self, q: Tensor) -> int:
        return q.shape[0] if self.cu_seqlens_q is None else len(self.cu_seqlens_q) - 1

    def strides(self, *tensors: Tensor) -> tuple[int, ...]:
        """Return the strides of every dimension but the last, with 0 for the batch that packed tensors do not have."""
        batch = () if self.cu_seqlens_q is None else (0,)
        return tuple(stride for tensor in tensors for stride in (*batch, *tensor.stride()[:-1]))

    def switches(self) -> tuple[bool, bool, bool, bool]:
        """Return the constants CAUSAL, WINDOW, SOFTCAP and PACKED of the Triton kernels."""
        return self.causal, self.window is not None, self.softcap is not None, self.cu_seqlens_q is not None


def empty_results(q: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
    """Return room for out, like q but contiguous, and for the log-sum-exp, fp32 [B, H, T] or packed [H, tokens]."""
    shape = (q.shape[0], q.shape[2], q.shape[1]) if q.ndim == 4 else (q.shape[1], q.shape[0])
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    return out, torch.empty(shape, dtype=torch.float32, device=q.device)


def visible(
    queries: int, keys: int, *, causal: bool, window: int | None, device: torch.device | str = "cpu"
) -> Tensor | None:
    """Return which keys each query may attend to: bool [T, S], or None where every query sees every key.

    The last query is aligned with the last key, so that T < S means "T new tokens after S - T old ones". `window`
    counts the keys a query sees on either side of its own position, its own included: i - j < window (and j - i <
    window where attention is not causal).
    """
    if not causal and window is None:
        return None
    position = torch.arange(queries, device=device)[:, None] + (keys - queries)
    distance = position - torch.arange(keys, device=device)
    mask = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        mask &= distance >= 0
    if window is not None:
        mask &= distance.abs() < window
    return mask


def attention_reference(
    q_BTHD: Tensor, k_BSHD: Tensor, v_BSHD: Tensor, *,
    causal: bool = True, scale: float | None = None, window: int | None = None, softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return softmax(scale * q k^T + mask) v, [B, T, H, D], and the log-sum-exp of the scores, [B, H, T].

    k and v may have fewer heads than q, if their number divides it. A row that sees no key gives 0, and -inf for its
    log-sum-exp. `softcap` c replaces each score s by c * tanh(s / c) (Gemma 2, arXiv:2408.00118).
    """
    group = q_BTHD.shape[2] // k_BSHD.shape[2]
    k_BSHD = k_BSHD.repeat_interleave(group, dim=2)
    v_BSHD = v_BSHD.repeat_interleave(group, dim=2)
    scale = q_BTHD.shape[-1] ** -0.5 if scale is None else scale
    scores_BHTS = torch.einsum("bthd,bshd->bhts", q_BTHD, k_BSHD) * scale
    if softcap is not None:
        scores_BHTS = softcap * torch.tanh(scores_BHTS / softcap)
    mask_TS = visible(q_BTHD.shape[1], k_BSHD.shape[1], causal=causal, window=window, device=q_BTHD.device)
    if mask_TS is not None:
        scores_BHTS = scores_BHTS.masked_fill(~mask_TS, float("-inf"))
    lse_BHT = torch.logsumexp(scores_BHTS, dim=-1)
    # exp(-inf - -inf) would be NaN in the rows that see nothing, and so would their gradient.
    finite_BHT = lse_BHT.masked_fill(lse_BHT == float("-inf"), 0.0)
    probabilities_BHTS = torch.exp(scores_BHTS - finite_BHT[..., None])
    return torch.einsum("bhts,bshd->bthd", probabilities_BHTS, v_BSHD), lse_BHT


@uncompiled
def packed_torch(q: Tensor, k: Tensor, v: Tensor, call: Call, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Return what dense_torch does, of each sequence by itself."""
    assert call.cu_seqlens_q is not None and call.cu_seqlens_k is not None
    lengths_q, lengths_k = call.cu_seqlens_q.diff().tolist(), call.cu_seqlens_k.diff().tolist()
    if call.causal and lengths_q == lengths_k and _in_blocks(q, k, call, return_lse):
        return _attend(q, k, v, lengths_q, True, call.scale), None
    # One split for all sequences: its backward is a single concatenation, where slicing would add up one full-size
    # gradient per sequence.
    parts = zip(torch.split(q, lengths_q), torch.split(k, lengths_k), torch.split(v, lengths_k), strict=True)
    results = [dense_torch(one_q[None], one_k[None], one_v[None], call, return_lse) for one_q, one_k, one_v in parts]
    out = torch.cat([out[0] for out, _ in results]) if results else torch.empty_like(q)
    if not return_lse:
        return out, None
    none = torch.empty(q.shape[1], 0, device=q.device)
    return out, torch.cat([none, *(lse[0] for _, lse in results if lse is not None)], dim=-1)


def dense_torch(q: Tensor, k: Tensor, v: Tensor, call: Call, return_lse: bool) -> tuple[Tensor, Tensor | None]:
    """Return the output, and the log-sum-exp where it is asked for, as flash_attention gives them."""
    causal, scale, window, softcap = call.causal, call.scale, call.window, call.softcap
    queries, keys = q.shape[1], k.shape[1]
    if queries == keys and (causal or q.dtype == torch.bfloat16) and _in_blocks(q, k, call, return_lse):
        return _attend(q, k, v, [queries] * q.shape[0], causal, scale), None
    # SDPA knows neither softcap nor log-sum-exp, and does not promise what a row without keys gives (0 in torch 2.13).
    rows_without_keys = keys == 0 or (queries > keys and (causal or window is not None))
    if return_lse or softcap is not None or rows_without_keys or queries == 0:
        out, lse = attention_reference(q, k, v, causal=causal, scale=scale, window=window, softcap=softcap)
        return out, lse.float()
    square = causal and queries == keys and (window is None or window >= keys)
    mask = None if square else visible(queries, keys, causal=causal, window=window, device=q.device)
    # Compiled for lengths of any size, `square` is a symbol, which SDPA does not take.
    return _sdpa(q, k, v, mask, causal and mask is None, scale), None


def _in_blocks(q: Tensor, k: Tensor, call: Call, return_lse: bool) -> bool:
    """Return whether blocks can compute it, which are faster than SDPA on a CPU, but in fp32 not without a mask."""
    plain = not return_lse and call.softcap is None and (call.window is None or call.window >= call.longest_k)
    known = q.device.type == "cpu" and q.dtype in (torch.float32, torch.bfloat16) and q.shape[-2] == k.shape[-2]
    return plain and known and not torch.compiler.is_compiling()


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, square: bool, scale: float) -> Tensor:
    q_BHTD, k_BHSD, v_BHSD = (each.transpose(1, 2) for each in (q, k, v))
    out_BHTD = F.scaled_dot_product_attention(
        q_BHTD, k_BHSD, v_BHSD, mask, is_causal=square, scale=scale, enable_gqa=q.shape[2] != k.shape[2]
    )
    return out_BHTD.transpose(1, 2)


def decode_torch(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_lengths: Tensor, block_table: Tensor | None, call: Call
) -> Tensor:
    """Return what decode_attention gives."""
    queries, window, lengths = q.shape[1], call.window, cache_lengths.tolist()
    shortest, longest = min(lengths, default=0), max(lengths, default=0)
    if block_table is None and shortest >= queries and call.softcap is None and (queries == 1 or shortest != longest):
        # All sequences at once, which is twice as fast for small ones as one by one. A single query, the last, sees all
        # of the keys that it is given.
        seen = slice(_seen(shortest, queries, window).start, longest)
        mask = None
        if shortest != longest:
            position_BT = cache_lengths[:, None] + torch.arange(-queries, 0, device=q.device)
            distance_BTS = position_BT[:, :, None] - torch.arange(seen.start, seen.stop, device=q.device)
            visible_BTS = distance_BTS >= 0 if window is None else (distance_BTS >= 0) & (distance_BTS < window)
            mask = visible_BTS[:, None]
        return _sdpa(q, k_cache[:, seen], v_cache[:, seen], mask, False, call.scale)
    if queries == 1:
        call = call._replace(causal=False, window=None)
    if block_table is None and shortest == longest:
        seen = _seen(longest, queries, window)
        return dense_torch(q, k_cache[:, seen], v_cache[:, seen], call, return_lse=False)[0]
    out = torch.empty_like(q)
    for row, length in enumerate(lengths):
        seen = _seen(length, queries, window)
        k, v = (_of_sequence(cache, row, seen, block_table) for cache in (k_cache, v_cache))
        out[row : row + 1] = dense_torch(q[row : row + 1], k[None], v[None], call, return_lse=False)[0]
    return out


def _seen(length: int, queries: int, window: int | None) -> slice:
    """Return the keys that one of the newest `queries` sees."""
    start = 0 if window is None else max(length - queries - window + 1, 0)
    return slice(start, max(length, start))


def _of_sequence(cache: Tensor, row: int, seen: slice, block_table: Tensor | None) -> Tensor:
    if block_table is None:
        return cache[row, seen]
    size = cache.shape[1]
    first = seen.start // size
    blocks = block_table[row, first : -(-seen.stop // size)]
    return cache[blocks].flatten(0, 1)[seen.start - first * size : seen.stop - first * size]


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
        tensor = tensor[:, self.heads]
        sequences = [tensor[start:end] for start, end in self.spans]
        return pad_sequence(sequences, batch_first=True).transpose(1, 2).flatten(0, 1)

    def put(self, products: Tensor, tensor: Tensor) -> None:
        """Write to the tensor what was written to its `room`. Of a dense one, that is a view."""
        if tensor.ndim == 4:
            return
        tensor = tensor[:, self.heads]
        sequences = products.view(len(self.spans), -1, *products.shape[1:]).transpose(1, 2)
        for row, (start, end) in zip(sequences, self.spans, strict=True):
            tensor[start:end] = row[: end - start]


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
        out, kept, mask = like(q), [], _mask(q, parts, causal)
        for part in parts:
            queries, keys, values, result = part.take(q), part.take(k), part.take(v), part.room(out)
            for rows, own, seen in part.blocks(causal):
                probabilities = _probabilities(queries[rows, own], keys[rows, seen], mask, scale)
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
        gradients, mask = [like(each) for each in (q, k, v)], _mask(q, ctx.parts, causal)
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
                    probabilities = _probabilities(queries[rows, own], keys[rows, seen], mask, scale)
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


def _attend(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int], causal: bool, scale: float) -> Tensor:
    """Return attention of sequences to themselves: [B, T, H, D] or, packed, [tokens, H, D], in fp32 or bf16."""
    short = 0 < max(lengths, default=0) <= KEPT_LENGTH
    if causal and short and q.shape[-1] % 16 == 0 and cpu.why_not(q.device, q.dtype) is None:
        # Imported here: a machine that trains on a GPU needs no Numba.
        from kernels.cpu.attention import attend

        tokens = [each.flatten(0, -3) for each in (q, k, v)]  # [tokens, H, D]
        return attend(tokens[0], tokens[1], tokens[2], lengths, scale).view(q.shape)
    out: Tensor = BlockAttention.apply(q, k, v, lengths, causal, scale)  # type: ignore[no-untyped-call]
    return out


def _mask(q: Tensor, parts: list[Part], causal: bool) -> Tensor | None:
    """Return a mask of which that of every block is a part: it hides a triangle in its last columns."""
    if not causal or not parts:
        return None
    rows, longest = parts[0].rows, parts[0].spans[0][1] - parts[0].spans[0][0]
    mask = q.new_zeros(rows, -(-longest // rows) * rows)
    mask[:, -rows:] = q.new_full((rows, rows), float("-inf")).triu_(1)
    return mask


def _probabilities(queries: Tensor, keys: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the softmax over keys; with a mask, they end with the last query."""
    rows, columns = queries.shape[1], keys.shape[1]
    if mask is None:
        return torch.softmax(_multiply(queries, keys.mT, scale, queries.new_empty(len(queries), rows, columns)), dim=-1)
    start = mask.shape[1] - mask.shape[0] - (columns - rows)
    return torch.softmax(torch.baddbmm(mask[:rows, start : start + columns], queries, keys.mT, alpha=scale), dim=-1)


def _multiply(left: Tensor, right: Tensor, factor: float, out: Tensor) -> Tensor:
    return torch.baddbmm(out, left, right, beta=0, alpha=factor, out=out)


def _add(total: Tensor, left: Tensor, right: Tensor, factor: float, shares: int) -> None:
    if shares == 1:
        _multiply(left, right, factor, total)
    elif left.dtype == total.dtype:
        total.baddbmm_(left, right, alpha=factor)
    else:
        total.add_(torch.bmm(left, right), alpha=factor)
