"""The data order: global sample number -> (data set, clip), a pure function of the seed.

It knows nothing of ranks, workers or restarts (design invariant 1). Numbers come in blocks of 4 096. Within
a block each data set gets the count that keeps its running total nearest its weight (cumulative largest
remainder), in slots permuted by the seed. The k-th draw of a data set of N clips is element k mod N of pass
k div N; a pass permutes shards, then clips inside windows of `shuffle_shards` shards.

Permutations sort raw Philox words, whose stream numpy guarantees across versions (unlike `permutation`).
"""

from functools import lru_cache
from typing import Any

import numpy as np

BLOCK = 4096
_SLOTS, _SHARDS, _CLIPS = 1, 2, 3


def permutation(size: int, *key: int) -> np.ndarray:
    """A permutation of range(size) that depends on the integers `key` alone."""
    words = np.random.SeedSequence(key).generate_state(2, np.uint64)
    return np.argsort(np.random.Philox(key=words).random_raw(size), kind="stable")


class MixtureOrder:
    """Sample number -> (data set index, k): the k-th draw of that data set."""

    def __init__(self, weights: list[float], seed: int) -> None:
        self.share = np.asarray(weights, np.float64) / np.sum(weights)
        self.seed = seed
        self._before = [np.zeros(len(weights), np.int64)]

    def locate(self, number: int) -> tuple[int, int]:
        block, slot = divmod(number, BLOCK)
        dataset, rank = self._block(block)
        return int(dataset[slot]), int(self.drawn_before(block)[dataset[slot]] + rank[slot])

    def drawn_before(self, block: int) -> np.ndarray:
        """(datasets,) draws of each data set in all blocks before `block`."""
        while len(self._before) <= block:
            self._before.append(self._before[-1] + self._counts(len(self._before) - 1))
        return self._before[block]

    def _counts(self, block: int) -> np.ndarray:
        """Cumulative largest remainder: what each set is owed by now, rounded so that the block is full."""
        owed = self.share * BLOCK * (block + 1) - self._before[block]
        counts = np.maximum(np.floor(owed), 0).astype(np.int64)
        by_remainder = np.argsort(-(owed - counts), kind="stable")
        missing = BLOCK - counts.sum()
        if missing >= 0:
            counts[by_remainder[:missing]] += 1
        for dataset in by_remainder[::-1]:
            if counts.sum() > BLOCK and counts[dataset] > 0:
                counts[dataset] -= 1
        return counts

    @lru_cache(maxsize=8)  # noqa: B019 - a stream lives as long as the run
    def _block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """(BLOCK,) data set of each slot, and its rank among the slots of that data set."""
        counts = self.drawn_before(block + 1) - self.drawn_before(block)
        dataset = np.empty(BLOCK, np.int64)
        dataset[permutation(BLOCK, self.seed, _SLOTS, block)] = np.repeat(np.arange(len(counts)), counts)
        rank = np.empty(BLOCK, np.int64)
        for index in range(len(counts)):
            slots = np.flatnonzero(dataset == index)
            rank[slots] = np.arange(len(slots))
        return dataset, rank


class PassOrder:
    """k-th draw of one data set -> element (clip number). `salt` tells data sets apart."""

    def __init__(self, shard_sizes: np.ndarray, window_shards: int, seed: int, salt: int) -> None:
        self.shard_sizes, self.window_shards = shard_sizes, max(1, window_shards)
        self.seed, self.salt = seed, salt
        self.starts = np.cumsum(shard_sizes) - shard_sizes
        self.size = int(shard_sizes.sum())
        self._remember()

    def _remember(self) -> None:
        """The last windows, of each data set by itself: one cache of the class would be too small for a mixture."""
        self._windows, self._window = lru_cache(4)(self._windows), lru_cache(4)(self._window)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in vars(self).items() if k not in ("_windows", "_window")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._remember()

    def element(self, draw: int) -> int:
        number, position = divmod(draw, self.size)
        ends = self._windows(number)[1]
        window = int(np.searchsorted(ends, position, side="right"))
        within = position - (ends[window - 1] if window else 0)
        return int(self._window(number, window)[within])

    def window(self, draw: int) -> tuple[int, list[int]]:
        """Number of the window (over all passes) that a draw falls into, and the shards of the one after it."""
        number, position = divmod(draw, self.size)
        order, ends = self._windows(number)
        window = int(np.searchsorted(ends, position, side="right"))
        following = order[(window + 1) * self.window_shards : (window + 2) * self.window_shards]
        if not len(following):
            following = self._windows(number + 1)[0][: self.window_shards]
        return number * len(ends) + window, following.tolist()

    def _windows(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Shard order of a pass, and the number of clips up to the end of each window."""
        order = permutation(len(self.shard_sizes), self.seed, _SHARDS, self.salt, number)
        starts = np.arange(0, len(order), self.window_shards)
        return order, np.cumsum(np.add.reduceat(self.shard_sizes[order], starts))

    def _window(self, number: int, window: int) -> np.ndarray:
        order = self._windows(number)[0][window * self.window_shards : (window + 1) * self.window_shards]
        clips = np.concatenate([np.arange(self.starts[s], self.starts[s] + self.shard_sizes[s]) for s in order])
        return clips[permutation(len(clips), self.seed, _CLIPS, self.salt, number, window)]
