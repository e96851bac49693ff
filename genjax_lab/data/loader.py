"""The one input pipeline: any TFDS image data set, or arrays, to batches for training.

    order (seed, step) -> read -> pixels to [-1, 1] -> random transforms -> prefetch

`BatchOrder` says which examples make a batch; grain reads, transforms and prefetches them in
threads. Reading is either streaming, decoding the examples of each batch from array_record files,
or from memory, where a data set that is small enough has been decoded once and a batch is one NumPy
gather. Both give the same batches. Every batch is a function of (data, seed, step), so the loader's
state is the number of the next step, whatever was being prefetched and on however many processes.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
from jaxtyping import Int64, UInt64

from genjax_lab.data import prepared
from genjax_lab.data.batch_order import BatchOrder, Rows, random_bits
from genjax_lab.data.examples import Preprocess, check_examples, collect_examples
from genjax_lab.data.image_levels import DatasetInfo, require_levels

Batch = dict[str, np.ndarray]
Transform = Callable[[Batch, UInt64[np.ndarray, "batch"]], Batch]
Read = Callable[[Int64[np.ndarray, "batch"]], Batch]

# Decoded images up to this size are kept in memory unless the caller says otherwise.
IN_MEMORY_BYTES = 256 * 2**20
_SHARED_BYTES = 16 * 2**20  # decoded images up to this size are kept for other loaders, too


class Prefetch(NamedTuple):
    """How batches are made ahead of their use.

    Attributes:
        num_threads: Threads that each make one batch at a time; 0 makes a batch when it is asked
            for.
        num_batches: Batches kept ready.
    """

    num_threads: int
    num_batches: int


# Gathering a batch of small images from memory takes less time than handing it between threads.
IN_MEMORY_PREFETCH = Prefetch(num_threads=0, num_batches=0)
STREAMING_PREFETCH = Prefetch(num_threads=16, num_batches=16)


class Loader(Iterator[Batch]):
    """An endless or finite iterator over batches, whose place can be saved and restored.

    `next(loader)` gives the next batch, `loader[step]` any batch without moving. A batch is this
    process's part of the global batch: `"image"` float32 `[batch_size / shard_count, height, width,
    channels]` in [-1, 1] and `"label"` int32 `[batch_size / shard_count]`, as NumPy arrays; arrays
    of `make_loader_from_arrays`, and `with_columns`, bring further entries. Batches of text have
    `"tokens"` in place of these (`genjax_lab.data.text`).

    Attributes:
        info: The description of a data set of images, None for others.
        batch_size: Rows of the global batch.
        num_examples: Number of examples of the split.
        num_batches: Number of batches, None if endless.
    """

    def __init__(
        self,
        order: BatchOrder,
        read: Read,
        info: DatasetInfo | None,
        transforms: Sequence[Transform],
        prefetch: Prefetch,
    ):
        """Puts the stages together; `make_loader` and `make_loader_from_arrays` are the way in.

        Raises:
            ValueError: If a prefetch number is negative.
        """
        if min(prefetch) < 0:
            raise ValueError(f"prefetch must hold no negative numbers, got {prefetch}.")
        self.info = info
        self.batch_size = order.batch_size
        self.num_examples = order.num_examples
        self.num_batches = order.num_batches
        self._order = order
        self._stages = (order, read, info, transforms, prefetch)
        self._options = grain.ReadOptions(
            num_threads=prefetch.num_threads, prefetch_buffer_size=prefetch.num_batches
        )
        self._batches = grain.MapDataset.source(order).map(
            lambda rows: _make_batch(rows, read, info, transforms, order.seed)
        )
        self._iterator = None
        self._step = 0

    def __getitem__(self, step: int) -> Batch:
        """The batch of one step, without moving the iterator.

        Raises:
            IndexError: If there is no such step.
        """
        if not 0 <= step < len(self._order):
            raise IndexError(
                f"step {step} is outside the {len(self._order)} batches of the loader."
            )
        return self._batches[step]

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> Batch:
        if self._iterator is None:
            # Made on first use: a loader that is restored at once never prefetches from step 0.
            remaining = self._batches[self._step :]
            self._iterator = iter(remaining.to_iter_dataset(self._options))
        batch = next(self._iterator)
        self._step += 1
        return batch

    def with_columns(self, columns: Mapping[str, np.ndarray]) -> "Loader":
        """The same batches from the start, with what is known of every example beside it.

        Args:
            columns: new entries of the batches, `[num_examples, ...]`, in the order of the split.

        Raises:
            ValueError: If a column has another length, or the name of an entry that there is.
        """
        order, read, info, transforms, prefetch = self._stages
        if taken := sorted(set(columns) & set(read(np.zeros(1, np.int64)))):
            raise ValueError(f"columns have the names {taken} of entries that the batches have.")
        for name, column in columns.items():
            if len(column) != self.num_examples:
                raise ValueError(
                    f"columns[{name!r}] must be [{self.num_examples}, ...], one row for each "
                    f"example, got {list(np.shape(column))}."
                )

        def wider(indices: Int64[np.ndarray, "batch"]) -> Batch:
            return read(indices) | {name: column[indices] for name, column in columns.items()}

        return Loader(order, wider, info, transforms, prefetch)

    def get_state(self) -> dict[str, Any]:
        """The iterator's place as a small dict that JSON can hold, the same on every process.

        Returns:
            `"step"`, the number of the next batch, and what the order of batches depends on:
            `"seed"`, `"batch_size"`, `"num_examples"`, `"shuffle"`.
        """
        return {"step": self._step, **self._identity()}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Moves to a place that `get_state` gave, perhaps in another run or on other processes.

        Raises:
            ValueError: If the state is of a loader with another order of batches, or holds no
                possible step.
        """
        own = self._identity()
        different = {
            key: (state.get(key), value) for key, value in own.items() if state.get(key) != value
        }
        if different:
            differences = ", ".join(
                f"{key}: state {theirs!r}, loader {ours!r}"
                for key, (theirs, ours) in different.items()
            )
            raise ValueError(
                f"state belongs to a loader with other batches ({differences}). Make the loader "
                "with the same arguments, or start anew without the state."
            )
        step = state.get("step")
        if not isinstance(step, int) or not 0 <= step <= len(self._order):
            raise ValueError(
                f"state['step'] must be an integer in [0, {len(self._order)}], got {step!r}."
            )
        self.close()
        self._step = step

    def close(self) -> None:
        """Stops prefetching. The next `next` starts it again where the iterator stands."""
        if self._iterator is not None:
            self._iterator.close()
            self._iterator = None

    def _identity(self) -> dict[str, Any]:
        return {
            "seed": self._order.seed,
            "batch_size": self.batch_size,
            "num_examples": self.num_examples,
            "shuffle": self._order.shuffle,
        }


def _make_batch(
    rows: Rows, read: Read, info: DatasetInfo, transforms: Sequence[Transform], seed: int
) -> Batch:
    batch = read(rows.indices)
    if "image" in batch and batch["image"].dtype == np.uint8:
        # `dequantize` without its checks, which `read` has made: this runs at every step.
        image = batch["image"].astype(np.float32)
        image /= require_levels(info)
        image -= np.float32(1)
        batch = {**batch, "image": image}
    for stream, transform in enumerate(transforms):
        batch = transform(batch, random_bits(rows.positions, seed, stream))
    return batch


def make_loader(
    name: str,
    split: str,
    batch_size: int,
    seed: int,
    *,
    num_epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    preprocess: Preprocess | None = None,
    transforms: Sequence[Transform] = (),
    in_memory: bool | None = None,
    prefetch: Prefetch | None = None,
    data_dir: prepared.DataDir = None,
    shard_index: int | None = None,
    shard_count: int | None = None,
) -> Loader:
    """Makes the input pipeline of a TFDS image data set.

    `digits` and `mnist5k` are written to disk on first use; other data sets must have been prepared
    (`genjax_lab.data.prepare`).

    Args:
        name: A TFDS name: `"digits"`, `"cifar10"`, `"imagenet_resized/64x64"`.
        split: A TFDS split: `"train"`, `"train+test"`, `"all"`, `"train[:10%]"`.
        batch_size: Rows of the global batch, over all processes.
        seed: Seed of the order and of the transforms, any non-negative integer.
        num_epochs: Number of epochs; None repeats for ever.
        shuffle: Whether every epoch is permuted anew.
        drop_remainder: Whether examples that fill no batch at the end of the last epoch are left
            out. Batches straddle epochs either way.
        preprocess: Deterministic function of one decoded image, before batching; `center_crop`.
        transforms: Random functions `(batch, bits) -> batch` of the finished batch;
            `horizontal_flip`.
        in_memory: Whether to decode the whole split once and keep it; None does so up to 256 MiB.
        prefetch: Threads and batches in flight; None chooses by `in_memory`.
        data_dir: Where data sets live; by default TFDS_DATA_DIR, else `~/tensorflow_datasets`.
        shard_index: Number of this process; by default `jax.process_index()`.
        shard_count: Number of processes; by default `jax.process_count()`.

    Returns:
        The loader, at step 0.

    Raises:
        ValueError: If the data set or split cannot be had, its files are damaged, its images cannot
            be batched, or the numbers do not fit together. Streaming, examples are checked when
            they are read, so the iterator can raise it too.
    """
    builder = prepared.prepared_builder(name, data_dir)
    info = prepared.describe(builder)
    num_examples, read_examples = prepared.open_split(builder, split)

    def read(indices: Int64[np.ndarray, "batch"]) -> Batch:
        return collect_examples(read_examples(indices), indices, info, preprocess)

    order = make_order(
        num_examples,
        batch_size,
        seed,
        num_epochs=num_epochs,
        shuffle=shuffle,
        drop_remainder=drop_remainder,
        shard_index=shard_index,
        shard_count=shard_count,
    )
    image = read(np.zeros(1, np.int64))["image"]  # fails here rather than in the first step
    if in_memory is None:
        in_memory = num_examples * image.nbytes <= IN_MEMORY_BYTES
    if in_memory:
        if preprocess is None and num_examples * image.nbytes <= _SHARED_BYTES:
            arrays = _decoded_split(name, data_dir, split, _files_of(builder.data_path))
        else:
            arrays = _read_all(read, num_examples)
        read = _gather(arrays)
    if prefetch is None:
        prefetch = IN_MEMORY_PREFETCH if in_memory else STREAMING_PREFETCH
    info = info._replace(image_shape=image.shape[1:])
    return Loader(order, read, info, tuple(transforms), prefetch)


def make_loader_from_arrays(
    arrays: Mapping[str, np.ndarray],
    batch_size: int,
    seed: int,
    *,
    num_classes: int | None = None,
    max_value: int = 255,
    value_range: tuple[float, float] | None = (-1.0, 1.0),
    num_epochs: int | None = None,
    shuffle: bool = True,
    drop_remainder: bool = True,
    transforms: Sequence[Transform] = (),
    prefetch: Prefetch | None = None,
    shard_index: int | None = None,
    shard_count: int | None = None,
) -> Loader:
    """Makes the same pipeline over images in memory, such as a pool of generated samples.

    Args:
        arrays: `"image"` `[examples, height, width, channels]`, uint8 or floating point; `"label"`
            integers `[examples]`, unless there are no classes; and any other entries with a leading
            axis of examples, which are batched along.
        batch_size: Rows of the global batch, over all processes.
        seed: Seed of the order and of the transforms.
        num_classes: Number of classes; None takes the largest label plus one.
        max_value: The largest pixel value that uint8 images can have; it becomes 1.0.
        value_range: The range in which floating point images must lie; they are taken as they are.
            None allows any finite value, as for latents.
        num_epochs: As for `make_loader`, like all that follow.
        shuffle: Whether every epoch is permuted anew.
        drop_remainder: Whether examples that fill no last batch are left out.
        transforms: Random functions of the finished batch.
        prefetch: Threads and batches in flight.
        shard_index: Number of this process.
        shard_count: Number of processes.

    Returns:
        The loader, at step 0.

    Raises:
        ValueError: If an image is not finite, out of range or of a wrong type, naming the example;
            if the arrays' lengths differ or are zero; if there are classes but no labels; if the
            numbers do not fit together.
    """
    arrays = {key: np.asarray(value) for key, value in arrays.items()}
    if "image" not in arrays:
        raise ValueError(f"arrays must have an entry 'image', got {sorted(arrays)}.")
    num_examples = len(arrays["image"]) if arrays["image"].ndim else 0
    lengths = {key: value.shape[:1] for key, value in arrays.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"arrays must have equally many examples, got {lengths}.")
    if num_classes and "label" not in arrays:
        raise ValueError(
            f"arrays must have an entry 'label' for num_classes={num_classes}, got "
            f"{sorted(arrays)}; without classes pass num_classes=0."
        )
    order = make_order(
        num_examples,
        batch_size,
        seed,
        num_epochs=num_epochs,
        shuffle=shuffle,
        drop_remainder=drop_remainder,
        shard_index=shard_index,
        shard_count=shard_count,
    )
    if num_classes is None:
        num_classes = int(arrays["label"].max()) + 1 if "label" in arrays else 0
    arrays.setdefault("label", np.zeros(num_examples, np.int32))
    info = DatasetInfo(
        name="arrays",
        image_shape=arrays["image"].shape[1:],
        num_classes=num_classes,
        max_value=max_value if arrays["image"].dtype == np.uint8 else None,
        num_examples={"all": num_examples},
    )
    arrays = check_examples(arrays, np.arange(num_examples), info, value_range)
    prefetch = IN_MEMORY_PREFETCH if prefetch is None else prefetch
    return Loader(order, _gather(arrays), info, tuple(transforms), prefetch)


def make_order(
    num_examples: int,
    batch_size: int,
    seed: int,
    *,
    shard_index: int | None,
    shard_count: int | None,
    **options: Any,
) -> BatchOrder:
    """A `BatchOrder` for this process, where the caller does not say which it is."""
    if (shard_index is None) != (shard_count is None):
        raise ValueError(
            "shard_index and shard_count must be given together or not at all, got "
            f"shard_index={shard_index}, shard_count={shard_count}."
        )
    if shard_index is None:
        shard_index, shard_count = jax.process_index(), jax.process_count()
    return BatchOrder(
        num_examples,
        batch_size,
        seed,
        shard_index=shard_index,
        shard_count=shard_count,
        **options,
    )


def _read_all(read: Read, num_examples: int, chunk: int = 1024) -> Batch:
    """Decodes a whole split into arrays, a chunk at a time."""
    indices = np.arange(num_examples)
    chunks = [
        read(indices[chunk * part : chunk * (part + 1)])
        for part in range(math.ceil(num_examples / chunk))
    ]
    return {key: np.concatenate([part[key] for part in chunks]) for key in chunks[0]}


def _files_of(directory: Any) -> tuple[tuple[str, int, int], ...]:
    """Names, sizes and times of the files that a data set consists of."""
    stats = [(path.name, path.stat()) for path in Path(directory).iterdir()]
    return tuple(sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats))


@functools.lru_cache(maxsize=8)
def _decoded_split(name: str, data_dir: prepared.DataDir, split: str, files: tuple) -> Batch:
    """The arrays of a small split, decoded once for all loaders as long as its files stay."""
    del files
    builder = prepared.prepared_builder(name, data_dir)
    info = prepared.describe(builder)
    num_examples, read_examples = prepared.open_split(builder, split)
    return _read_all(
        lambda indices: collect_examples(read_examples(indices), indices, info, None), num_examples
    )


def _gather(arrays: Batch) -> Read:
    return lambda indices: {key: value[indices] for key, value in arrays.items()}
