"""Which examples make up which batch: a pure function of (seed, step).

An endless stream of examples is the concatenation of epochs, each a fresh permutation of the data
set; batch number `step` is rows `step * B ... (step + 1) * B` of that stream, so batches may
straddle epochs and no example is lost. Process p of P gets rows `p * B / P ... (p + 1) * B / P` of
every batch: put together, P processes see exactly the batches that one process would.

The permutation sorts the raw output of NumPy's Philox generator, which NumPy promises never to
change (NEP 19). grain's own index shuffle needs no O(num_examples) memory, but costs 20
microseconds an example on data sets of a few thousand, a hundred times more than this; grain takes
over after the order, in `genjax_lab.data.loader`.
"""

import functools
import sys
from typing import NamedTuple

import numpy as np
from jaxtyping import Int64, UInt64


@functools.lru_cache(maxsize=8)
def epoch_order(num_examples: int, seed: int, epoch: int) -> Int64[np.ndarray, "num_examples"]:
    """The permutation of `range(num_examples)` in which one epoch is seen.

    Args:
        num_examples: Size of the data set.
        seed: The order's seed, any non-negative integer.
        epoch: Number of the epoch, from 0. Different epochs, and different seeds, are independent.

    Returns:
        Read-only int64 `[num_examples]`.
    """
    generator = np.random.Philox(np.random.SeedSequence(seed, spawn_key=(0, epoch)))
    order = np.argsort(generator.random_raw(num_examples), kind="stable")
    order.setflags(write=False)
    return order


def random_bits(
    positions: Int64[np.ndarray, "batch"], seed: int, stream: int
) -> UInt64[np.ndarray, "batch"]:
    """64 random bits for every position of the example stream.

    splitmix64 (Steele, Lea and Flood, 2014) evaluated at `key + position * gamma`, where the key
    comes from the seed and the stream. A function of its arguments alone, so an example's
    augmentation does not depend on which process or thread reads it.

    Args:
        positions: Positions in the example stream, `[batch]`.
        seed: The pipeline's seed, any non-negative integer.
        stream: Number of the independent stream of bits: one for each random transform.

    Returns:
        uint64 `[batch]`.
    """
    key = _stream_key(seed, stream)
    with np.errstate(over="ignore"):
        bits = key + positions.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return bits ^ (bits >> np.uint64(31))


@functools.lru_cache(maxsize=64)
def _stream_key(seed: int, stream: int) -> np.uint64:
    return np.random.SeedSequence(seed, spawn_key=(1, stream)).generate_state(1, np.uint64)[0]


class Rows(NamedTuple):
    """The rows of one batch that one process reads.

    Attributes:
        indices: Indices into the data set, int64 `[local_batch]`.
        positions: The rows' positions in the example stream, int64 `[local_batch]`.
    """

    indices: Int64[np.ndarray, "local_batch"]
    positions: Int64[np.ndarray, "local_batch"]


class BatchOrder:
    """The batches of one process as a random-access sequence of `Rows`, for grain to read from."""

    def __init__(
        self,
        num_examples: int,
        batch_size: int,
        seed: int,
        *,
        num_epochs: int | None,
        shuffle: bool,
        drop_remainder: bool,
        shard_index: int,
        shard_count: int,
    ):
        """Checks the numbers and fixes the number of batches.

        Args:
            num_examples: Size of the data set.
            batch_size: Rows of the global batch, over all processes.
            seed: Seed of the order.
            num_epochs: Number of epochs; None repeats for ever.
            shuffle: Whether each epoch is permuted; otherwise examples come in their stored order.
            drop_remainder: Whether rows at the end of the last epoch that fill no batch are left
                out; otherwise the last batch is smaller.
            shard_index: Number of this process.
            shard_count: Number of processes.

        Raises:
            ValueError: If the numbers do not fit together.
        """
        _require_fit(
            num_examples, batch_size, seed, num_epochs, drop_remainder, shard_index, shard_count
        )
        self.num_examples = num_examples
        self.batch_size = batch_size
        self.seed = int(seed)
        self.shuffle = shuffle
        self.num_batches = None  # endless
        self._stop = sys.maxsize
        self._shard = (shard_index, shard_count)
        if num_epochs is not None:
            self._stop = num_epochs * num_examples
            if drop_remainder:
                self._stop -= self._stop % batch_size
            self.num_batches = -(-self._stop // batch_size)

    def __len__(self) -> int:
        # grain wants a length; an endless sequence's is as long as Python allows.
        return sys.maxsize // self.batch_size if self.num_batches is None else self.num_batches

    def __getitem__(self, step: int) -> Rows:
        """The rows of batch `step` that belong to this process."""
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} is outside the {len(self)} batches of this order.")
        begin = step * self.batch_size
        rows = min(begin + self.batch_size, self._stop) - begin
        index, count = self._shard
        positions = np.arange(begin + index * rows // count, begin + (index + 1) * rows // count)
        epochs, within = np.divmod(positions, self.num_examples)
        if not self.shuffle:
            return Rows(within, positions)
        indices = np.empty_like(within)
        for epoch in range(epochs[0], epochs[-1] + 1):
            rows_of_epoch = epochs == epoch
            order = epoch_order(self.num_examples, self.seed, int(epoch))
            indices[rows_of_epoch] = order[within[rows_of_epoch]]
        return Rows(indices, positions)


def _require_fit(
    num_examples: int,
    batch_size: int,
    seed: int,
    num_epochs: int | None,
    drop_remainder: bool,
    shard_index: int,
    shard_count: int,
) -> None:
    if num_examples < 1:
        raise ValueError("The data set holds no examples; there is nothing to make batches of.")
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer) or seed < 0:
        raise ValueError(f"seed must be a non-negative integer, got {seed!r}.")
    if num_epochs is not None and num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, or None for ever, got {num_epochs}.")
    if shard_count < 1 or not 0 <= shard_index < shard_count:
        raise ValueError(
            f"shard_index must be in [0, shard_count), got shard_index={shard_index} with "
            f"shard_count={shard_count}."
        )
    if not isinstance(batch_size, int | np.integer) or batch_size < 1 or batch_size % shard_count:
        raise ValueError(
            f"batch_size={batch_size}, the size of the global batch, must be a positive multiple "
            f"of shard_count={shard_count} so that every process gets equally many rows."
        )
    if drop_remainder and num_examples < batch_size:
        raise ValueError(
            f"batch_size={batch_size} is larger than the data set of {num_examples} examples. Use "
            "a smaller batch_size, or drop_remainder=False."
        )
    if num_epochs is not None and not drop_remainder:
        remainder = num_epochs * num_examples % batch_size
        if remainder % shard_count:
            raise ValueError(
                f"The last batch would have {remainder} rows, which shard_count={shard_count} "
                "processes cannot share equally. Use drop_remainder=True or another batch_size."
            )
