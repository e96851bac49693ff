"""The contract of every sampler, and the one compiled loop that runs it.

Like an optax gradient transformation, a `Sampler` is a NamedTuple of pure functions: `predict` is
the network evaluation, `transition` the (possibly random) move that follows it. Splitting the two
lets a wrapper draw many moves from one prediction; keeping per-example and shared state apart
lets it select among them without knowing the sampler.

Samplers and denoisers hold their arrays (weights, time grids) in `jax.tree_util.Partial`, so they
are pytrees: the loop is compiled once per shape and reused when only the weights change.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, Key, PRNGKeyArray, PyTree

from genjax_lab.processes.gaussian import GaussianProcess


class Denoiser(NamedTuple):
    """What a Gaussian sampler knows of a network.

    Attributes:
      predict: (memory, x, t, condition) -> (estimate of x_0, memory); `t` is a scalar or [batch].
      process: the Gaussian process that `x` and `t` belong to.
      memory: what the network remembers before its first evaluation; () for most.
      evaluations: t -> int32, network evaluations that one prediction at time t costs.
    """

    predict: Callable[[PyTree, Array, Array, PyTree], tuple[Array, PyTree]]
    process: GaussianProcess
    memory: PyTree
    evaluations: Callable[[Array], Int[Array, ""]]


class ExampleState(NamedTuple):
    """What belongs to an example; every leaf has a leading batch axis.

    Attributes:
      sample: the current iterate.
      condition: what the network is conditioned on, or None.
      history: whatever else the sampler remembers of an example.
    """

    sample: Array
    condition: PyTree
    history: PyTree = ()


class SharedState(NamedTuple):
    """What the whole batch shares.

    Attributes:
      step: transitions made so far.
      memory: the network's memory.
      evaluations: network evaluations made so far, for each example.
    """

    step: Int[Array, ""]
    memory: PyTree
    evaluations: Int[Array, ""]


class SamplerState(NamedTuple):
    """A sampler's state: what belongs to an example, and what the batch shares."""

    example: ExampleState
    shared: SharedState

    @property
    def sample(self) -> Array:
        """The current iterate."""
        return self.example.sample

    @property
    def step(self) -> Int[Array, ""]:
        """Transitions made so far."""
        return self.shared.step


class Sampler(NamedTuple):
    """A sampling algorithm as pure functions; samplers that wrap samplers return another one.

    Attributes:
      init: (keys, shape, condition) -> state. `keys` are typed keys, one per example, so that a
        sample depends on its own key alone and neither on its batch nor on the mesh.
      predict: state -> (prediction, state), the network evaluation.
      transition: (keys, state, prediction) -> state, without network evaluation where the method
        allows.
      num_steps: transitions made (at most, where `finished` is given).
      finished: state -> bool scalar; stops the loop early.
      report: state -> what else is to be told of the final state, a pytree of arrays.
    """

    init: Callable[[Key[Array, "batch"], tuple[int, ...], PyTree], SamplerState]
    predict: Callable[[SamplerState], tuple[PyTree, SamplerState]]
    transition: Callable[[Key[Array, "batch"], SamplerState, PyTree], SamplerState]
    num_steps: int
    finished: Callable[[SamplerState], Array] | None = None
    report: Callable[[SamplerState], PyTree] | None = None


class SampleInfo(NamedTuple):
    """What `sample` tells beside the samples.

    Attributes:
      num_evaluations: network evaluations made for each example.
      num_steps: transitions made.
      trajectory: the iterate after every step, [num_steps, batch, ...], or None.
      predictions: the prediction of every step, likewise.
      report: what the sampler reports of its final state, or None.
    """

    num_evaluations: Int[Array, ""]
    num_steps: Int[Array, ""]
    trajectory: Array | None
    predictions: PyTree
    report: PyTree = None


