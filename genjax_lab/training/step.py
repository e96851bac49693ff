"""The one training step of every method: gradient, guard, update, averages, on any mesh.

`make_train_step` compiles `(state, batches) -> (state, metrics)` once, for one CPU as for a pod:
the mesh only says where arrays live (`genjax_lab.parallel`). One call runs several optimiser steps
in a `lax.scan`, because a tiny network's step is shorter than the dispatch of it from Python.
Learning-rate schedules, weight decay and the like belong to the optimiser (optax).
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, PRNGKeyArray, PyTree, Shaped

from genjax_lab.parallel.mesh import batch_sharding, make_mesh, parameter_shardings
from genjax_lab.training.ema import ParameterAverage, half_life_ema
from genjax_lab.training.state import TrainState

Variables = Mapping[str, PyTree]
Batch = Mapping[str, Shaped[Array, "batch ..."]]
Metrics = dict[str, Float[Array, "..."]]
Objective = Callable[[Variables, Batch, PRNGKeyArray], tuple[Float[Array, ""], Metrics]]

DEFAULT_EMA = {"ema": half_life_ema(500_000)}


class TrainStep(NamedTuple):
    """A compiled training step.

    Attributes:
        init: `(variables, key) -> state`: the state before the first step, placed on the mesh.
        step: `(state, batches) -> (state, metrics)`: takes `steps_per_call` optimiser steps. Every
            leaf of `batches` is `[steps_per_call, batch_size, ...]`: numpy arrays, or global arrays
            of `genjax_lab.parallel.global_batch(..., batch_axis=1)`, which several processes need.
            Every metric is `[steps_per_call]`, float32: the objective's own, and `loss`,
            `grad_norm` (before clipping), `skipped` (1 where the step was skipped), `num_skipped`
            and `consecutive_skips`. The given state's memory is reused: do not use it again.
        check: `(metrics, step) -> None`, with the metrics of the call that ended after optimiser
            step `step`: raises `FloatingPointError` if `max_consecutive_skips` steps in a row were
            skipped. It waits for that call to finish, so make the next call first.
    """

    init: Callable[[Variables, PRNGKeyArray], TrainState]
    step: Callable[[TrainState, PyTree], tuple[TrainState, Metrics]]
    check: Callable[[Mapping[str, Shaped[np.ndarray, "steps"]], int], None]


def make_train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    batch_size: int,
    mesh: Mesh | None = None,
    ema: Mapping[str, ParameterAverage] | None = None,
    accumulation_steps: int = 1,
    steps_per_call: int = 1,
    max_grad_norm: float | None = None,
    max_consecutive_skips: int = 10,
    project: Callable[[PyTree], PyTree] | None = None,
    compute_dtype: jax.typing.DTypeLike | None = None,
) -> TrainStep:
    """Makes the training step of an objective.

    One optimiser step: the mean gradient over the batch, clipped; the optimiser's update;
    `project`; the averages. If the loss or the gradient's norm is not finite the step changes
    nothing but the counters: parameters, optimiser state and averages stay, and the next step has
    a new batch and key.

    Args:
        objective: `(variables, batch, key) -> (loss, metrics)`, the loss a mean over the batch.
        optimizer: an optax transformation of the gradient with respect to `variables["params"]`.
        batch_size: examples in one optimiser step over all processes and microbatches.
        mesh: where to run; the first local device alone by default. The mesh changes results by
            floating-point rounding only.
        ema: averages of the parameters by name; `DEFAULT_EMA` by default, `{}` for none.
        accumulation_steps: the batch is cut into that many microbatches, whose gradients are
            averaged in float32: microbatch m holds the rows m, m + accumulation_steps, ...
            It gets the key `fold_in(fold_in(state.key, step), m)`, so an objective that draws
            random numbers sees other ones than without accumulation, from the same law.
        steps_per_call: optimiser steps in one call.
        max_grad_norm: gradients with a larger global norm are scaled down to it.
        max_consecutive_skips: how many steps in a row may be skipped before `check` raises.
        project: maps the parameters back onto their constraint set after each update, and at the
            start (forced weight normalisation of EDM2, arXiv 2312.02696).
        compute_dtype: the objective sees the parameters in this type (bfloat16, say) while the
            stored ones, the gradients' sum, the loss and the metrics are float32. The network's
            own `dtype` decides about its activations.

    Raises:
        ValueError: sizes that are not positive or do not divide; and from `init` and `step`,
            variables or batches of the wrong type or shape.
    """
    mesh = make_mesh(devices=jax.local_devices()[:1]) if mesh is None else mesh
    ema = dict(DEFAULT_EMA if ema is None else ema)
    _check_sizes(batch_size, accumulation_steps, steps_per_call, max_grad_norm, mesh)
    project = project or (lambda params: params)
    if max_grad_norm is not None:
        optimizer = optax.chain(optax.clip_by_global_norm(max_grad_norm), optimizer)
    gradient = _accumulated_gradient(objective, accumulation_steps, compute_dtype, mesh)

    def initial_state(variables: Variables, key: PRNGKeyArray) -> TrainState:
        params = project(variables["params"])
        return TrainState(
            step=jnp.zeros((), jnp.int32),
            params=params,
            constants={name: tree for name, tree in variables.items() if name != "params"},
            opt_state=optimizer.init(params),
            ema={name: average.init(params) for name, average in ema.items()},
            key=key,
            num_skipped=jnp.zeros((), jnp.int32),
            consecutive_skips=jnp.zeros((), jnp.int32),
        )

    def one_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        loss, metrics, grads = gradient(state, batch)
        grad_norm = optax.tree.norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = project(optax.apply_updates(state.params, updates))
        step = state.step + 1
        averages = {
            name: average.update(state.ema[name], params, step, batch_size)
            for name, average in ema.items()
        }
        params, opt_state, averages = jax.tree.map(
            lambda new, old: jnp.where(finite, new, old),
            (params, opt_state, averages),
            (state.params, state.opt_state, state.ema),
        )
        skipped = 1 - finite.astype(jnp.int32)
        state = state.replace(
            step=step,
            params=params,
            opt_state=opt_state,
            ema=averages,
            num_skipped=state.num_skipped + skipped,
            consecutive_skips=(state.consecutive_skips + 1) * skipped,
        )
        own = {
            "loss": loss,
            "grad_norm": grad_norm,
            "skipped": skipped,
            "num_skipped": state.num_skipped,
            "consecutive_skips": state.consecutive_skips,
        }
        _check_metric_names(metrics, own)
        return state, {name: jnp.float32(value) for name, value in (metrics | own).items()}

    def call(state: TrainState, batches: PyTree) -> tuple[TrainState, Metrics]:
        if steps_per_call == 1:
            state, metrics = one_step(state, jax.tree.map(lambda leaf: leaf[0], batches))
            metrics = jax.tree.map(lambda value: value[None], metrics)
        else:
            state, metrics = jax.lax.scan(one_step, state, batches)
        # The same layout as came in, or the next call would be compiled again for another.
        state = jax.lax.with_sharding_constraint(state, parameter_shardings(state, mesh))
        return state, jax.lax.with_sharding_constraint(metrics, NamedSharding(mesh, P()))

    compiled = jax.jit(call, donate_argnums=0)
    batches_sharding = batch_sharding(mesh, batch_axis=1)

    def init(variables: Variables, key: PRNGKeyArray) -> TrainState:
        variables = jax.tree.map(lambda x: _movable(x, mesh), _checked_variables(variables))
        key_data = _movable(jax.random.key_data(key), mesh)

        def place(variables: Variables, key_data: Array) -> TrainState:
            impl = jax.random.key_impl(key)
            return initial_state(variables, jax.random.wrap_key_data(key_data, impl=impl))

        shardings = parameter_shardings(jax.eval_shape(place, variables, key_data), mesh)
        return jax.jit(place, out_shardings=shardings)(variables, key_data)

    def step(state: TrainState, batches: PyTree) -> tuple[TrainState, Metrics]:
        _check_batches(batches, steps_per_call, batch_size)
        return compiled(state, jax.device_put(batches, batches_sharding))

    def check(metrics: Mapping[str, np.ndarray], last_step: int) -> None:
        _check_skips(metrics, last_step, max_consecutive_skips)

    return TrainStep(init, step, check)


def _accumulated_gradient(
    objective: Objective, accumulation_steps: int, compute_dtype: Any, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[Array, Metrics, PyTree]]:
    """Makes `(state, batch) -> (loss, metrics, gradient)`, means over the microbatches."""

    def loss_of(params: PyTree, state: TrainState, batch: Batch, key: PRNGKeyArray):
        if compute_dtype is not None:
            params = optax.tree.cast(params, compute_dtype)
        loss, metrics = objective({"params": params, **state.constants}, batch, key)
        if jnp.shape(loss) != ():
            raise ValueError(f"objective must return a scalar loss, got shape {jnp.shape(loss)}")
        return jnp.float32(loss), {name: jnp.float32(value) for name, value in metrics.items()}

    def of_microbatch(state: TrainState, batch: Batch, index: Array | int):
        key = jax.random.fold_in(state.step_key, index)
        (loss, metrics), grads = jax.value_and_grad(loss_of, has_aux=True)(
            state.params, state, batch, key
        )
        # Splitting the gradients like the parameters lets XLA reduce-scatter instead of all-reduce.
        grads = jax.lax.with_sharding_constraint(grads, parameter_shardings(grads, mesh))
        return loss, metrics, grads

    def gradient(state: TrainState, batch: Batch):
        if accumulation_steps == 1:
            return of_microbatch(state, batch, 0)

        # Taking every n-th row keeps each row on its device; contiguous microbatches would not.
        sharding = batch_sharding(mesh, batch_axis=1)
        micro = jax.tree.map(
            lambda leaf: jax.lax.with_sharding_constraint(
                jnp.moveaxis(leaf.reshape(-1, accumulation_steps, *leaf.shape[1:]), 1, 0), sharding
            ),
            batch,
        )

        def add(total: PyTree, inputs: tuple[Array, Batch]):
            index, rows = inputs
            return jax.tree.map(jnp.add, total, of_microbatch(state, rows, index)), None

        first = jax.tree.map(lambda leaf: leaf[0], micro)
        zeros = jax.tree.map(
            lambda leaf: jnp.zeros(leaf.shape, leaf.dtype),
            jax.eval_shape(of_microbatch, state, first, 0),
        )
        total, _ = jax.lax.scan(add, zeros, (jnp.arange(accumulation_steps), micro))
        return jax.tree.map(lambda leaf: leaf / accumulation_steps, total)

    return gradient


def _check_sizes(
    batch_size: int,
    accumulation_steps: int,
    steps_per_call: int,
    max_grad_norm: float | None,
    mesh: Mesh,
) -> None:
    sizes = {
        "batch_size": batch_size,
        "accumulation_steps": accumulation_steps,
        "steps_per_call": steps_per_call,
    }
    for name, size in sizes.items():
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a positive integer, got {size!r}")
    if max_grad_norm is not None and not max_grad_norm > 0:
        raise ValueError(f"max_grad_norm must be positive or None, got {max_grad_norm}")
    slots = mesh.shape["data"] * mesh.shape["fsdp"]
    if batch_size % (accumulation_steps * slots):
        raise ValueError(
            f"batch_size={batch_size} must be a multiple of accumulation_steps * data * fsdp = "
            f"{accumulation_steps} * {mesh.shape['data']} * {mesh.shape['fsdp']}"
        )


def _checked_variables(variables: Variables) -> dict[str, PyTree]:
    if not isinstance(variables, Mapping) or not jax.tree.leaves(variables.get("params")):
        raise ValueError(
            'variables must be a linen variables dict with a non-empty "params" collection, got '
            f"{type(variables).__name__} {sorted(variables) if variables else ''}"
        )
    variables = flax.core.unfreeze(variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables["params"]):
        if leaf.dtype not in (jnp.float32, jnp.float64):
            raise ValueError(
                f"variables['params']{jax.tree_util.keystr(path)} is {leaf.dtype}; parameters are "
                "kept in float32, use compute_dtype for cheaper arithmetic"
            )
    return variables


def _movable(array: Array, mesh: Mesh) -> np.ndarray | Array:
    """An array as a computation on the mesh can take it."""
    # Under `jax.eval_shape`, which describes models too large for this machine, nothing is moved;
    # nor is what lies on the mesh already, in parts that may be too many for a host's memory.
    if isinstance(array, jax.core.Tracer):
        return array
    if isinstance(array, jax.Array) and array.sharding.device_set == set(mesh.devices.flat):
        return array
    # Arrays that are committed to other devices cannot enter.
    return np.asarray(array)


def _check_batches(batches: PyTree, steps_per_call: int, batch_size: int) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(batches)
    if not leaves:
        raise ValueError("batches must hold at least one array, got none")
    for path, leaf in leaves:
        if np.shape(leaf)[:2] != (steps_per_call, batch_size):
            raise ValueError(
                f"batches{jax.tree_util.keystr(path)} has shape {np.shape(leaf)}; expected "
                f"[steps_per_call={steps_per_call}, batch_size={batch_size}, ...]"
            )


def _check_metric_names(metrics: Metrics, own: Mapping[str, Any]) -> None:
    if taken := sorted(set(metrics) & set(own)):
        raise ValueError(f"objective returns metrics named {taken}, which the step itself reports")


def _check_skips(
    metrics: Mapping[str, np.ndarray], last_step: int, max_consecutive_skips: int
) -> None:
    skips = np.asarray(metrics["consecutive_skips"])
    if skips.max() >= max_consecutive_skips:
        at = int(skips.argmax())
        step = last_step - len(skips) + 1 + at
        raise FloatingPointError(
            f"the loss or the gradient was not finite in {int(skips[at])} optimiser steps in a "
            f"row, up to step {step} (loss {np.asarray(metrics['loss'])[at]}); the last finite "
            f"step was {step - int(skips[at])}. Skipping more would not help: look at the data, "
            "the learning rate and the precision"
        )
