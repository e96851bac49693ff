"""What rounds of self-play need of a kind of model, and the losses of log-ratios by name."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import PyTree

from experiments.recorded_reference import Record
from genjax_lab import objectives
from genjax_lab.objectives import Objective
from genjax_lab.training import TrainState

# (delta_real, delta_fake, alpha, beta) -> (loss, metrics), on log-ratios of data and samples.
LOSSES = {
    "ddo": objectives.ddo_loss,
    "ddo_normalized": functools.partial(objectives.ddo_loss, normalize_by_alpha=True),
    # Pairs of data and samples at random; its one weight is beta.
    "spin": lambda real, fake, alpha, beta: objectives.spin_loss(real, fake, beta),
    "kto": objectives.kto_loss,
    **{
        name: functools.partial(objectives.f_divergence_loss, name)
        for name in objectives.F_DIVERGENCES
    },
}


class FineTuning(NamedTuple):
    """The part of the rounds that depends on what a model is.

    Attributes:
        objective: of `genjax_lab.training.SelfPlay`.
        draw: `(state, seeds) -> iterable of (seeds, samples)`, a round's pool; None if the
            objective draws for itself.
        origin: what beside weights, data and seeds decides these samples, as JSON values.
        record: evaluates the reference beforehand, where recorded_draws > 0: see
            `recorded_reference`.
        project: of `genjax_lab.training.SelfPlay`.
    """

    objective: Callable[..., Objective]
    draw: Callable[[TrainState, range], Iterable[tuple[np.ndarray, Any]]] | None
    origin: Mapping[str, Any]
    record: Record
    project: Callable[[PyTree], PyTree] | None = None
