"""Direct discriminative optimisation of diffusion models (arXiv 2503.01103, Appendix D).

The log-ratio of an image is E_{t, eps}[r], r the difference of two denoising errors at the same
noisy image. The paper takes one draw of (t, eps) outside the sigmoid, a bound by Jensen's
inequality; the mean of several draws inside it is a tighter one. The same draws serve network and
reference, and, unless they are given by seed, image i and sample i. Images and samples are
evaluated as one batch of twice the rows, in pairs, so that a mesh that cuts the batch keeps each
pair, and as many of both, on one device.
"""

from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from genjax_lab.objectives.denoising import Objective, images_of
from genjax_lab.objectives.discriminative import check_alpha_and_beta, ddo_loss
from genjax_lab.objectives.likelihood import (
    diffusion_log_likelihood,
    draw_times_and_noise,
    seeded_times_and_noise,
)
from genjax_lab.objectives.log_ratio import member_log_likelihoods, paired_log_likelihoods
from genjax_lab.objectives.members import alpha_and_beta_of_members, members_of, sum_of_members
from genjax_lab.processes.gaussian import GaussianProcess

RatioLoss = Callable[..., tuple[Float[Array, ""], dict[str, Array]]]


def ddo_denoising(
    apply: Callable[..., Array],
    process: GaussianProcess,
    *,
    alpha: float,
    beta: float,
    num_draws: int = 1,
    antithetic: bool = False,
    inside: bool = True,
    reduce: str = "sum",
    loss: RatioLoss = ddo_loss,
) -> Objective:
    """The DDO objective of a diffusion model.

    Args:
      apply: a linen `Module.apply` called as `apply(variables, c_in x, c_noise, label,
        train=False)`: without dropout, as the reference.
      process: schedule, prediction kind and weighting.
      alpha: weight of the samples, at least 0.
      beta: factor of the log-ratios, positive; see `calibrate_beta`.
      num_draws: draws of (t, noise) for each pair of image and sample.
      antithetic: draws come in pairs (t, noise) and (t, -noise); `num_draws` must be even.
      inside: the mean over draws is taken inside the sigmoid; else the loss is that of num_draws
        times as many rows of one draw each.
      reduce: "sum" over dimensions as in the paper, or "mean", with which beta is larger by their
        number.
      loss: (delta_real, delta_fake, alpha, beta) -> (loss, metrics).

    Returns:
      An objective of batches {"image": [batch, ...] float32, "fake_image": the same shape, samples
      of the reference, "label" and "fake_label": [batch] int32, both or neither, the samples' being
      their own}. `variables["reference"]` holds the frozen variables, in the structure of the
      others: a collection that is no parameter, which the train step leaves as it is.

      Optional: "seed" and "fake_seed", [batch] integers from which the draws of an image and of a
      sample are made instead of the key; with them "reference_terms" and "fake_reference_terms",
      what `seeded_log_likelihoods` gives of the reference, [batch] or [batch, num_draws], and no
      "reference" is needed or evaluated. A log-ratio then is 0 up to rounding only.

      Metrics are those of `loss`, and "mle_loss", the mean squared error per dimension of the
      images: an alarm beyond twice that of pretraining, no measure of quality. The objective
      raises ValueError for batches and variables that are not as described.

    Raises:
      ValueError: for a number of draws that is not positive, or odd with `antithetic`; for a
        negative alpha, a beta that is not positive, or another `reduce`.
    """
    _check_options(alpha, beta, num_draws, antithetic)
    log_likelihood = diffusion_log_likelihood(apply, process, reduce=reduce)

    def objective(variables, batch, key):
        network, reference = split_reference(variables)
        rows, dimensions = _rows(process, batch, key, num_draws, antithetic)
        recorded = _recorded(batch, num_draws)
        if recorded is None:
            require_reference(reference)
            own, frozen = paired_log_likelihoods(log_likelihood, network, reference, *rows)
        else:
            own, frozen = log_likelihood(network, *rows), recorded
        own, frozen = own.reshape(-1, num_draws, 2), frozen.reshape(-1, num_draws, 2)
        value, metrics = loss(*_deltas(own - frozen, inside), alpha, beta)
        scale = 1 if reduce == "mean" else dimensions
        return value, metrics | {"mle_loss": -jnp.mean(own[..., 0]) / scale}

    return objective


