"""The reference evaluated beforehand, on every image and sample, instead of in every step.

A grid of rounds needs of its frozen reference the log-likelihoods of the batch only. Of tokens they
are exact and can be computed once. Of images they are so for given draws of (t, noise): each image
and sample gets a few sets of draws, by seed, and a step takes one of them at random.

With K sets that costs K (images + samples) evaluations at every launch of a round, and again for
a probe of beta, in place of 2 steps * batch_size.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from experiments.image_data import replicated
from genjax_lab import data
from genjax_lab.objectives import Objective
from genjax_lab.parallel import batch_sharding

# (variables, batch, seeds [batch, K], round) -> entries for the batch, [batch, ...] each.
Record = Callable[[Mapping[str, Any], Mapping[str, Array], Array, int], Mapping[str, Array]]


def with_recorded(
    loader: data.Loader,
    epoch: data.Loader,
    record: Record,
    reference: Mapping[str, Any],
    seeds: np.ndarray,
    index: int,
    *,
    mesh: Mesh,
    compute_dtype: str | None,
) -> data.Loader:
    """The loader with the entries of `record` for each of its examples.

    Args:
      loader: of training batches.
      epoch: of the same examples once, in order, whole on every process.
      record: what evaluates the reference.
      reference: its variables.
      seeds: [examples, K] integers.
      index: number of the round.
      mesh: where to evaluate.
      compute_dtype: type in which the objective sees parameters; None: as they are.
    """
    if compute_dtype:  # as the train step shows them to the objective
        reference = {**reference, "params": optax.tree.cast(reference["params"], compute_dtype)}
    reference = replicated(reference, mesh)
    compiled = jax.jit(
        lambda reference, batch, seeds: record(reference, batch, seeds, index),
        out_shardings=NamedSharding(mesh, PartitionSpec()),
    )
    parts, first = [], 0
    for batch in epoch:
        rows = len(batch["image"])
        batch = {**batch, "seeds": seeds[first : first + rows]}
        whole = {  # the last batch is filled up, to be cut among the devices as the others
            name: np.resize(value, (epoch.batch_size, *value.shape[1:]))
            for name, value in batch.items()
        }
        whole = jax.device_put(whole, batch_sharding(mesh))
        part = compiled(reference, whole, whole.pop("seeds"))
        parts.append({name: np.asarray(value)[:rows] for name, value in part.items()})
        first += rows
    return loader.with_columns(
        {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    )


def on_recorded_draws(objective: Objective) -> Objective:
    """An objective of images with one of their recorded sets of draws, at random in every step.

    Its batches have "seeds" and "fake_seeds", [batch, K], and "reference_terms" and
    "fake_reference_terms", [batch, K, num_draws], where those of `ddo_denoising` have "seed" and
    "fake_seed", [batch], and terms [batch, num_draws].
    """

    def on_one_of_them(variables, batch, key):
        batch = dict(batch)
        for stream, kind in enumerate(("", "fake_")):
            seeds, terms = batch.pop(f"{kind}seeds"), batch[f"{kind}reference_terms"]
            chosen = jax.random.randint(
                jax.random.fold_in(key, stream), (len(seeds), 1), 0, seeds.shape[1]
            )
            batch[f"{kind}seed"] = jnp.take_along_axis(seeds, chosen, 1)[:, 0]
            terms = jnp.take_along_axis(terms, chosen[..., None], 1)[:, 0]
            batch[f"{kind}reference_terms"] = terms
        return objective(variables, batch, key)

    return on_one_of_them
