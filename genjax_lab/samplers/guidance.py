"""Guidance: a denoiser steered away from a worse one, or by a discriminator, at some noise levels.

Two forms extrapolate from a worse estimate of x_0 through a better one,

    D = D_worse + guidance_scale (D_better - D_worse),

which for estimates of x_0, noise, v or score at one (x, t) is the same thing. In classifier-free
guidance (arXiv 2207.12598) the worse one is the same network without its condition; in
autoguidance (arXiv 2406.02507) it is a smaller or less trained network with the same condition.
The third adds the gradient of a discriminator's log-odds of data against samples (arXiv
2211.17091). Outside of an interval of times (arXiv 2404.07724) only the better one is evaluated.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, PyTree

from genjax_lab.processes.gaussian import GaussianProcess, expand, same_noise_level
from genjax_lab.samplers.base import Denoiser
from genjax_lab.samplers.denoising import change_process, one_evaluation

LogOdds = Callable[[Array, Array, PyTree], Float[Array, "batch"]]


def classifier_free(
    denoise: Denoiser,
    *,
    guidance_scale: float | Float[Array, ""],
    null_condition: PyTree,
    interval: tuple[float, float] | None = None,
    memory_axis: int | None = None,
) -> Denoiser:
    """Classifier-free guidance (arXiv 2207.12598): D_null + guidance_scale (D_condition - D_null).

    A network without memory is called once with 2 x batch rows, rows 2i and 2i+1 being example i
    with its condition and without, so that a sharded batch stays where it is.

    Args:
      denoise: a conditional denoiser that was also trained without condition.
      guidance_scale: w; 1 is the condition alone, 0 no condition.
      null_condition: what stands for "no condition": a pytree like the condition, whose leaves
        broadcast to the condition's. For integer labels it is num_classes.
      interval: (smallest, largest) time of the process in which to guide; all times if None.
        Outside, the network is evaluated once, with the condition.
      memory_axis: the batch axis of every leaf of the network's memory, if it has any. Then the
        memory too is handed over in 2 x batch rows. None: a network with memory is called twice.

    Returns:
      A denoiser that remembers (memory with condition, memory without).

    Raises:
      ValueError: if the interval is empty; in sampling, if the condition does not match
        `null_condition`.
    """
    together = memory_axis is not None or not jax.tree.leaves(denoise.memory)
    pair = (
        Partial(_one_call, denoise.predict, memory_axis)
        if together
        else Partial(_two_calls, denoise.predict, denoise.predict)
    )
    return _guided(
        denoise,
        pair=Partial(_with_and_without, pair, jax.tree.map(jnp.asarray, null_condition)),
        memory=(denoise.memory, denoise.memory),
        worse_evaluations=denoise.evaluations,
        guidance_scale=guidance_scale,
        interval=interval,
    )


def autoguidance(
    denoise: Denoiser,
    guide: Denoiser,
    *,
    guidance_scale: float | Float[Array, ""],
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """Autoguidance (arXiv 2406.02507): D_guide + guidance_scale (D - D_guide).

    Args:
      denoise: the denoiser to guide.
      guide: a worse version of it, given the same condition. If it belongs to another process it
        is restated by `change_process`.
      guidance_scale: w; 1 is `denoise` alone, 0 `guide` alone.
      interval: (smallest, largest) time of the process in which to guide; all times if None.

    Returns:
      A denoiser that remembers (memory of `denoise`, memory of `guide`).

    Raises:
      ValueError: if the interval is empty.
    """
    if guide.process != denoise.process:
        guide = change_process(guide, denoise.process)
    return _guided(
        denoise,
        pair=Partial(_same_condition, Partial(_two_calls, denoise.predict, guide.predict)),
        memory=(denoise.memory, guide.memory),
        worse_evaluations=guide.evaluations,
        guidance_scale=guidance_scale,
        interval=interval,
    )


def discriminator_guidance(
    denoise: Denoiser,
    log_odds: LogOdds,
    process: GaussianProcess,
    *,
    weight: float | Float[Array, ""] = 1.0,
    interval: tuple[float, float] | None = None,
) -> Denoiser:
    """Discriminator guidance (arXiv 2211.17091): score + weight grad_x log(d / (1 - d)).

    The best discriminator of data and samples at time t has log(d / (1 - d)) = log p_data(x_t) /
    p_model(x_t), so that with weight 1 the sum is the score of the data. By Tweedie's formula
    E[x_0 | x_t] = (x_t + sigma(t)^2 score) / alpha(t), for the estimate of x_0 this is

        D = D_model + weight sigma(t)^2 / alpha(t) grad_x log_odds(x_t, t, condition).

    The factor grows without bound towards alpha(t) = 0, where the gradient of the best
    discriminator vanishes, and that of a trained one need not: there an interval should end. At
    alpha(t) = 0 itself there is no guidance.

    Args:
      denoise: a denoiser of the model whose samples the discriminator knows.
      log_odds: (x [batch, ...], t [batch], condition) -> [batch], differentiable by x and of each
        row for itself, such as `log_odds` makes of a network. A `jax.tree_util.Partial` with its
        weights as an argument does not recompile for others.
      process: the process that `x` and `t` of `log_odds` belong to. If it is another than that of
        `denoise`, they are restated: the ratio of two densities does not depend on the scale.
      weight: of the gradient; 1 for the data's score, 0 for the model alone.
      interval: (smallest, largest) time of `denoise`'s process in which to guide; all if None.

    Returns:
      A denoiser that remembers what `denoise` does. Inside of the interval a prediction counts one
      evaluation more, that of the discriminator and its gradient.

    Raises:
      ValueError: if the interval is empty; in sampling, if `log_odds` does not give one number for
        each example.
    """
    interval = _checked(interval)
    return Denoiser(
        predict=Partial(
            _predict_discriminated,
            *(denoise.predict, log_odds, process, denoise.process),
            *(jnp.asarray(weight, float), interval),
        ),
        process=denoise.process,
        memory=denoise.memory,
        evaluations=Partial(_evaluations, denoise.evaluations, one_evaluation, interval),
    )


def log_odds(network: nn.Module, variables: PyTree, process: GaussianProcess) -> LogOdds:
    """The log-odds log(d / (1 - d)) of data that a discriminating network gives.

    Args:
      network: called as `network.apply(variables, c_in x, c_noise [batch], condition)`, as the
        objective `noisy_discriminator` trains it; returns logits [batch].
      variables: the module's variables.
      process: the process that it was trained under.
    """
    return Partial(_apply_discriminator, network, process, variables)


def _guided(
    denoise: Denoiser,
    *,
    pair: Callable,
    memory: tuple[PyTree, PyTree],
    worse_evaluations: Callable,
    guidance_scale: float | Float[Array, ""],
    interval: tuple[float, float] | None,
) -> Denoiser:
    """The guided denoiser, from `pair`: what evaluates the better and the worse one."""
    interval = _checked(interval)
    scale = jnp.asarray(guidance_scale, float)
    return Denoiser(
        predict=Partial(_predict, pair, denoise.predict, scale, interval),
        process=denoise.process,
        memory=memory,
        evaluations=Partial(_evaluations, denoise.evaluations, worse_evaluations, interval),
    )


def _checked(interval: tuple[float, float] | None) -> Float[Array, "2"] | None:
    if interval is None:
        return None
    if not interval[0] < interval[1]:
        raise ValueError(f"interval is {interval}; it must be (smallest, largest) time")
    return jnp.asarray(interval, float)


def _inside(interval, t):
    return (interval[0] <= t) & (t <= interval[1])


def _predict(pair, predict, scale, interval, memory, x, t, condition):
    t = jnp.asarray(t)

    def guided(memory):
        better, worse, memory = pair(memory, x, t, condition)
        return worse + scale.astype(x.dtype) * (better - worse), better, memory

    def unguided(memory):
        better, first = predict(memory[0], x, t, condition)
        return better, better, (first, memory[1])

    if interval is None:
        x0, _, memory = guided(memory)
    elif t.ndim == 0:
        x0, _, memory = jax.lax.cond(_inside(interval, t), guided, unguided, memory)
    else:
        # Rows at different times share one call, so every row pays for both evaluations.
        x0, better, memory = guided(memory)
        x0 = jnp.where(expand(_inside(interval, t), x0), x0, better)
    return x0, memory


def _predict_discriminated(
    predict, log_odds, inner, outer, weight, interval, memory, x, t, condition
):
    t = jnp.asarray(t)
    x0, memory = predict(memory, x, t, condition)

    def correction():
        gradient = jax.grad(lambda x: jnp.sum(_restated(log_odds, inner, outer, x, t, condition)))
        alpha, sigma = outer.alpha(t), outer.sigma(t)
        factor = weight * sigma**2 / jnp.where(alpha > 0, alpha, 1)
        guides = alpha > 0 if interval is None else (alpha > 0) & _inside(interval, t)
        return jnp.where(expand(guides, x), expand(factor, x) * gradient(x), 0).astype(x0.dtype)

    if interval is None or t.ndim > 0:
        return x0 + correction(), memory
    nothing = lambda: jnp.zeros_like(x0)  # noqa: E731
    return x0 + jax.lax.cond(_inside(interval, t), correction, nothing), memory


def _restated(log_odds, inner, outer, x, t, condition):
    """`log_odds` of a process `inner` at a point of the process `outer`."""
    if inner != outer:
        t, scale = same_noise_level(outer, inner, t)
        x = expand(scale, x) * x
    values = log_odds(x, jnp.broadcast_to(t, x.shape[:1]), condition)
    if values.shape != x.shape[:1]:
        raise ValueError(
            f"log_odds must give one number for each of the {len(x)} examples, got shape "
            f"{list(values.shape)}"
        )
    return values


def _apply_discriminator(network, process, variables, x, t, condition):
    scaled = expand(process.c_in(t), x) * x
    return network.apply(variables, scaled, process.c_noise(t), condition).astype(x.dtype)


def _evaluations(better, worse, interval, t):
    if interval is None:
        return better(t) + worse(t)
    return better(t) + jnp.where(jnp.any(_inside(interval, t)), worse(t), 0)


def _with_and_without(call, null_condition, memory, x, t, condition):
    structures = jax.tree.structure(condition), jax.tree.structure(null_condition)
    if structures[0] != structures[1]:
        raise ValueError(
            f"condition has the structure {structures[0]}; classifier-free guidance was given a "
            f"null_condition of structure {structures[1]}"
        )
    null = jax.tree.map(_broadcast_null, null_condition, condition)
    return call(memory, x, t, (condition, null))


def _broadcast_null(null, leaf):
    leaf = jnp.asarray(leaf)
    try:
        return jnp.broadcast_to(null, leaf.shape).astype(leaf.dtype)
    except ValueError as error:
        raise ValueError(
            f"null_condition has a leaf of shape {null.shape}, which does not broadcast to the "
            f"condition's {leaf.shape}"
        ) from error


def _same_condition(call, memory, x, t, condition):
    return call(memory, x, t, (condition, condition))


def _two_calls(predict_better, predict_worse, memory, x, t, conditions):
    better, first = predict_better(memory[0], x, t, conditions[0])
    worse, second = predict_worse(memory[1], x, t, conditions[1])
    return better, worse, (first, second)


def _one_call(predict, memory_axis, memory, x, t, conditions):
    rows = _interleave((x, x), 0)
    times = t if t.ndim == 0 else _interleave((t, t), 0)
    x0, memory = predict(_interleave(memory, memory_axis), rows, times, _interleave(conditions, 0))
    better, worse = _separate(x0, 0)
    return better, worse, _separate(memory, memory_axis)


def _interleave(trees: tuple[PyTree, PyTree], axis: int | None) -> PyTree:
    """Alternates the rows of two trees along an axis; local to each shard of a sharded axis."""

    def leaf(first, second):
        both = jnp.stack([first, second], axis + 1)
        return both.reshape((*first.shape[:axis], -1, *first.shape[axis + 1 :]))

    return jax.tree.map(leaf, *trees)


def _separate(tree: PyTree, axis: int | None) -> tuple[PyTree, PyTree]:
    def leaf(array, row):
        both = array.reshape((*array.shape[:axis], -1, 2, *array.shape[axis + 1 :]))
        return jnp.take(both, row, axis + 1)

    return jax.tree.map(lambda a: leaf(a, 0), tree), jax.tree.map(lambda a: leaf(a, 1), tree)
