"""Several networks trained at once, as members of a grid: a leading axis in every parameter.

Their losses are added up, so that each has the gradient of its own loss.
"""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree


def alpha_and_beta_of_members(
    alpha: Sequence[float], beta: Sequence[float]
) -> tuple[Float[np.ndarray, " members"], Float[np.ndarray, " members"]]:
    """Both as vectors; ValueError unless they have one length."""
    alpha, beta = np.asarray(alpha, np.float32), np.asarray(beta, np.float32)
    if alpha.ndim != 1 or alpha.shape != beta.shape or not alpha.size:
        raise ValueError(
            "alpha and beta must be vectors with one entry for each member, got shapes "
            f"{list(alpha.shape)} and {list(beta.shape)}"
        )
    return alpha, beta


def members_of(network: Mapping[str, PyTree], num_members: int) -> dict[str, PyTree]:
    """Variables of which every collection has the axis of members.

    Args:
      network: variables whose "params" have that axis, and whose other collections do not.
      num_members: its length.

    Raises:
      ValueError: if a parameter has no such axis.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(network["params"]):
        if jnp.shape(leaf)[:1] != (num_members,):
            raise ValueError(
                f"variables['params']{jax.tree_util.keystr(path)} must have a leading axis of "
                f"{num_members} members, got shape {list(jnp.shape(leaf))}"
            )
    repeated = jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf, (num_members, *jnp.shape(leaf))), dict(network)
    )
    return repeated | {"params": _finite_gradient(network["params"])}


def sum_of_members(
    values: Float[Array, " members"], metrics: Mapping[str, Float[Array, " members"]]
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """(the sum of the finite losses, metrics named "<name>/<member>", with "loss" and "finite")."""
    finite = jnp.isfinite(values)
    named = {
        f"{name}/{member}": value[member]
        for name, value in {**metrics, "loss": values, "finite": finite}.items()
        for member in range(len(values))
    }
    return jnp.sum(jnp.where(finite, values, 0)), named


@jax.custom_vjp
def _finite_gradient(members: PyTree) -> PyTree:
    """The identity; a member with any gradient that is not finite gets a zero gradient."""
    return members


def _finite_gradient_backward(_, gradients):
    def finite(leaf):
        return jnp.all(jnp.isfinite(leaf), axis=tuple(range(1, leaf.ndim)))

    every = jnp.all(jnp.stack([finite(leaf) for leaf in jax.tree.leaves(gradients)]), axis=0)
    kept = jax.vmap(lambda leaf, keep: jnp.where(keep, leaf, 0), in_axes=(0, 0))
    return (jax.tree.map(lambda leaf: kept(leaf, every), gradients),)


_finite_gradient.defvjp(lambda members: (members, None), _finite_gradient_backward)