def ddo_denoising_grid(
    apply: Callable[..., Array],
    process: GaussianProcess,
    *,
    alpha: Sequence[float],
    beta: Sequence[float],
    num_draws: int = 1,
    antithetic: bool = False,
    inside: bool = True,
    reduce: str = "sum",
    loss: RatioLoss = ddo_loss,
) -> Objective:
    """`ddo_denoising` of several (alpha, beta) at once, on the same draws and one reference.

    Args:
      apply: see `ddo_denoising`, as for all that is not named here.
      process: schedule, prediction kind and weighting.
      alpha: one for each member.
      beta: one for each member.
      num_draws: draws for each pair, shared by the members.
      antithetic: whether draws come in pairs of opposite noise.
      inside: whether the mean over draws is inside the sigmoid.
      reduce: "sum" or "mean" over dimensions.
      loss: (delta_real, delta_fake, alpha, beta) -> (loss, metrics), vectorised over members.

    Returns:
      An objective whose `variables["params"]` have a leading axis of members in every leaf, and
      whose other collections, "reference" too, do not. The loss is the sum over members, so that
      each has its own gradient; a member whose loss or gradient is not finite counts 0 and gets a
      zero gradient, and the others go on. Do not clip the gradient by its norm over all members:
      that would couple them. Metrics are scalars named "<name>/<member>": those of `loss`,
      "loss", "mle_loss" and "finite".

    Raises:
      ValueError: if `alpha` and `beta` are not vectors of one length; and as `ddo_denoising`.
    """
    alpha, beta = alpha_and_beta_of_members(alpha, beta)
    _check_options(alpha, beta, num_draws, antithetic)
    log_likelihood = diffusion_log_likelihood(apply, process, reduce=reduce)
    num_members = len(alpha)

    def objective(variables, batch, key):
        network, reference = split_reference(variables)
        members = members_of(network, num_members)
        rows, dimensions = _rows(process, batch, key, num_draws, antithetic)
        recorded = _recorded(batch, num_draws)
        if recorded is None:
            require_reference(reference)
            own, frozen = member_log_likelihoods(log_likelihood, members, reference, *rows)
        else:
            own = jax.vmap(lambda member: log_likelihood(member, *rows))(members)
            frozen = recorded

        def of_member(own, alpha, beta):
            own = own.reshape(-1, num_draws, 2)
            deltas = _deltas(own - frozen.reshape(own.shape), inside)
            value, metrics = loss(*deltas, alpha, beta)
            scale = 1 if reduce == "mean" else dimensions
            return value, metrics | {"mle_loss": -jnp.mean(own[..., 0]) / scale}

        return sum_of_members(*jax.vmap(of_member)(own, alpha, beta))

    return objective


def seeded_log_likelihoods(
    apply: Callable[..., Array],
    process: GaussianProcess,
    variables: PyTree,
    images: Float[Array, "batch *dims"],
    label: Int[Array, "batch"] | None,
    seeds: Int[Array, "batch"],
    *,
    num_draws: int = 1,
    antithetic: bool = False,
    reduce: str = "sum",
) -> Float[Array, "batch num_draws"]:
    """The "reference_terms" of images whose "seed" are `seeds`, or those of samples.

    Args:
      apply: as for `ddo_denoising`, like `process` and the options.
      process: schedule, prediction kind and weighting.
      variables: of the reference.
      images: data or samples.
      label: theirs, or None.
      seeds: integers, one for each image.
      num_draws: draws for each image.
      antithetic: whether draws come in pairs of opposite noise.
      reduce: "sum" or "mean" over dimensions.

    Raises:
      ValueError: for seeds that are no [batch] integers, and as `ddo_denoising`.
    """
    _check_options(1, 1, num_draws, antithetic)
    log_likelihood = diffusion_log_likelihood(apply, process, reduce=reduce)
    t, noise = _draws(
        lambda k: seeded_times_and_noise(process, seeds, images.shape, draw=k),
        num_draws,
        antithetic,
    )
    rows = jax.vmap(log_likelihood, in_axes=(None, None, None, 1, 1), out_axes=1)
    return rows(variables, images, label, t, noise.astype(images.dtype))


def split_reference(variables: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], PyTree | None]:
    """(the network's variables, the reference's or None)."""
    network = {name: tree for name, tree in variables.items() if name != "reference"}
    return network, variables.get("reference")


def paired(real: Array, fake: Array) -> Array:
    """[rows, ...] of both -> [2 rows, ...], the two of a pair one after the other."""
    return jnp.stack([real, fake], axis=1).reshape(-1, *real.shape[1:])


def paired_images(batch: Mapping[str, Array]) -> tuple[Array, Array, Array | None]:
    """(images, samples, labels of both paired or None) of a batch; ValueError if they differ."""
    real, fake = images_of(batch), images_of(batch, "fake_image")
    if fake.shape != real.shape:
        raise ValueError(
            f"batch['fake_image'] must have the shape {list(real.shape)} of batch['image'], got "
            f"{list(fake.shape)}"
        )
    return real, fake, paired_labels(batch)


