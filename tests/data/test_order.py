"""Invariant 1: the data order is a pure function of (seed, number)."""

import numpy as np
import pytest

from egom2p.data.loader import BatchPlan
from egom2p.data.order import BLOCK, MixtureOrder, PassOrder, permutation

WEIGHTS = [0.38306649, 0.49349421, 0.08044809, 0.01568063, 0.01053879, 0.00781087, 0.00586797, 0.00309295]


def test_permutation_is_pinned():
    """The order of a run must not move with a library's version."""
    assert permutation(8, 1, 2, 3).tolist() == [1, 2, 4, 6, 5, 0, 7, 3]
    assert sorted(permutation(1000, 5)) == list(range(1000))


def test_random_access_equals_sequential():
    first, second = MixtureOrder(WEIGHTS, 3), MixtureOrder(WEIGHTS, 3)
    numbers = [0, 1, 5000, 123_456, 4095, 4096, 77]
    jumps = [first.locate(n) for n in numbers]
    walked = {n: second.locate(n) for n in range(max(numbers[:3]) + 1)}
    assert all(walked[n] == j for n, j in zip(numbers, jumps, strict=True) if n in walked)
    assert first.locate(123_456) == MixtureOrder(WEIGHTS, 3).locate(123_456)


def test_draws_of_each_data_set_are_consecutive():
    order = MixtureOrder(WEIGHTS, 1)
    seen: dict[int, list[int]] = {}
    for number in range(3 * BLOCK):
        dataset, draw = order.locate(number)
        seen.setdefault(dataset, []).append(draw)
    for draws in seen.values():
        assert sorted(draws) == list(range(len(draws)))


@pytest.mark.parametrize("weights", [WEIGHTS, [1e-5, 1 - 1e-5], [1, 1, 1], [0.5, 0.0, 0.5], [1e-4] * 5 + [1]])
def test_mixture_stays_within_one_draw_of_its_weights(weights):
    order = MixtureOrder(weights, 0)
    for block in (1, 2, 3, 50, 200):
        drawn = order.drawn_before(block)
        assert drawn.sum() == block * BLOCK
        assert np.abs(drawn - order.share * block * BLOCK).max() <= 1 + 1e-9
    assert (np.diff([order.drawn_before(b) for b in range(201)], axis=0) >= 0).all()


def test_sets_that_are_ahead_wait_and_the_block_is_full_all_the_same():
    """Two tiny sets are a draw ahead: the large one is owed more than a block, and gets a block."""
    order = MixtureOrder([0.1, 0.1, 4095.8], 0)
    order._before.append(np.array([1, 1, 4094]))
    assert order._counts(1).tolist() == [0, 0, 4096]


def test_one_pass_from_the_definition():
    """Shards permuted, clips of each window of three permuted: element by element, for two passes and two data sets."""
    sizes = np.array([5, 3, 7, 4, 6, 2, 1])
    starts = np.cumsum(sizes) - sizes
    for salt in (0, 3):
        order = PassOrder(sizes, window_shards=3, seed=9, salt=salt)
        for number in (0, 1):
            expected = []
            for window, shards in enumerate(np.split(permutation(7, 9, 2, salt, number), [3, 6])):
                clips = np.concatenate([starts[s] + np.arange(sizes[s]) for s in shards])
                expected += clips[permutation(len(clips), 9, 3, salt, number, window)].tolist()
            assert [order.element(28 * number + i) for i in range(28)] == expected
    alone = PassOrder(sizes, window_shards=0, seed=9, salt=0)
    assert alone.window_shards == 1


def test_a_pass_visits_every_clip_once_and_windows_hold():
    sizes = np.array([5, 3, 7, 4, 6, 2])
    order = PassOrder(sizes, window_shards=2, seed=4, salt=0)
    shard_of = np.repeat(np.arange(6), sizes)
    for number in range(3):
        elements = [order.element(number * 27 + i) for i in range(27)]
        assert sorted(elements) == list(range(27))
        shards, start = permutation(6, 4, 2, 0, number), 0
        for window in range(3):
            pair = shards[2 * window : 2 * window + 2]
            size = sizes[pair].sum()
            assert set(shard_of[elements[start : start + size]]) == set(pair)
            start += size
    assert [order.element(i) for i in range(27)] != [order.element(27 + i) for i in range(27)]


@pytest.mark.parametrize(("world", "batch"), [(1, 64), (2, 64), (16, 64), (256, 1024)])
def test_any_cluster_sees_the_same_global_batches(world, batch):
    """A cluster of `world` ranks, simulated: what its ranks see in a step is what one process sees."""
    for step in (0, 7, 119_000):
        one = BatchPlan(batch, 4, batch).numbers(step)
        dealt = np.concatenate([BatchPlan(batch, 4, batch, rank, world).numbers(step) for rank in range(world)])
        assert sorted(dealt) == one.tolist()
        assert len({len(BatchPlan(batch, 4, batch, rank, world).numbers(step)) for rank in range(world)}) == 1


def test_the_next_window_is_known_ahead():
    """What is read ahead for remote shards: the shards that the window after this one draws from, over the end of a
    pass too."""
    sizes = np.array([5, 7, 3, 6, 4])
    order = PassOrder(sizes, 2, seed=3, salt=1)
    ends = np.cumsum(sizes)
    shard = [int(np.searchsorted(ends, order.element(d), side="right")) for d in range(3 * sizes.sum())]
    windows = [order.window(d) for d in range(3 * sizes.sum())]
    assert [w for w, _ in windows] == sorted(w for w, _ in windows)
    for number in range(windows[-1][0]):
        ahead = next(following for w, following in windows if w == number)
        drawn = {shard[d] for d, (w, _) in enumerate(windows) if w == number + 1}
        assert drawn == set(ahead)
