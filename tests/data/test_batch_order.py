"""Which examples make which batch."""

import numpy as np
import pytest

from genjax_lab.data.batch_order import BatchOrder, epoch_order, random_bits

GOLDEN_FIRST_EPOCH = [7, 6, 8, 3, 2, 4, 1, 5, 0, 9]
GOLDEN_SECOND_EPOCH = [2, 5, 1, 8, 6, 7, 0, 4, 3, 9]
GOLDEN_BITS = [3828096437959507517, 14823850763057297450, 15496683073239815347]


def order_of(num_examples=10, batch_size=4, seed=0, **options):
    defaults = {
        "num_epochs": None,
        "shuffle": True,
        "drop_remainder": True,
        "shard_index": 0,
        "shard_count": 1,
    }
    return BatchOrder(num_examples, batch_size, seed, **{**defaults, **options})


def indices(order, steps):
    return np.concatenate([order[step].indices for step in range(steps)])


def test_order_never_changes():
    # A changed order would silently change what every restored run sees next.
    np.testing.assert_array_equal(epoch_order(10, 0, 0), GOLDEN_FIRST_EPOCH)
    np.testing.assert_array_equal(epoch_order(10, 0, 1), GOLDEN_SECOND_EPOCH)
    np.testing.assert_array_equal(random_bits(np.arange(3), 0, 0), GOLDEN_BITS)


def test_every_epoch_holds_every_example_once_in_a_new_order():
    stream = indices(order_of(), 15).reshape(6, 10)
    np.testing.assert_array_equal(np.sort(stream, axis=1), np.tile(np.arange(10), (6, 1)))
    assert len({tuple(epoch) for epoch in stream}) == 6


def test_the_next_seed_is_not_the_next_epoch():
    # Seeds that are added to epoch numbers would make runs with neighbouring seeds share epochs.
    assert not np.array_equal(epoch_order(100, 7, 1), epoch_order(100, 8, 0))
    assert not np.array_equal(epoch_order(100, 7, 0), epoch_order(100, 8, 0))


def test_without_shuffling_examples_come_in_stored_order():
    np.testing.assert_array_equal(indices(order_of(shuffle=False), 5), np.tile(np.arange(10), 2))


@pytest.mark.parametrize("shard_count", [1, 2, 4])
def test_processes_together_read_the_global_batches(shard_count):
    whole = order_of(batch_size=8)
    shards = [
        order_of(batch_size=8, shard_index=index, shard_count=shard_count)
        for index in range(shard_count)
    ]
    for step in (0, 1, 7, 12345):
        for field in (0, 1):
            together = np.concatenate([shard[step][field] for shard in shards])
            np.testing.assert_array_equal(together, whole[step][field])


def test_last_batch_is_dropped_or_shared():
    dropped = order_of(num_epochs=3, batch_size=8)
    assert dropped.num_batches == len(dropped) == 3
    kept = [
        order_of(num_epochs=3, batch_size=8, drop_remainder=False, shard_index=i, shard_count=2)
        for i in range(2)
    ]
    assert [len(order) for order in kept] == [4, 4]
    assert [order[3].indices.size for order in kept] == [3, 3]
    stream = np.concatenate([order[step].indices for step in range(4) for order in kept])
    np.testing.assert_array_equal(np.bincount(stream), np.full(10, 3))
    with pytest.raises(IndexError):
        dropped[3]


def test_random_bits_are_fair_and_independent_between_streams():
    positions = np.arange(20000)
    streams = [(0, 0), (0, 1), (1, 0)]
    bits = np.stack([random_bits(positions, seed, stream) for seed, stream in streams])
    unpacked = (bits[..., None] >> np.arange(64, dtype=np.uint64)) & np.uint64(1)
    # Five standard errors of a fair coin over 20000 throws; 192 means, false alarm below 2e-4.
    assert np.abs(unpacked.mean(axis=1) - 0.5).max() < 5 * 0.5 / np.sqrt(20000)
    for first, second in [(0, 1), (0, 2), (1, 2)]:
        agreement = (unpacked[first] == unpacked[second]).mean(axis=0)
        assert np.abs(agreement - 0.5).max() < 5 * 0.5 / np.sqrt(20000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_examples": 0}, "no examples"),
        ({"seed": -1}, "seed"),
        ({"seed": 0.5}, "seed"),
        ({"num_epochs": 0}, "num_epochs"),
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 4, "shard_count": 3}, "shard_count=3"),
        ({"shard_index": 2, "shard_count": 2}, "shard_index"),
        ({"batch_size": 11}, "larger than the data set of 10"),
        (
            {"num_epochs": 1, "batch_size": 8, "drop_remainder": False, "shard_count": 4},
            "2 rows",
        ),
    ],
)
def test_numbers_that_do_not_fit_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        order_of(**options)