def paired_labels(batch: Mapping[str, Array]) -> Array | None:
    """Labels of data and samples paired, or None where the batch has neither."""
    if ("label" in batch) != ("fake_label" in batch):
        raise ValueError(
            'batch must have both "label" and "fake_label" (the samples\' own labels) or neither, '
            f"got {sorted(batch)}"
        )
    if "label" not in batch:
        return None
    return paired(jnp.asarray(batch["label"]), jnp.asarray(batch["fake_label"]))


def _rows(
    process: GaussianProcess,
    batch: Mapping[str, Array],
    key: PRNGKeyArray,
    num_draws: int,
    antithetic: bool,
) -> tuple[tuple[Array, Array | None, Array, Array], int]:
    """(images, labels, times, noise) of [batch * num_draws * 2] rows, and dimensions of one."""
    real, fake, label = paired_images(batch)

    def repeat(rows):  # [batch * 2, ...] -> [batch * num_draws * 2, ...]
        rows = rows.reshape(-1, 1, 2, *rows.shape[1:])
        rows = jnp.broadcast_to(rows, (rows.shape[0], num_draws, *rows.shape[2:]))
        return rows.reshape(-1, *rows.shape[3:])

    def by_seed(name):
        seeds = jnp.asarray(batch[name])
        return _draws(
            lambda k: seeded_times_and_noise(process, seeds, real.shape, draw=k),
            num_draws,
            antithetic,
        )

    if _has_both(batch, "seed", "fake_seed"):
        both = by_seed("seed"), by_seed("fake_seed")
    else:
        shared = _draws(
            lambda k: draw_times_and_noise(process, jax.random.fold_in(key, k), real.shape),
            num_draws,
            antithetic,
        )
        both = shared, shared
    t, noise = (jnp.stack(pair, axis=2) for pair in zip(*both, strict=True))
    return (
        repeat(paired(real, fake)),
        None if label is None else repeat(label),
        t.reshape(-1),
        noise.reshape(-1, *real.shape[1:]).astype(real.dtype),
    ), real[0].size


def _draws(draw: Callable, num_draws: int, antithetic: bool) -> tuple[Array, Array]:
    """(t [batch, num_draws], noise [batch, num_draws, ...]) of index -> (t [batch], noise)."""
    t, noise = jax.vmap(draw)(jnp.arange(num_draws // 2 if antithetic else num_draws))
    if antithetic:
        t, noise = jnp.concatenate([t, t]), jnp.concatenate([noise, -noise])
    return jnp.moveaxis(t, 0, 1), jnp.moveaxis(noise, 0, 1)


def _deltas(ratios: Float[Array, "batch draws two"], inside: bool) -> tuple[Array, Array]:
    ratios = jnp.mean(ratios, axis=1) if inside else ratios.reshape(-1, 2)
    return ratios[:, 0], ratios[:, 1]


def reference_terms(
    batch: Mapping[str, Array], rows: int, count: int, meaning: str
) -> Array | None:
    """Recorded log-likelihoods of the reference, [rows, count, 2], or None if there are none.

    Raises:
      ValueError: if data or samples have none, or of another shape.
    """
    if not _has_both(batch, "reference_terms", "fake_reference_terms"):
        return None
    terms = [jnp.asarray(batch[name]) for name in ("reference_terms", "fake_reference_terms")]
    for term in terms:
        if term.shape != (rows, count) and (term.shape != (rows,) or count > 1):
            raise ValueError(
                "batch['reference_terms'] and ['fake_reference_terms'] must be "
                f"[{rows}, {count}], {meaning}, got {list(term.shape)}"
            )
    return jax.lax.stop_gradient(jnp.stack([term.reshape(rows, count) for term in terms], -1))


def require_reference(reference: PyTree | None) -> None:
    """Raises ValueError if there is no frozen network."""
    if reference is None:
        raise ValueError(
            'variables must have the collection "reference", the frozen variables, unless the '
            'batch has the entries "reference_terms" and "fake_reference_terms"'
        )


def _recorded(batch: Mapping[str, Array], num_draws: int) -> Array | None:
    recorded = reference_terms(batch, len(batch["image"]), num_draws, "one for each of num_draws")
    if recorded is not None and "seed" not in batch:
        raise ValueError(
            'batch has recorded reference terms, and must have the entries "seed" and '
            '"fake_seed" of the draws that they were computed with'
        )
    return recorded


def _has_both(batch: Mapping[str, Array], first: str, second: str) -> bool:
    if (first in batch) != (second in batch):
        raise ValueError(f'batch must have both "{first}" and "{second}" or neither')
    return first in batch


def _check_options(alpha, beta, num_draws: int, antithetic: bool) -> None:
    check_alpha_and_beta(alpha, beta)
    if not isinstance(num_draws, int) or num_draws < 1 or (antithetic and num_draws % 2):
        raise ValueError(
            f"num_draws must be a positive integer, even with antithetic=True, got {num_draws}"
        )
