"""Any number of samples, in batches of one shape, resumable by the range of seeds.

A sample is a function of (key, seed) alone, so 50 000 of them may be drawn in any batches, on any
mesh, by any number of runs: `range(0, 50_000)` here, or `range(0, 25_000)` and, after a break or
elsewhere, `range(25_000, 50_000)`.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxtyping import Int, PRNGKeyArray, PyTree
from tqdm import tqdm

from genjax_lab.samplers.base import SampleInfo, Sampler, sample


def sample_batches(
    sampler: Sampler,
    key: PRNGKeyArray,
    *,
    seeds: Sequence[int] | Int[np.ndarray, "num"],
    batch_size: int,
    sample_shape: tuple[int, ...],
    condition_fn: Callable[[Int[np.ndarray, "batch"]], PyTree] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    progress: bool = False,
    with_info: bool = False,
) -> Iterator[tuple[Any, ...]]:
    """Draws the samples named by `seeds`, `batch_size` at a time.

    The last batch is filled up with repetitions, which are cut off again, so that one compilation
    serves all. The next batch is under way while the caller works on the present one.

    Args:
      sampler: the algorithm.
      key: a typed key; the sample of a seed is a function of the two.
      seeds: integers in [0, 2^32), usually a range.
      batch_size: rows of every call; divisible by the mesh's data axes.
      sample_shape: shape of one sample, without the batch axis.
      condition_fn: seeds [batch_size] -> what these samples are conditioned on, e.g.
        `lambda seeds: seeds % num_classes` for equally many of each class.
      mesh: shards the batch over the mesh's "data" and "fsdp" axes. With several processes, all
        of them must make the same calls and all receive all samples.
      progress: whether to show a progress bar.
      with_info: whether to tell the `SampleInfo` of each batch, too.

    Yields:
      (seeds [part], samples [part, ...]) of each batch as numpy arrays, in the order of `seeds`;
      or (seeds, samples, info).

    Raises:
      ValueError: if `batch_size` is not positive, or as `sample` does.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be positive")
    seeds = np.asarray(seeds)
    if seeds.ndim != 1 or not (np.issubdtype(seeds.dtype, np.integer) or seeds.size == 0):
        raise ValueError(f"seeds must be a sequence of integers, not {seeds.dtype}{seeds.shape}")

    def launch(part: np.ndarray) -> tuple[jax.Array, SampleInfo]:
        filled = np.pad(part, (0, batch_size - len(part)), mode="edge")
        return sample(
            sampler,
            key,
            shape=(batch_size, *sample_shape),
            condition=None if condition_fn is None else condition_fn(filled),
            seeds=filled,
            mesh=mesh,
        )

    def batches():
        parts = [seeds[i : i + batch_size] for i in range(0, len(seeds), batch_size)]
        launched = ((part, launch(part)) for part in parts)
        ahead = itertools.chain(launched, [None])
        with tqdm(total=len(seeds), disable=not progress, desc="sampling") as bar:
            current = next(ahead)
            while current is not None:
                following = next(ahead)
                part, (samples, info) = current
                samples = to_host(samples)[: len(part)]
                yield (part, samples, info) if with_info else (part, samples)
                bar.update(len(part))
                current = following

    return batches()


def to_host(array: Any) -> Any:
    """An array as numpy, of all processes' parts; these must all call it."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
