"""The next token of each sequence, natively: what engine/sampling.py defines, without a sort and without a group.

A row of scores is passed over twice: once for the highest, once for the weights exp((score - highest) / temperature)
and their sums by blocks, so that a draw finds its block first and then its token. The cuts need no order either: the
score that k tokens reach, and the weight above which they hold top_p, are found by halving what their bits may be.
"""

import math

import numpy as np

from kernels.cpu.jit import HALF, ONE, ZERO, exp, native, summing

BLOCK = 256
DRAWS = 64
INFINITY, SIGN = 0x7F800000, 0x7FFFFFFF

# How to choose for one row. temperature 0 takes the likeliest; above, it is at least 1e-10, and every choice takes the
# next of `draws`, uniform in [0, 1). top_k is at most the number of tokens. logprob says whether it is asked for, and
# `changes` whether scores are changed by the tokens of the text, or by a bias.
ROW = np.dtype(
    [
        ("temperature", np.float32),
        ("top_k", np.int32),
        ("top_p", np.float32),
        ("min_p", np.float32),
        ("changes", np.int32),
        ("penalty", np.float32),
        ("presence", np.float32),
        ("frequency", np.float32),
        ("logprob", np.int32),
        ("drawn", np.int32),
        ("draws", np.float32, (DRAWS,)),
    ]
)


@native
def ordered(bits):
    """Turn the bits of a float into an integer in the same order; twice, and it is back."""
    return np.int32(bits ^ (np.int32(bits >> 31) & SIGN))


@native
def number(key):
    """Return the float that `ordered` turned into this."""
    return np.int32(ordered(np.int32(key))).view(np.float32)


@native
def reach(scores, least):
    """Return how many scores are at least this. NaN is not."""
    count = np.int32(0)
    for i in range(len(scores)):
        count += np.int32(scores[i] >= least)
    return count


@native
def top_of(bits):
    """Return the highest of a block of floats, in order as integers: of floats a highest is not vectorised."""
    top = np.int32(-SIGN - 1)
    for i in range(len(bits)):
        top = max(top, ordered(bits[i]))
    return top


@native
def highest(scores, blocks):
    """Return the highest score, NaN where there is one, and write the highest of each block."""
    top, good = np.float32(-np.inf), 0
    for block in range(len(blocks)):
        part = scores[block * BLOCK : (block + 1) * BLOCK]
        good += reach(part, np.float32(-np.inf))
        blocks[block] = number(top_of(part.view(np.int32)))
        top = max(top, blocks[block])
    return np.float32(np.nan) if good < len(scores) else top


@summing
def weigh(scores, top, inverse, least_score, least_weight, weights):
    """Write the weights of a block, 0 for what is cut, and return their sum."""
    total = ZERO
    for i in range(len(scores)):
        weight = exp((scores[i] - top) * inverse)
        kept = ZERO if scores[i] < least_score or weight < least_weight else weight
        weights[i] = kept
        total += kept
    return total


@summing
def exponentials(scores, top):
    """Return the sum of exp(score - top) over a block."""
    total = ZERO
    for i in range(len(scores)):
        total += exp(scores[i] - top)
    return total


@summing
def holds(weights, least):
    """Return the sum of the weights that are at least this."""
    total = ZERO
    for i in range(len(weights)):
        total += ZERO if weights[i] < least else weights[i]
    return total


@native
def gather(values, least, found):
    """Copy the values that are at least this, in their order, and return how many they are."""
    count = 0
    for i in range(len(values)):
        found[count] = values[i]
        count += values[i] >= least
    return count


@native
def kth(scores, k):
    """Return a bound that the k highest scores reach, and no others but those that equal the last of them."""
    low, high = np.int64(-INFINITY - 1), np.int64(INFINITY + 1)
    while high - low > 1:
        middle = (low + high) // 2
        bound = number(middle)
        count = reach(scores, bound)
        if count == k:
            return bound
        if count > k:
            low = middle
        else:
            high = middle
    return number(low)


@native
def least_of_top_k(scores, blocks, k, found):
    """Return what `kth` returns. The k highest of the blocks leave few scores to look at."""
    if k > len(blocks):
        return kth(scores, k)
    bound, count = kth(blocks, k), 0
    for block in range(len(blocks)):
        if blocks[block] >= bound:
            count += gather(scores[block * BLOCK : (block + 1) * BLOCK], bound, found[count:])
    return max(kth(found[:count], k), bound)