def sample(
    sampler: Sampler,
    key: PRNGKeyArray,
    *,
    shape: tuple[int, ...],
    condition: PyTree = None,
    seeds: Int[Array, "batch"] | None = None,
    initial: Float[Array, "batch *dims"] | None = None,
    mesh: jax.sharding.Mesh | None = None,
    trajectory: bool = False,
) -> tuple[Array, SampleInfo]:
    """Runs a sampler in one compiled loop.

    Args:
      sampler: the algorithm.
      key: a typed key; example i uses `fold_in(key, seeds[i])`.
      shape: [batch, ...] of the samples.
      condition: pytree of arrays with a leading batch axis, handed to the network.
      seeds: integers in [0, 2^32) that name the examples; 0 .. batch-1 if None.
      initial: an iterate at the sampler's first time, to start from in place of its own.
      mesh: shards the batch over the mesh's "data" and "fsdp" axes.
      trajectory: whether to return every iterate and prediction (memory grows with num_steps).

    Returns:
      The samples and a `SampleInfo`.

    Raises:
      ValueError: if a leading axis is not the batch size, the mesh does not divide it, or a seed
        is out of range.
    """
    if not shape or shape[0] < 1:
        raise ValueError(f"shape is {shape}; it needs a positive batch size in front")
    if seeds is None:
        seeds = np.arange(shape[0])
    if not isinstance(seeds, jax.core.Tracer):
        seeds = np.asarray(seeds)
        if not np.issubdtype(seeds.dtype, np.integer) or seeds.min() < 0 or seeds.max() >= 2**32:
            raise ValueError(f"seeds must be integers in [0, 2^32), not {seeds.dtype} {seeds}")
    for path, leaf in jax.tree_util.tree_leaves_with_path(
        {"seeds": seeds, "condition": condition, "initial": initial}
    ):
        if np.shape(leaf)[:1] != shape[:1]:
            raise ValueError(
                f"{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}; its leading axis must "
                f"be the batch size {shape[0]}"
            )
    if initial is not None and np.shape(initial) != shape:
        raise ValueError(f"initial has shape {np.shape(initial)}; it must be {shape}")
    if trajectory and sampler.finished is not None:
        raise ValueError("trajectory=True needs a sampler with a fixed number of steps")
    seeds = seeds.astype(np.uint32)
    if mesh is not None:
        seeds, condition, initial = _shard((seeds, condition, initial), mesh, shape[0])
    leaves, structure = jax.tree_util.tree_flatten(sampler)
    is_array = tuple(isinstance(leaf, jax.Array | np.ndarray) for leaf in leaves)
    arrays = [leaf for leaf, flag in zip(leaves, is_array, strict=True) if flag]
    static = tuple(None if flag else leaf for leaf, flag in zip(leaves, is_array, strict=True))
    # The key travels as plain numbers, which every process of several may hand to the mesh.
    implementation, key_data = jax.random.key_impl(key), jax.random.key_data(key)
    if not isinstance(key_data, jax.core.Tracer):
        key_data = np.asarray(key_data)
    inputs = (arrays, key_data, seeds, condition, initial)
    return _run(*inputs, implementation, static, structure, tuple(shape), trajectory)


@functools.partial(jax.jit, static_argnums=(5, 6, 7, 8, 9))
def _run(
    arrays,
    key_data,
    seeds,
    condition,
    initial,
    implementation,
    static,
    structure,
    shape,
    trajectory,
):
    keys = example_keys(jax.random.wrap_key_data(key_data, impl=implementation), seeds)
    remaining = iter(arrays)
    leaves = [next(remaining) if leaf is None else leaf for leaf in static]
    sampler: Sampler = jax.tree_util.tree_unflatten(structure, leaves)
    state = sampler.init(step_keys(keys, 0), shape, condition)
    if initial is not None:
        initial = jnp.asarray(initial, state.sample.dtype)
        state = state._replace(example=state.example._replace(sample=initial))

    def advance(state: SamplerState) -> tuple[SamplerState, Any]:
        prediction, state = sampler.predict(state)
        state = sampler.transition(step_keys(keys, state.step + 1), state, prediction)
        shared = state.shared._replace(step=state.shared.step + 1)
        return state._replace(shared=shared), prediction

    trace = (None, None)
    if sampler.finished is None:

        def scan_body(state, _):
            state, prediction = advance(state)
            return state, ((state.sample, prediction) if trajectory else (None, None))

        state, trace = jax.lax.scan(scan_body, state, length=sampler.num_steps)
    else:
        state = jax.lax.while_loop(
            lambda state: (state.step < sampler.num_steps) & ~sampler.finished(state),
            lambda state: advance(state)[0],
            state,
        )
    report = None if sampler.report is None else sampler.report(state)
    return state.sample, SampleInfo(state.shared.evaluations, state.step, *trace, report)


def example_keys(key: PRNGKeyArray, seeds: Int[Array, "batch"]) -> Key[Array, "batch"]:
    """One key per example, a function of (key, seed) only."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, seeds)


def step_keys(keys: Key[Array, "batch"], step: int | Int[Array, ""]) -> Key[Array, "batch"]:
    """The examples' keys for one step."""
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, step)


def normal_like(
    keys: Key[Array, "batch"], x: Float[Array, "batch *dims"]
) -> Float[Array, "batch *dims"]:
    """Standard normal noise of the shape and dtype of `x`, one key per example."""
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def _shard(tree: PyTree, mesh: jax.sharding.Mesh, batch: int) -> PyTree:
    axes = tuple(name for name in ("data", "fsdp") if name in mesh.axis_names)
    parts = int(np.prod([mesh.shape[name] for name in axes], dtype=int))
    if batch % parts:
        raise ValueError(f"batch size {batch} is not divisible by the mesh's {axes} axes ({parts})")
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(axes)))
