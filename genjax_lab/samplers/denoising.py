"""From a network and its variables to the one form of denoiser that samplers know.

`denoiser` evaluates a linen module under a Gaussian process; `change_process` restates a denoiser
in another process, exactly, so that any network runs under any sampler's favourite coordinates;
`switch_by_noise` has one network for much noise and another for little. The rest is what every
sampler of a Gaussian process starts from and evaluates by.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Array, Float, Key, PyTree

from genjax_lab.processes.gaussian import GaussianProcess, expand, same_noise_level
from genjax_lab.samplers.base import (
    Denoiser,
    ExampleState,
    SamplerState,
    SharedState,
    normal_like,
)


def denoiser(network: nn.Module, variables: PyTree, process: GaussianProcess) -> Denoiser:
    """A memoryless denoiser: x_0_hat = c_skip x + c_out network(c_in x, c_noise, condition).

    Args:
      network: called as `network.apply(variables, c_in x, c_noise [batch], condition)`.
      variables: the module's variables, e.g. {"params": ...}.
      process: the process that the network was trained under.
    """
    return Denoiser(
        predict=Partial(_apply_network, network, process, variables),
        process=process,
        memory=(),
        evaluations=one_evaluation,
    )


def one_evaluation(t: Array) -> Array:
    """The cost of a prediction that evaluates the network once."""
    del t
    return jnp.int32(1)


def change_process(denoise: Denoiser, process: GaussianProcess) -> Denoiser:
    """Restates a denoiser in the coordinates of another process, at equal signal-to-noise ratio.

    Args:
      denoise: the denoiser to restate.
      process: the process that the returned denoiser's `x` and `t` belong to; its times must have
        alpha(t) > 0.
    """
    return denoise._replace(
        predict=Partial(_predict_in_process, denoise.predict, denoise.process, process),
        process=process,
        evaluations=Partial(_evaluations_in_process, denoise.evaluations, denoise.process, process),
    )


def switch_by_noise(first: Denoiser, second: Denoiser, sigma: float | Float[Array, ""]) -> Denoiser:
    """One denoiser where there is much noise, hence in a sampler's first steps, another after them.

    Sparse attention is often dense in the first steps (arXiv 2504.16922): `first` has the dense
    network, `second` the same weights with a neighborhood. For that in n steps of a sampler, sigma
    is the noise level of its n-th time, counted from 0.

    Args:
      first: predicts where sigma(t) / alpha(t) is above `sigma`.
      second: predicts at and below it. If it belongs to another process it is restated by
        `change_process`.
      sigma: the noise level, at least 0, in units of the signal; for EDM's process it is a time.

    Returns:
      A denoiser of the process of `first` that remembers (memory of `first`, memory of `second`).
      At a time t common to the batch only one network runs; where rows have times of their own,
      both do.

    Raises:
      ValueError: if sigma is a negative number.
    """
    if not isinstance(sigma, jax.core.Tracer) and not sigma >= 0:
        raise ValueError(f"sigma must be at least 0, got {sigma}")
    if second.process != first.process:
        second = change_process(second, first.process)
    level = jnp.asarray(sigma, float)
    return Denoiser(
        predict=Partial(_predict_by_noise, first.predict, second.predict, first.process, level),
        process=first.process,
        memory=(first.memory, second.memory),
        evaluations=Partial(
            _evaluations_by_noise, first.evaluations, second.evaluations, first.process, level
        ),
    )


def initial_state(
    denoise: Denoiser,
    t: Float[Array, ""],
    keys: Key[Array, "batch"],
    shape: tuple[int, ...],
    condition: PyTree,
) -> SamplerState:
    """Pure noise at time t, sigma(t) N(0, I), in the precision of the time grid."""
    noise = normal_like(keys, jnp.zeros(shape, t.dtype))
    return SamplerState(
        ExampleState(denoise.process.sigma(t) * noise, condition),
        SharedState(jnp.int32(0), denoise.memory, jnp.int32(0)),
    )


def evaluate(
    denoise: Denoiser, state: SamplerState, t: Float[Array, ""]
) -> tuple[Array, SamplerState]:
    """The denoiser's estimate of x_0 at the current iterate, and the state that counts its cost."""
    shared = state.shared
    x0, memory = denoise.predict(shared.memory, state.sample, t, state.example.condition)
    evaluations = shared.evaluations + denoise.evaluations(t)
    return x0, state._replace(shared=shared._replace(memory=memory, evaluations=evaluations))


def predict_at(
    denoise: Denoiser, times: Float[Array, "num_steps+1"], state: SamplerState
) -> tuple[Array, SamplerState]:
    """`evaluate` at the time of the current step."""
    return evaluate(denoise, state, times[state.step])


def _apply_network(network, process, variables, memory, x, t, condition):
    t = jnp.broadcast_to(t, x.shape[:1])
    scaled = expand(process.c_in(t), x) * x
    output = network.apply(variables, scaled, process.c_noise(t), condition)
    return process.to_data(output.astype(x.dtype), x, t), memory


def _predict_in_process(predict, inner, outer, memory, x, t, condition):
    s, scale = same_noise_level(outer, inner, jnp.asarray(t))
    return predict(memory, expand(scale, x) * x, s, condition)


def _evaluations_in_process(evaluations, inner, outer, t):
    return evaluations(same_noise_level(outer, inner, jnp.asarray(t))[0])


def _is_noisy(process, level, t):
    return process.sigma(t) > level * process.alpha(t)


def _predict_by_noise(first, second, process, level, memory, x, t, condition):
    t = jnp.asarray(t)
    is_noisy = _is_noisy(process, level, t)

    def by_first(memory):
        x0, remembered = first(memory[0], x, t, condition)
        return x0, (remembered, memory[1])

    def by_second(memory):
        x0, remembered = second(memory[1], x, t, condition)
        return x0, (memory[0], remembered)

    if t.ndim == 0:
        return jax.lax.cond(is_noisy, by_first, by_second, memory)
    noisy, memory = by_first(memory)
    clean, memory = by_second(memory)
    return jnp.where(expand(is_noisy, x), noisy, clean), memory


def _evaluations_by_noise(first, second, process, level, t):
    is_noisy = _is_noisy(process, level, jnp.asarray(t))
    of_first = jnp.where(jnp.any(is_noisy), first(t), 0)
    return of_first + jnp.where(jnp.all(is_noisy), 0, second(t))