@native
def cut_top_p(weights, blocks, total, top_p, found):
    """Leave the fewest weights that hold top_p of the total, the likeliest. Of equal ones the first stay."""
    enough = top_p * total
    # All that are lighter hold less than what may go.
    bound = HALF * (total - enough) / np.float32(len(weights))
    heavy = found[: gather(weights, bound, found)]
    low, high = np.int64(np.float32(bound).view(np.int32)), np.int64(0x3F800001)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(heavy, number(middle)) >= enough:
            low = middle
        else:
            high = middle
    least, heavier = number(low), number(low + 1)
    above, equal = holds(heavy, heavier), reach(heavy, least) - reach(heavy, heavier)
    stay = max(1, math.ceil((enough - above) / least)) if least > ZERO else equal
    if stay < equal:
        for i in range(len(weights)):
            if weights[i] == least:
                if stay <= 0:
                    weights[i] = ZERO
                stay -= 1
    for block in range(len(blocks)):
        part = weights[block * BLOCK : (block + 1) * BLOCK]
        blocks[block] = weigh_again(part, least)


@summing
def weigh_again(weights, least):
    """Set what is lighter to 0, and return the sum of a block."""
    total = ZERO
    for i in range(len(weights)):
        kept = ZERO if weights[i] < least else weights[i]
        weights[i] = kept
        total += kept
    return total


@native
def draw_from(weights, blocks, draw):
    """Return the first token up to which the weights hold more than this share."""
    total = 0.0
    for block in range(len(blocks)):
        total += blocks[block]
    threshold, before, token = draw * total, 0.0, 0
    for block in range(len(blocks)):
        if before + blocks[block] <= threshold:
            before += blocks[block]
            continue
        for i in range(block * BLOCK, min((block + 1) * BLOCK, len(weights))):
            if weights[i] > ZERO:
                before, token = before + weights[i], i
                if before > threshold:
                    return token
    return token


@native
def first_of(scores, top, blocks):
    """Return where the highest score stands first; if it is NaN, the first NaN."""
    block = 0
    while not math.isnan(top) and blocks[block] != top:
        block += 1
    token = block * BLOCK
    while scores[token] != top and not math.isnan(scores[token]):
        token += 1
    return token


@native
def log_sum(scores, top):
    """Return log(sum(exp(scores))), of which the highest is `top`."""
    total = 0.0
    for block in range(-(-len(scores) // BLOCK)):
        total += exponentials(scores[block * BLOCK : (block + 1) * BLOCK], top)
    return top + math.log(total)


@native
def choose_row(scores, temperature, top_k, top_p, min_p, changes, penalty, seen, added, draw, logprob, scratch):
    """Return a token and, with `logprob`, its log-probability at temperature 1 by unchanged scores, in nats, else NaN.

    scores: fp32 [V], which stay as they are; the settings as in ROW; seen uint8 [V] and added fp32 [V]: a Past, read
    where it changes scores; draw: fp32 in [0, 1); scratch: fp32 [4, V]. Where a score is NaN or inf, or all are -inf,
    there is no distribution: the first token, or at temperature 0 the highest (NaN above all).
    """
    weights, found, penalised = scratch[0], scratch[1], scores
    blocks = scratch[2, : -(-len(scores) // BLOCK)]
    raw_top = top = highest(scores, blocks)
    if changes:
        penalised = scratch[3]
        for i in range(len(scores)):
            score = scores[i]
            changed = score / penalty if score > ZERO else score * penalty
            penalised[i] = (changed if seen[i] else score) + added[i]
        top = highest(penalised, blocks)
    token, log_total = 0, math.nan
    if temperature == ZERO:
        token = first_of(penalised, top, blocks)
    elif math.isfinite(top):
        least = np.float32(-np.inf)
        if top_k < len(scores):
            least = least_of_top_k(penalised, blocks, top_k, found)
        inverse, total = ONE / temperature, 0.0
        for block in range(len(blocks)):
            part = slice(block * BLOCK, (block + 1) * BLOCK)
            blocks[block] = weigh(penalised[part], top, inverse, least, min_p, weights[part])
            total += blocks[block]
        if temperature == ONE and not changes and top_k >= len(scores) and min_p == ZERO:
            log_total = top + math.log(total)
        if top_p < ONE:
            cut_top_p(weights, blocks, np.float32(total), top_p, found)
        token = draw_from(weights, blocks, draw)
    if not logprob or not math.isfinite(raw_top):
        return token, np.float32(np.nan)
    if math.isnan(log_total):
        log_total = log_sum(scores, raw_top)
    return token, np.float32(scores[token] - log_total)


@native
def choose_next(row, scores, seen, added, scratch):
    """Choose for a ROW, which counts what it draws: see choose_row. Where it changes scores, its Past notes the token.

    `row.drawn` must be below DRAWS.
    """
    draw = ZERO
    if row.temperature > ZERO:
        draw = row.draws[row.drawn]
        row.drawn += 1
    token, logprob = choose_row(
        scores, row.temperature, row.top_k, row.top_p, row.min_p, row.changes, row.penalty, seen, added, draw,
        row.logprob, scratch,
    )  # fmt: skip
    if row.changes:
        added[token] -= row.frequency + (row.presence if seen[token] < 2 else ZERO)
        seen[token] = 2
    return token, logprob
