"""log p_theta - log p_ref of a network and a frozen copy of it, exactly 0 while they are equal.

The two log-likelihoods are sums over thousands of dimensions of which a small difference is wanted
(arXiv 2503.01103). Written as `f(theta) - stop_gradient(f(ref))` the compiler makes two programs of
them: theta's, whose intermediate values the backward pass reads, is fused otherwise than the
reference's, and the two round differently (about one unit in the last place on a CPU, which
`optimization_barrier` does not prevent). Here the weights are stacked and go through one vectorised
program, which treats its rows alike. Of the reference's row nothing is kept for the backward pass,
so it costs a forward pass, the memory of its activations until then and a copy of the weights.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from genjax_lab.objectives.discriminative import check_same_tree

LogLikelihood = Callable[..., Float[Array, "batch"]]


def log_ratio(
    log_likelihood: LogLikelihood, variables: PyTree, reference: PyTree, *args: PyTree
) -> Float[Array, "batch"]:
    """r = log p_theta - log p_ref, with equal weights exactly 0.

    Args:
      log_likelihood: (variables, *args) -> [batch] float. Randomness comes in through `args`, so
        that it is the same for both; the function must not close over traced arrays.
      variables: the trained weights.
      reference: the frozen weights, in the same structure and shapes; they are converted to the
        types of `variables`.
      *args: what both are evaluated on.

    Returns:
      The log-ratio of each row, differentiable (in reverse mode) by `variables` and by nothing
      else: the gradients by `reference` and `args` are 0.

    Raises:
      ValueError: if the two trees differ in structure or shapes.
    """
    own, frozen = paired_log_likelihoods(log_likelihood, variables, reference, *args)
    return own - frozen


def paired_log_likelihoods(
    log_likelihood: LogLikelihood, variables: PyTree, reference: PyTree, *args: PyTree
) -> tuple[Float[Array, "batch"], Float[Array, "batch"]]:
    """The two terms of `log_ratio`, which see for arguments and errors."""
    check_same_tree("reference", reference, "variables", variables)
    members = jax.tree.map(lambda leaf: jnp.asarray(leaf)[None], variables)
    own, frozen = _stacked(log_likelihood, members, _frozen(reference, members), args)
    return own[0], frozen


def member_log_likelihoods(
    log_likelihood: LogLikelihood, members: PyTree, reference: PyTree, *args: PyTree
) -> tuple[Float[Array, "members batch"], Float[Array, "batch"]]:
    """`paired_log_likelihoods` of several networks and one reference, which is evaluated once.

    Args:
      log_likelihood: see `log_ratio`.
      members: weights with a leading axis of members in every leaf.
      reference: frozen weights without that axis.
      *args: what all are evaluated on.

    Raises:
      ValueError: if the two trees differ in structure, or in shapes but for the leading axis.
    """
    of_one = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(jnp.shape(leaf)[1:], leaf.dtype), members
    )
    check_same_tree("reference", reference, "one of the members", of_one)
    return _stacked(log_likelihood, members, _frozen(reference, members), args)


def _frozen(reference: PyTree, members: PyTree) -> PyTree:
    return jax.tree.map(
        lambda ref, own: jax.lax.stop_gradient(jnp.asarray(ref).astype(own.dtype)),
        reference,
        members,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _stacked(log_likelihood, members, reference, args):
    values = jax.vmap(lambda weights: log_likelihood(weights, *args))(_stack(members, reference))
    return _separate(values)


def _stacked_forward(log_likelihood, members, reference, args):
    def evaluate(weights):
        return jax.vjp(lambda weights: log_likelihood(weights, *args), weights)

    # A pullback is a pytree of what the backward pass reads; the reference's part is dropped.
    values, pullbacks = jax.vmap(evaluate)(_stack(members, reference))
    return _separate(values), jax.tree.map(lambda leaf: leaf[:-1], pullbacks)


def _stacked_backward(log_likelihood, pullbacks, cotangents):
    gradient = jax.vmap(lambda pullback, cotangent: pullback(cotangent)[0])
    return gradient(pullbacks, cotangents[0]), None, None


_stacked.defvjp(_stacked_forward, _stacked_backward)


def _separate(values: Array) -> tuple[Array, Array]:
    # The condition is for the compiler: of two products w S, as a weighted sum ends with, it makes
    # fma(w, S, -w S), the rounding error of the second in place of 0.
    values = jnp.where(jnp.isnan(values), jnp.nan, values)
    return values[:-1], values[-1]


def _stack(members: PyTree, reference: PyTree) -> PyTree:
    return jax.tree.map(lambda own, ref: jnp.concatenate([own, ref[None]]), members, reference)
