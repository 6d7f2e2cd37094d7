"""How weights are drawn before a model has learnt anything, and what the text itself says of them."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from engine.config import ModelConfig

# Standard deviation of weights: in every matrix (GPT-2), or times the root of its inputs, so that what comes out of a
# map has the same size at every width. For nano both are about the same.
GPT2, SCALED = 0.02, 0.25
# How far before itself each head looks, in the first two blocks; the others find out by themselves.
DISTANCES = ((1, 2, 3), (1, 2))
# The share of an embedding that all tokens have in common, and of a looking head's queries and keys that they do not.
COMMON, OWN = 0.5, 0.3
# Of an embedding from bigrams: its standard deviation, the share of it that stays random, by how many of these no token
# is longer, and for how much of the width singular vectors are taken.
WORDS, RANDOM, LONGEST, SHARE = 0.3, 0.3, 3.0, 0.75
# So often a token must have come for what followed it to say as much as what follows tokens in general.
ENOUGH = 5.0
# How much of what a token further before says counts: tokens before often say the same.
BELIEVED = 0.5
# Singular vectors are looked for among so many more, in so many rounds.
SPARE, ROUNDS = 16, 4
# The fastest rotations of a head, which tell one position from the next.
FASTEST = 5


@torch.no_grad()
def draw(model: Any, config: ModelConfig) -> None:
    """Draw the weights of a GPT: norms 1, biases 0, and matrices as `config.start` says.

    What writes to the residual stream is smaller in deep models (GPT-2).
    """
    local = config.start != "gpt2"
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.zero_()
        elif parameter.ndim == 2:
            writes = name.endswith(("attention.output.weight", "mlp.contract.weight"))
            scaled = local and name.startswith("blocks.")
            std = SCALED / math.sqrt(parameter.shape[1]) if scaled else GPT2
            parameter.normal_(std=std / (math.sqrt(2 * config.blocks) if writes else 1.0))
    if local:
        _look_back(model, config)


def _look_back(model: Any, config: ModelConfig) -> None:
    """Make some heads attend to the token before, or one of the two before that, from the first step on.

    Heads of trained models often do, and then need not find it out. (Trockman and Kolter, arXiv:2305.09828, begin with
    what attention learns in another way.) All embeddings get a part in common. From it such a head makes queries and
    keys that are the same for all tokens; their angle is such that rotary positions turn them onto each other at the
    distance.
    """
    width, size, keys = config.width, config.head_dim, config.kv_heads
    device = model.embedding.weight.device
    common = torch.randn(width, device=device)
    common -= common.mean()  # as LayerNorm does
    common /= common.norm()
    for table in (model.embedding, model.head):
        if table is not None:
            table.weight.sub_(torch.outer(table.weight @ common, common))
    model.embedding.weight.add_(COMMON * GPT2 * math.sqrt(width) * common)
    # What a norm leaves of the common part.
    left = math.sqrt(width) * COMMON / math.hypot(1, COMMON)
    turns = min(FASTEST, config.rotary_dim // 2)
    frequencies = config.rotary_base ** (-torch.arange(turns, device=device) * 2 / config.rotary_dim)
    for block, distances in zip(model.blocks, DISTANCES, strict=False):
        heads = block.attention.qkv.weight[: (config.heads + keys) * size].unflatten(0, (-1, size))
        for head, distance in enumerate(distances[: config.heads - 1]):
            angles = distance * frequencies
            query, key = torch.zeros(2, 2, config.rotary_dim // 2, device=device)
            query[0, :turns], query[1, :turns], key[0, :turns] = angles.cos(), -angles.sin(), 1.0
            for number, vector in ((head, query), (config.heads + head * keys // config.heads, key)):
                rows = torch.randn(size, width, device=device) * OWN / math.sqrt(width)
                rows -= torch.outer(rows @ common, common)
                rows[: config.rotary_dim] += torch.outer(vector.flatten() * math.sqrt(size / turns), common) / left
                heads[number] = rows


@torch.no_grad()
def weights_of_text(model: Any, pairs: Sequence[Tensor], generator: torch.Generator) -> dict[str, Tensor]:
    """Return weights by name with which a model begins as one of which token follows which.

    pairs: sparse fp32 [V, V] each, how often token j came n + 1 tokens after token i. The model is as `draw` left it.

    What log p(j | i) is above log p(j) for neighbours i, j becomes norm(embedding[i]) times head[j], as nearly as the
    width allows: a singular value decomposition of the logarithms that are not 0, rare tokens weighing less (Levy and
    Goldberg 2014, "Neural Word Embedding as Implicit Matrix Factorization"). log p(j) itself the head reads from what
    all embeddings have in common. Heads of the first block that look at tokens before those (see `_look_back`) add
    what these say of j, in the same directions.
    """
    # In fp64, so that it does not depend on how many threads add up.
    embedding = model.embedding.weight.detach().double().cpu()
    vocab, width = embedding.shape
    # Two directions have another use.
    rank = min(math.ceil(SHARE * width), width - 2, vocab)
    if rank < 1:
        return {}
    pairs = [each.coalesce() for each in pairs]
    (first, second), counts = pairs[0].indices(), pairs[0].values().double()
    before, after = (
        counts.new_ones(vocab).index_add_(0, each, counts) / (counts.sum() + vocab) for each in (first, second)
    )

    def gains(table: Tensor) -> Tensor:
        """Return by how much the logarithm of each token's probability rises after each, both by their frequencies."""
        (first, second), counts = table.indices(), table.values().double()
        found = torch.log1p(counts / (ENOUGH * after[second])) * (before[first] * after[second]).sqrt()
        return torch.sparse_coo_tensor(table.indices(), found, table.shape, check_invariants=True)

    left, sizes, right = _singular(gains(pairs[0]), rank, generator)
    sizes = sizes.clamp(min=max(float(sizes[0]) / 100, 1e-9))  # noise has smaller ones
    common = embedding.mean(0)
    common /= common.norm()
    # Directions beside the common one, and beside the mean, which LayerNorm takes away.
    drawn = torch.randn(width, len(sizes), generator=generator).double()
    basis = torch.linalg.qr(torch.cat((common[:, None], torch.ones_like(common)[:, None], drawn), 1))[0][:, 2:]
    words = (left * sizes.sqrt() / before.sqrt()[:, None]) @ basis.T
    scale = WORDS / ((before[:, None] * words.square()).sum() / width).sqrt().clamp(min=1e-9)
    words *= scale
    words *= (LONGEST * WORDS * math.sqrt(width) / words.norm(dim=1, keepdim=True)).clamp(max=1)
    in_common = COMMON * WORDS * math.sqrt(width)
    own = embedding - torch.outer(embedding @ common, common)
    words += RANDOM * WORDS / GPT2 * own + in_common * common
    # A norm divides by this.
    size = (before * words.square().mean(1).sqrt()).sum()
    head = (right * sizes.sqrt() / after.sqrt()[:, None]) @ basis.T / scale
    head += torch.outer(after.log() - after.log().mean(), common) / in_common
    found = {"embedding.weight": words, "head.weight": size * head}

    attention = model.blocks[0].attention
    qkv, output = (each.weight.detach().cpu().clone() for each in (attention.qkv, attention.output))
    heads, dim = model.config.heads, model.config.head_dim
    # Heads that share their values could not say what different tokens do.
    looking = zip(range(heads - 1), DISTANCES[0], strict=False) if model.config.kv_heads == heads else ()
    for number, distance in looking:
        core = left.T @ torch.sparse.mm(gains(pairs[distance]), right) / (sizes.sqrt()[:, None] * sizes.sqrt())
        into, strengths, out = _svd(BELIEVED * size * basis @ core @ basis.T)
        values, written = into[:, :dim] * strengths[:dim].sqrt(), strengths[:dim].sqrt()[:, None] * out[:dim]
        # Values are as large as those of other heads.
        usual = SCALED / math.sqrt(width) / values.square().mean().sqrt().clamp(min=1e-9)
        rows = slice((2 * heads + number) * dim, (2 * heads + number + 1) * dim)
        qkv[rows] = (usual * values).T
        output[:, number * dim : (number + 1) * dim] = (written / usual).T
    found = {name: weight.float() for name, weight in found.items()}
    return found | {"blocks.0.attention.qkv.weight": qkv, "blocks.0.attention.output.weight": output}


def _singular(matrix: Tensor, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return about the largest singular values of a sparse matrix, [rank], between their vectors, [rows, rank] each.

    By random projections (Halko et al., arXiv:0909.4061).
    """
    columns = min(rank + SPARE, *matrix.shape)
    found, turned = torch.randn(matrix.shape[1], columns, generator=generator).double(), matrix.mT
    for _ in range(ROUNDS):
        found = torch.linalg.qr(torch.sparse.mm(turned, torch.linalg.qr(torch.sparse.mm(matrix, found))[0]))[0]
    left, sizes, right = _svd(torch.sparse.mm(matrix, found))
    return left[:, :rank], sizes[:rank], (found @ right.mT)[:, :rank]


def _svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return a singular value decomposition in which the largest entry of each vector on the left is positive."""
    left, sizes, right = torch.linalg.svd(matrix, full_matrices=False)
    signs = left.gather(0, left.abs().argmax(0)[None]).sign()
    return left * signs, sizes, right * signs.mT
