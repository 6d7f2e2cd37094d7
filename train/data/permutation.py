"""A shuffle without a table."""

import numpy as np


class Permutation:
    """A pseudo-random bijection of range(size), computed where it is asked for: no table, whatever the size.

    A Feistel network over the next even number of bits, walked until the value falls inside the range (Black & Rogaway,
    "Ciphers with Arbitrary Finite Domains", 2002).
    """

    ROUNDS = 6

    def __init__(self, size: int, *key: int) -> None:
        self.size = size
        self.half = np.uint64(max(2, ((size - 1).bit_length() + 1) // 2))
        self.mask = np.uint64((1 << int(self.half)) - 1)
        self.keys = np.random.SeedSequence(key).generate_state(self.ROUNDS, np.uint64)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """int64 [n] -> int64 [n]"""
        values = self._encrypt(positions.astype(np.uint64))
        while len(outside := np.flatnonzero(values >= self.size)):
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: np.ndarray) -> np.ndarray:
        left, right = values >> self.half, values & self.mask
        for key in self.keys:
            # One round of the splitmix64 finalizer, which mixes every bit into the low half.
            mixed = (right ^ key) * np.uint64(0xBF58476D1CE4E5B9)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((mixed ^ (mixed >> np.uint64(32))) & self.mask)
        return (left << self.half) | right
